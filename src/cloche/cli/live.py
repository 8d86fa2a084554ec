"""One run under the eyes of a user: bytes go out as they come, and a signal ends the run, not cloche."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import aclosing

import anyio
from anyio.abc import TaskStatus

from cloche.cli import render
from cloche.cli.writer import STDERR, STDOUT, Writer
from cloche.errors import ClocheError
from cloche.events import Finished, Outcome, Output
from cloche.result import Fold, Result
from cloche.runtime import Sandbox
from cloche.settings import Settings
from cloche.spec import Spec

_log = logging.getLogger("cloche.cli")


class Live:
    """Runs a spec once. ``error`` says afterwards why it could not; ``broken`` that stdout takes nothing any more.

    ``failures`` says of each of stdout and stderr why it could not be written, unless it was that nobody reads.
    """

    def __init__(self, settings: Settings, spec: Spec, run_id: str, *, streamed: bool, verbose: bool) -> None:
        self.error: ClocheError | None = None
        self.broken = False
        self.failures: dict[int, OSError] = {}
        self._spec = spec
        self._run_id = run_id
        self._streamed = streamed
        self._verbose = verbose
        self._sandbox = Sandbox(settings)
        self._fold = Fold(run_id, settings.mode)
        self._everything: anyio.CancelScope | None = None
        self._call_soon: Callable[[Callable[[], object]], object] = lambda _: None

    async def run(self) -> Result:
        """The result; of a run that could not happen, one that says so."""
        loop = asyncio.get_running_loop()
        self._call_soon = loop.call_soon_threadsafe
        async with anyio.create_task_group() as group:
            await group.start(self._heed_signals)
            with anyio.CancelScope() as self._everything:
                await self._attempt()
            group.cancel_scope.cancel()
        if self.error is not None:
            return self._fold.failed(self.error)
        if not self._fold.ended:
            self._fold.add(Finished(Outcome.CANCELLED))
        return self._fold.result()

    async def _attempt(self) -> None:
        # As SIGPIPE would: nobody wants the rest.
        writer = Writer(lambda: self._call_soon(self._kill))
        try:
            async with self._sandbox:
                self._fold = self._sandbox.fold(self._run_id)
                if self._verbose:
                    render.say_posture(await self._sandbox.posture(), self._sandbox.choice)
                await self._follow(writer)
        except ClocheError as error:
            self.error = error
        except Exception as exc:  # noqa: BLE001 (a fault in cloche is cloche's status too, not the script's)
            _log.debug("what went wrong", exc_info=True)
            self.error = ClocheError(f"cloche itself failed: {exc!r}.")
        finally:
            self.broken = writer.broken
            self.failures = writer.failures
            writer.close()

    async def _follow(self, writer: Writer) -> None:
        stream = self._sandbox.stream(self._spec, run_id=self._run_id, wait_cleanup=True)
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    self._fold.add(event)
                    if isinstance(event, Output) and self._streamed:
                        writer.put(STDOUT if event.stream == "stdout" else STDERR, event.data)
        finally:
            await writer.drain(self._call_soon)

    def _kill(self) -> None:
        if not self._sandbox.kill(self._run_id) and self._everything is not None:
            self._everything.cancel()

    async def _heed_signals(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """The first signal asks the script's supervisor to end the run; the second one kills the box."""
        wanted = [s for s in _signals() if signal.getsignal(s) != signal.SIG_IGN]  # nohup, a job in the background
        try:
            with anyio.open_signal_receiver(*wanted) as signals:
                task_status.started()
                asked = False
                async for _ in signals:
                    if asked or not await self._sandbox.cancel(self._run_id):
                        self._kill()
                    asked = True
        except NotImplementedError:  # Windows: an interrupt then is a KeyboardInterrupt, and cancels the whole
            task_status.started()


def _signals() -> list[signal.Signals]:
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
