"""The runs of a service: who they belong to, how they stand, and for a while what came of those that ended.

A run is driven by a task of the service's own. Whoever asked for it listens; whether the run ends when he goes is his request's
business, not the run's.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from types import TracebackType
from typing import Self

import anyio
import structlog
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from cloche.errors import ClocheError, TooManyRuns
from cloche.events import Event, Finished
from cloche.result import Fold, Result
from cloche.runtime import Sandbox, new_run_id
from cloche.server.auth import Caller
from cloche.server.metrics import Metrics
from cloche.server.problems import HttpProblem
from cloche.server.uploads import Job

RECORD_BYTES = 4096
"""What a kept run costs beside its output and artifacts."""
KEPT_AT_MOST = 10_000
"""Runs, however small."""
_MEMORY = 0.1
"""Weight of the newest run in the average of how long one takes."""
MAX_RETRY_AFTER_S = 60

_log = structlog.get_logger("cloche.server")


class ServiceRun:
    """One run, from its acceptance on."""

    def __init__(self, run_id: str, caller: Caller) -> None:
        self.run_id = run_id
        self.caller = caller
        self.result: Result | None = None
        """How it ended; with the outcome ``failed`` where it could not happen."""
        self.error: Exception | None = None
        """Why it could not."""
        self.over = anyio.Event()
        """Set when the result or the error is known."""
        self.claims = 1
        """Who still needs its place: the run itself, and whoever reads its events and may be slow about it."""
        self._listener: MemoryObjectSendStream[Event] | None = None

    @property
    def size(self) -> int:
        """Bytes that keeping it takes."""
        if self.result is None:
            return RECORD_BYTES
        files = sum(len(artifact.data) for artifact in self.result.artifacts)
        return RECORD_BYTES + 2 * (len(self.result.stdout_raw) + len(self.result.stderr_raw)) + files

    def listen(self) -> MemoryObjectReceiveStream[Event]:
        """What happens, until the run is over. To be asked for before it begins.

        Not bounded here: the runtime bounds what a run may send.
        """
        self._listener, events = anyio.create_memory_object_stream[Event](math.inf)
        return events

    def take(self, event: Event) -> None:
        """Hand on an event, if anybody listens."""
        if self._listener is not None:
            with suppress(anyio.BrokenResourceError):
                self._listener.send_nowait(event)

    def end(self) -> None:
        """There is nothing more to come."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None  # what was not read of it is the reader's, and goes with him
        self.over.set()


