"""The sandbox: holds the chosen backend, and drives runs on it."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup

from cloche.errors import InvalidSpec, SandboxDisabled
from cloche.events import Event, Finished, Output
from cloche.isolation import Check, Posture
from cloche.result import Fold, Result
from cloche.runtime.admission import Admission, Load
from cloche.runtime.choose import MODES, Factory, check_floor, choose, let_go, look_again, tend
from cloche.runtime.course import Course
from cloche.runtime.life import Counters, House, Ready, Run
from cloche.runtime.names import RUN_ID, new_owner, new_run_id
from cloche.runtime.service import Service
from cloche.runtime.sweep import keep_sweeping
from cloche.settings import Settings
from cloche.spec import Spec

KILL_WAIT_S = 10.0
"""How long a caller who gives up waits for his box to be gone. Removal goes on after it."""
SWEEP_WAIT_S = 2.0
"""How long closing waits for the sweep: processes that live for one run must get to it too."""

OWN = Spec(name="cloche-prober", content="")
"""What stands for a run of cloche's own; it delivers something else."""
_log = logging.getLogger("cloche.runtime")


class Sandbox:
    """Runs scripts in isolation, on the engine that the settings choose.

    Use it as an async context: entering probes the engine (and falls back to ``local`` where that is allowed), leaving
    waits until every box is removed. One sandbox serves many runs at a time.

    ``backends`` replaces the table of modes, for engines that are not part of cloche and for tests. The mode ``auto`` is in
    no table: it takes the first that can be used of kubernetes, opensandbox, docker and local.

    Raises (on entering):
        BackendUnavailable, IsolationUnavailable: no engine can be used as the settings want it; or, with ``prove="start"``,
            what was seen from inside of a box is below the floor.
        ClocheError: with ``prove="start"`` also what a run raises whose box cannot be made.
    """

    def __init__(self, settings: Settings | None = None, *, backends: Mapping[str, Factory] = MODES) -> None:
        self.settings: Settings = Settings() if settings is None else settings
        self.owner: str = new_owner()
        """Stands on every box that this sandbox makes."""
        self._table = backends
        self._house: House | None = None
        self._group: TaskGroup | None = None
        self._runs: dict[str, Course] = {}
        self._swept: anyio.Event | None = None
        self._sweeping: anyio.CancelScope | None = None
        self._proving = anyio.Lock()
        self._looking = anyio.Lock()
        self._looks = 0
        self._last_look: Posture | None = None
        self._closed = False

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Sandbox:
        """A sandbox with the settings of the environment (None: this process's).

        Raises:
            InvalidSettings: a variable is unknown or not allowed.
        """
        return cls(Settings.from_env(environ))

    async def __aenter__(self) -> Self:
        if self._house is not None or self._closed:
            raise RuntimeError("a sandbox can be entered once")
        chosen = await choose(self.settings, self.owner, self._table)
        admission = Admission(self.settings.max_concurrent, self.settings.queue_timeout)
        self._house = House(self.settings, chosen, self.owner, admission)
        self._swept = anyio.Event()
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._sweep, self._house, self._swept, name="cloche sweep")
        self._group.start_soon(tend, chosen.backend, name="cloche tend")
        if self.settings.prove == "start":
            try:
                await self._prove_at_start()
            except BaseException as exc:
                await self.__aexit__(type(exc), exc, exc.__traceback__)
                raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        house, group = self._opened()
        try:
            await self.close()
        finally:
            # Without the exception, which the group would wrap into a group: its tasks raise nothing.
            group.cancel_scope.cancel()
            try:
                await group.__aexit__(None, None, None)
            finally:
                await let_go(house.chosen.backend)

    async def _prove_at_start(self) -> None:
        """Raises: IsolationUnavailable: what was seen is below the floor. ClocheError: nothing could be seen."""
        posture = await self.posture(prove=True)
        if not self.runs:
            return
        check_floor(posture, self.settings.min_isolation)
        if posture.missing:
            names = ", ".join(guarantee.name for guarantee in posture.missing)
            _log.warning("Not everything that runs count on is in force here: %s. cloche doctor tells more.", names)

    @property
    def mode(self) -> str:
        """The mode in use; before the sandbox is entered, the one that was asked for."""
        return str(self.settings.mode) if self._house is None else self._house.chosen.posture.mode

    @property
    def fallback_from(self) -> str | None:
        """The mode that was asked for, when another one took its place."""
        return None if self._house is None else self._house.chosen.fallback_from

    @property
    def choice(self) -> str:
        """How the mode ``auto`` came to the mode in use, in words; empty where the settings name it."""
        return "" if self._house is None else self._house.chosen.choice

    @property
    def counters(self) -> Counters:
        """What went wrong in the background: removals and sweeps."""
        return self._opened()[0].counters

    @property
    def load(self) -> Load:
        """How many runs there are now, and how many wait."""
        return self._opened()[0].admission.load

    @property
    def runs(self) -> bool:
        """Whether scripts are run at all: not in the mode ``disabled``."""
        return self._opened()[0].chosen.capabilities.runs

    async def posture(self, *, prove: bool = False) -> Posture:
        """What isolation is in force, as it was found on entering.

        With ``prove`` a script looks from inside of a box, at all that could be missing, and reaches the bounds of some more
        boxes; that takes some seconds. What it finds holds for all runs that begin after that: one that would get less than it
        must have is refused.

        Raises:
            ClocheError: no box could be looked at from inside.
        """
        house, _ = self._opened()
        backend = house.chosen.backend
        if prove and house.chosen.capabilities.runs:
            async with self._proving:
                if isinstance(backend, Service):
                    proved = await backend.prove()
                else:
                    from cloche.runtime.prove.prover import Prover

                    proved = await Prover(house, backend, self._run_ready).prove()
                self._house = replace(house, chosen=replace(house.chosen, posture=proved))
        return self._opened()[0].chosen.posture

    async def examine(self) -> tuple[Check, ...]:
        """Each step of the way to a box, how it is, and what to do about it. Empty where a service looks after its engine itself.

        Raises nothing.
        """
        backend = self._opened()[0].chosen.backend
        return () if isinstance(backend, Service) else (await backend.examine()).checks

    async def probe(self) -> Posture:
        """What the engine offers now: asks it anew, for those who want to know whether the next run will find it.

        Raises nothing; an engine that cannot be used is a posture with the reason. Runs do not notice. Whoever asks while
        somebody else does gets an answer no older than the question.
        """
        house, _ = self._opened()
        begun = self._looks
        async with self._looking:
            if self._looks > begun and self._last_look is not None:  # one that was begun after we had asked
                return self._last_look
            self._looks, self._last_look = self._looks + 1, None
            self._last_look = await look_again(self.settings, new_owner(), house.chosen)
            return self._last_look

    async def run(self, spec: Spec, *, run_id: str | None = None, wait_cleanup: bool = False) -> Result:
        """Run a script and give its result.

        It returns as soon as the result is known; the box is removed after that, unless ``wait_cleanup`` is set, which
        also fills in ``timings_ms["cleanup"]``. Cancelling the call kills the box.

        Raises:
            ClocheError: the run could not happen, or how it ended is not known.
        """
        run_id = new_run_id() if run_id is None else run_id
        fold = self.fold(run_id)
        async with aclosing(self.stream(spec, run_id=run_id, wait_cleanup=wait_cleanup)) as events:
            async for event in events:
                fold.add(event)
        return fold.result()

    def fold(self, run_id: str) -> Fold:
        """An empty fold for the events of one run of this sandbox."""
        if self._house is None:
            return Fold(run_id, self.mode)
        chosen = self._house.chosen
        posture = chosen.posture
        return Fold(run_id, posture.mode, posture.isolation, chosen.fallback_from, chosen.in_force)

    async def stream(
        self, spec: Spec, *, run_id: str | None = None, wait_cleanup: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Run a script and give its events as they happen; the last one is ``Finished``.

        Closing the generator before that kills the box.

        Raises:
            ClocheError: the run could not happen, or how it ended is not known.
        """
        run = self._begin(spec, new_run_id() if run_id is None else run_id, wait_cleanup=wait_cleanup)
        async with aclosing(self._follow(run)) as events:
            async for event in events:
                yield event

    @staticmethod
    async def _follow(run: Course) -> AsyncGenerator[Event, None]:
        """Its events. Who stops listening kills it."""
        try:
            async with aclosing(run.events()) as events:
                async for event in events:
                    yield event
                    if isinstance(event, Finished):
                        return
            if run.error is not None:
                raise run.error
        finally:
            if not run.settled:
                run.kill()
                with anyio.move_on_after(KILL_WAIT_S, shield=True):
                    await run.gone.wait()

    async def cancel(self, run_id: str) -> bool:
        """End a run, queued or running; it finishes as ``cancelled``. False: there is no such run (any more).

        The supervisor is asked, so that what the script left is collected; if it does not answer, the box is killed.
        """
        run = self._runs.get(run_id)
        if run is not None:
            await run.stop()
        return run is not None

    def kill(self, run_id: str) -> bool:
        """End a run at once: its box is killed, and the run finishes as ``cancelled``. False: there is no such run."""
        run = self._runs.get(run_id)
        if run is not None:
            run.kill()
        return run is not None

    async def close(self) -> None:
        """Kill what still runs, and wait until every box is removed. Can be called again."""
        self._closed = True
        if self._swept is None:
            return
        for run in list(self._runs.values()):
            run.kill()
        for run in list(self._runs.values()):
            await run.gone.wait()
        with anyio.move_on_after(SWEEP_WAIT_S):
            await self._swept.wait()
        if self._sweeping is not None:
            self._sweeping.cancel()

    def _begin(self, spec: Spec, run_id: str, *, wait_cleanup: bool) -> Course:
        house, group = self._opened()
        if self._closed:
            raise RuntimeError("the sandbox is closed")
        if not house.chosen.capabilities.runs:
            raise SandboxDisabled("Script execution is switched off here.")
        if re.fullmatch(RUN_ID, run_id) is None or run_id in self._runs:
            raise InvalidSpec(
                f"The run id {run_id[:64]!r} is in use or malformed.",
                hint="Use 2 to 32 small letters, digits and '-', a letter first, and each id once.",
            )
        check_floor(house.chosen.posture, spec.min_isolation or self.settings.min_isolation)
        backend = house.chosen.backend
        run: Course
        if isinstance(backend, Service):
            run = backend.course(spec, run_id, house.admission)
        else:
            run = Run(house, backend, spec, run_id, wait_cleanup=wait_cleanup)
        return self._start(run, group)

    def _start(self, run: Course, group: TaskGroup) -> Course:
        self._runs[run.run_id] = run
        group.start_soon(self._drive, run, name=f"cloche run {run.run_id}")
        return run

    async def _run_ready(self, ready: Ready, run_id: str, hear: Callable[[bytes], None] | None = None) -> Result:
        """A run of cloche's own, in a box as every run has one, and removed with it. No floor is asked for: it is what shows
        whether one is reached.

        Raises:
            ClocheError: it could not happen, or how it ended is not known.
        """
        house, group = self._opened()
        backend = house.chosen.backend
        if self._closed or isinstance(backend, Service):
            raise RuntimeError("the sandbox is closed, or has no backend")
        run = self._start(Run(house, backend, OWN, run_id, wait_cleanup=True, ready=ready), group)
        fold = self.fold(run_id)
        async with aclosing(self._follow(run)) as events:
            async for event in events:
                fold.add(event)
                if hear is not None and isinstance(event, Output) and event.stream == "stdout":
                    hear(event.data)
        return fold.result()

    async def _drive(self, run: Course) -> None:
        try:
            await run.drive()
        finally:
            del self._runs[run.run_id]

    async def _sweep(self, house: House, swept: anyio.Event) -> None:
        with anyio.CancelScope() as self._sweeping:
            await keep_sweeping(house.chosen.backend, house.counters, self.settings.sweep_every, swept)

    def _opened(self) -> tuple[House, TaskGroup]:
        if self._house is None or self._group is None:
            raise RuntimeError("enter the sandbox first: async with cloche.Sandbox.from_env() as sandbox")
        return self._house, self._group