class Runs:
    """All runs of a service. An async context; leaving it kills what still runs."""

    def __init__(self, sandbox: Sandbox, metrics: Metrics) -> None:
        self.sandbox = sandbox
        self.draining = False
        """Whether no new run is taken."""
        self._metrics = metrics
        self._active: dict[str, ServiceRun] = {}
        self._ended: OrderedDict[str, ServiceRun] = OrderedDict()
        self._kept_bytes = 0
        self._admitted: Counter[str] = Counter()
        self._idle = anyio.Event()
        self._run_s = 1.0
        self._group: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._group is not None
        self._group.cancel_scope.cancel()
        await self._group.__aexit__(None, None, None)

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Hold a place for a run while its request is read, so that what is not taken is not read either.

        :meth:`start` takes the place over, in the same step.

        Raises:
            HttpProblem: the service is about to end.
            TooManyRuns: it has as many as it takes, or the caller has.
        """
        settings = self.sandbox.settings
        self.check_open()
        if self._admitted.total() >= settings.max_concurrent + settings.serve_max_queue:
            raise TooManyRuns(f"As many runs wait as may: {settings.serve_max_queue} (CLOCHE_SERVE_MAX_QUEUE).")
        if caller.limit is not None and self._admitted[caller.name] >= caller.limit:
            raise TooManyRuns(f"The caller {caller.name} has as many runs as it may: {caller.limit}.")
        self._admitted[caller.name] += 1
        try:
            yield
        finally:
            self._admitted[caller.name] -= 1

    def check_open(self) -> None:
        """Raises: HttpProblem: the service is about to end."""
        if self.draining:
            raise HttpProblem(
                503, "shutting-down", "The service is about to end.", hint="Ask another one.", retry_after_s=1
            )

    @property
    def retry_after_s(self) -> int:
        """When a place may be free, by how long runs took lately."""
        load = self.sandbox.load
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(self._run_s * (load.waiting + 1) / load.places)))

    def start(self, job: Job, caller: Caller, run_id: str | None) -> ServiceRun:
        """Begin a run. The job is the run's from here on.

        Raises:
            HttpProblem: the id is in use, or the service is about to end.
        """
        assert self._group is not None
        self.check_open()  # it may be, since the request began
        if run_id is not None and (run_id in self._active or run_id in self._ended):
            raise HttpProblem(
                409,
                "run-exists",
                f"There is a run {run_id[:64]!r} already.",
                hint="Use each id once.",
                run_id=run_id[:64],
            )
        run = ServiceRun(new_run_id() if run_id is None else run_id, caller)
        self._active[run.run_id] = run
        self._admitted[caller.name] += 1
        self._group.start_soon(self._drive, run, job, name=f"cloche service run {run.run_id}")
        return run

    def find(self, run_id: str, caller: Caller) -> ServiceRun:
        """A run of the caller's.

        Raises:
            HttpProblem: there is none, it is somebody else's, or it is forgotten.
        """
        run = self._active.get(run_id) or self._ended.get(run_id)
        if run is None or run.caller.name != caller.name:
            raise HttpProblem(
                404,
                "not-found",
                f"There is no run {run_id[:64]!r}.",
                hint="Runs that ended are forgotten after a while, and with the service (CLOCHE_SERVE_KEEP_BYTES).",
            )
        return run

    def forget(self, run: ServiceRun) -> None:
        """Keep nothing more of a run that ended."""
        if self._ended.pop(run.run_id, None) is not None:
            self._kept_bytes -= run.size

    def listen(self, run: ServiceRun) -> MemoryObjectReceiveStream[Event]:
        """The events of a run that was just started. It keeps its place until :meth:`leave`: they take memory until then."""
        run.claims += 1
        return run.listen()

    def leave(self, run: ServiceRun) -> None:
        """Nobody listens to a run any more. If it still goes on, it is killed."""
        self.kill(run)
        self._give_up_claim(run)

    async def cancel(self, run: ServiceRun) -> None:
        """Ask a run to end as cancelled."""
        if self._goes_on(run):
            await self.sandbox.cancel(run.run_id)

    def kill(self, run: ServiceRun) -> None:
        """End a run at once."""
        if self._goes_on(run):
            self.sandbox.kill(run.run_id)

    def _goes_on(self, run: ServiceRun) -> bool:
        """Whether it does. Its id may be another run's by now, and another caller's."""
        return self._active.get(run.run_id) is run

    def _give_up_claim(self, run: ServiceRun) -> None:
        run.claims -= 1
        if not run.claims:
            self._admitted[run.caller.name] -= 1

    def kill_all(self) -> None:
        """End all runs at once."""
        for run in list(self._active.values()):
            self.kill(run)

    async def drain(self, within_s: float) -> None:
        """Take no more runs, wait for those there are, cancel those that take longer."""
        self.draining = True
        with anyio.move_on_after(within_s):
            await self._until_idle()
        if self._active:
            _log.warning("cancelling what still runs", runs=len(self._active), after_s=within_s)
            async with anyio.create_task_group() as tasks:
                for run in list(self._active.values()):
                    tasks.start_soon(self.cancel, run)
            await self._until_idle()

    async def _until_idle(self) -> None:
        while self._active:
            self._idle = anyio.Event()
            await self._idle.wait()

    async def _drive(self, run: ServiceRun, job: Job) -> None:
        fold = self.sandbox.fold(run.run_id)
        try:
            async with job:
                await self._listen(run, job, fold)
        except anyio.get_cancelled_exc_class():
            run.error = HttpProblem(503, "shutting-down", "The service ended before the run did.", retry_after_s=1)
            raise
        except Exception as exc:  # noqa: BLE001 (it is the caller's, whatever it is, and must not end other runs)
            run.error = exc
            if isinstance(exc, ClocheError):
                run.error = error = job.retold(exc)
                run.result = fold.failed(error)
            else:
                _log.exception("a run failed in a way that it must not", run_id=run.run_id)
                run.result = fold.failed(ClocheError("The service failed."))
        finally:
            self._settle(run)

    async def _listen(self, run: ServiceRun, job: Job, fold: Fold) -> None:
        # A caller may ask for more isolation than the service's floor, never for less.
        floor = self.sandbox.settings.min_isolation
        spec = job.spec.model_copy(update={"min_isolation": max(job.spec.min_isolation or floor, floor)})
        async with aclosing(self.sandbox.stream(spec, run_id=run.run_id)) as events:
            async for event in events:
                fold.add(event)
                if isinstance(event, Finished):
                    # Before whoever listens hears of the end: he may ask for the result at once.
                    run.result = fold.result()
                run.take(event)

    def _settle(self, run: ServiceRun) -> None:
        del self._active[run.run_id]
        self._give_up_claim(run)
        if run.result is not None:
            self._metrics.ended(run.result)
            if run.result.outcome != "failed":
                total_s = (run.result.timings_ms["total"] or 0.0) / 1000
                self._run_s += _MEMORY * (total_s - self._run_s)
            self._keep(run)
        run.end()
        self._idle.set()
        _log.info(
            "run",
            run_id=run.run_id,
            caller=run.caller.name,
            outcome=None if run.result is None else str(run.result.outcome),
            exit_code=None if run.result is None else run.result.exit_code,
            code=run.error.code if isinstance(run.error, ClocheError | HttpProblem) else None,
            total_ms=None if run.result is None else run.result.timings_ms["total"],
        )

    def _keep(self, run: ServiceRun) -> None:
        bound = self.sandbox.settings.serve_keep_bytes
        if run.size > bound:
            return
        self._ended[run.run_id] = run
        self._kept_bytes += run.size
        while self._kept_bytes > bound or len(self._ended) > KEPT_AT_MOST:
            self.forget(next(iter(self._ended.values())))
