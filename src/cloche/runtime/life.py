"""One run, from the queue to the removal of its box. Driven by a task of the sandbox; its caller listens.

The order of scopes is what this module is about. ``_life`` is around everything; while the run waits, reads and opens its
box, cancelling it ends the run. ``_talk`` is around the conversation with the box and holds the deadline. Once the
conversation is over, ``_life`` turns into the shield behind which the box is removed.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import anyio
import anyio.to_thread

from cloche.backends.contract import Backend, Box, Fate, FateKind, Profile
from cloche.errors import (
    BackendUnavailable,
    EngineLost,
    ImageUnavailable,
    PermissionDenied,
    QuotaExceeded,
    StartTimeout,
    Unschedulable,
)
from cloche.events import Finished, Outcome, Started
from cloche.runtime.admission import Admission
from cloche.runtime.assemble import Assembler, unexplained
from cloche.runtime.choose import Chosen
from cloche.runtime.course import Course
from cloche.runtime.deadline import Deadline
from cloche.runtime.delivery import Bounds, Delivery, deliver
from cloche.runtime.reading import Reading
from cloche.settings import Settings, resolve
from cloche.spec import Limits, Spec
from cloche.supervisor.bundle import Bundle
from cloche.supervisor.frames import Start

REMOVAL_S = 30.0
"""A backend bounds its own removal; this is for one that does not. What is left then is sweep's."""
FATE_S = 20.0
"""For an engine's word on a box that has ended; it knows by then, or will not know."""
UNSTARTED_FATE_S = 5.0
"""For its word on a box that has not started yet."""
LATE_FATE_S, LATE_READING_S = 5.0, 30.0
"""For its word on a box that should have ended, and for what that had still to say."""
CLOCK_SKEW_S = 60.0
"""How far the clocks of two machines may be apart before one takes the other's living box for a dead one's."""

_log = logging.getLogger("cloche.runtime")


@dataclass(slots=True)
class Counters:
    """What went wrong where nobody waits for it."""

    removals_failed: int = 0
    sweeps_failed: int = 0
    swept: int = 0


@dataclass(frozen=True, slots=True)
class House:
    """What all runs of a sandbox share."""

    settings: Settings
    chosen: Chosen
    owner: str
    admission: Admission
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a run of cloche's own brings: a bundle that holds the program too, and limits that no settings know."""

    bundle: Bundle
    limits: Limits
    sockets: bool = False
    """As in a box's profile."""


class Run(Course):
    """One run in a box of a backend's. ``ready`` is what it delivers, where that is not to be read from files."""

    def __init__(
        self,
        house: House,
        backend: Backend,
        spec: Spec,
        run_id: str,
        *,
        wait_cleanup: bool,
        ready: Ready | None = None,
    ) -> None:
        super().__init__(run_id)
        self._house = house
        self._backend = backend
        self._spec = spec
        self._wait_cleanup = wait_cleanup
        self._ready = ready
        self._limits = resolve(spec, house.settings) if ready is None else ready.limits
        chosen = house.chosen
        posture = chosen.posture
        self._started = Started(run_id, posture.mode, posture.isolation, chosen.fallback_from, chosen.in_force)
        self._assembler = Assembler(self._limits, self._started)
        self._deadline = Deadline(self._limits, math.inf, 0.0)
        self._life = anyio.CancelScope()
        self._talk: anyio.CancelScope | None = None
        self._box: Box | None = None
        self._reading: Reading | None = None
        self._leaving = False
        self._cancelled = False
        self._unexplained = False
        self._feed_error: Exception | None = None
        self._ending: Finished | Exception | None = None

    async def drive(self) -> None:
        """The whole run. Raises nothing of its own: what goes wrong is handed to the listener."""
        try:
            with self._life:
                async with self._house.admission.place():
                    self._lap("queued")
                    await self._with_place()
            if self._ending is not None:
                self._settle(self._ending)
            elif self._life.cancelled_caught and not self._cancelled:
                self._settle(self._too_slow())
        except Exception as exc:  # noqa: BLE001 (it is the listener's, whatever it is, and must not end other runs)
            self._settle(exc)
        finally:
            if not self.settled:
                self._settle(self._cut(Outcome.CANCELLED))
            self.gone.set()

    async def stop(self) -> None:
        """End the run as cancelled: by the supervisor when it can still be asked, else by killing the box."""
        self._cancelled = True
        if self._box is None or self._talk is None:
            self.kill()
        elif not self._leaving:
            self._deadline.stop(anyio.current_time(), self._house.chosen.capabilities.stop_s)
            self._talk.deadline = self._deadline.at
            try:
                await self._box.stop()
            except Exception:  # noqa: BLE001 (an engine may fail in any way; then the box is killed)
                _log.exception("run %s could not be asked to stop; its box is killed", self.run_id)
                self.kill()

    def kill(self) -> None:
        """End the run as cancelled, at once. Removal goes on."""
        self._cancelled = True
        if not self._leaving:
            (self._talk or self._life).cancel()

    async def _with_place(self) -> None:
        delivery = await self._deliver()
        self._lap("prepare")
        limits, settings = self._limits, self._house.settings
        self._deadline = Deadline(limits, settings.start_timeout, anyio.current_time())
        self._life.deadline = self._deadline.at
        _log.debug(
            "run %s: %s bytes for %s, %s", self.run_id, delivery.bundle.payload_bytes, delivery.interpreter, limits
        )
        longest = settings.start_timeout + limits.timeout_s + limits.grace_s + CLOCK_SKEW_S
        await self._in_box(
            Profile(
                run_id=self.run_id,
                owner=self._house.owner,
                expires_at=time.time() + longest,
                limits=limits,
                network=self._spec.network,
                image=self._spec.image or settings.image,
                bundle_bytes=delivery.bundle.payload_bytes,
                delivery_bytes=delivery.bundle.delivery_bytes,
                interpreter=delivery.interpreter,
                sockets=self._ready is not None and self._ready.sockets,
            ),
            delivery.bundle,
        )

    async def _deliver(self) -> Delivery:
        if self._ready is not None:
            return Delivery(self._ready.bundle, None)
        settings, capabilities = self._house.settings, self._house.chosen.capabilities
        workspace_bytes = settings.workspace_bytes(capabilities.mode)
        if capabilities.max_bundle_bytes is not None:
            workspace_bytes = min(workspace_bytes, capabilities.max_bundle_bytes)
        bounds = Bounds(settings.max_script_bytes, workspace_bytes)
        if self._spec.workspace is None:
            # One small file: reading it takes less than handing it to a thread.
            return deliver(self._spec, self._limits, bounds)
        return await anyio.to_thread.run_sync(deliver, self._spec, self._limits, bounds, abandon_on_cancel=True)

    async def _in_box(self, profile: Profile, bundle: Bundle) -> None:
        remove_by = math.inf
        try:
            async with self._backend.open(profile) as self._box:
                self._life.deadline = math.inf
                try:
                    self._ending = await self._converse(self._box, bundle)
                finally:
                    self._leaving = True
                    self._life.deadline = remove_by = anyio.current_time() + REMOVAL_S
                    self._life.shield = True
                if not self._wait_cleanup:
                    self._settle(self._ending)
                self._mark = time.perf_counter()
        except Exception as exc:  # what fails in removal is counted and left to sweep
            if not self._leaving:
                raise
            self._removal_failed(repr(exc))
        finally:
            if self._leaving and anyio.current_time() >= remove_by:
                self._removal_failed(f"it took longer than {REMOVAL_S:g} s")
            self._life.shield = False
            if self._leaving:
                self._lap("cleanup")

    def _removal_failed(self, why: str) -> None:
        self._house.counters.removals_failed += 1
        _log.error("the box of run %s was not removed and is left to sweep: %s", self.run_id, why)

    async def _converse(self, box: Box, bundle: Bundle) -> Finished | Exception:
        """Feed the box and listen to it, until its end, its deadline, or a kill."""
        ending: Finished | Exception | None = None
        silent = False
        with anyio.CancelScope(deadline=self._deadline.at) as self._talk:
            async with anyio.create_task_group() as both:
                both.start_soon(self._feed, box, bundle, both.cancel_scope)
                ending = await self._listen(box)
                silent = ending is None
                both.cancel_scope.cancel()
        ending = ending or self._feed_error
        # The engine's word comes after the run: neither its clock nor who gives up on it may take away what is known.
        if isinstance(ending, Finished) and self._unexplained:
            ending = await self._with_engines_word(box, ending)
        elif ending is None and not self._cancelled:
            if silent:
                ending = await self._without_last_frame(box)
            elif self._deadline.started_at is None:
                ending = await self._without_start(box)
            else:
                ending = await self._without_answer(box)
        if isinstance(ending, Finished) and ending.outcome is Outcome.CANCELLED and not self._cancelled:
            said = _says(await self._fate(box, LATE_FATE_S))
            ending = EngineLost(f"Somebody else than cloche had the box ended before the script ended.{said}")
        if self._cancelled and not isinstance(ending, Finished):
            return self._cut(Outcome.CANCELLED)
        return self._cut(Outcome.TIMED_OUT) if ending is None else ending

    async def _feed(self, box: Box, bundle: Bundle, both: anyio.CancelScope) -> None:
        try:
            await box.feed(bundle)
        except Exception as exc:  # noqa: BLE001 (an exception group is no error of cloche's)
            self._feed_error = exc
            both.cancel()

    async def _listen(self, box: Box) -> Finished | Exception | None:
        """How it ended; None: without a last frame."""
        if self._reading is None:
            self._reading = Reading(box, replayable=self._house.chosen.capabilities.replayable)
        try:
            async with aclosing(self._reading.frames()) as frames:
                async for frame in frames:
                    if isinstance(frame, Start):
                        self._script_started()
                    for event in self._assembler.add(frame):
                        if isinstance(event, Finished):
                            self._script_ended(event.run_ms)
                            self._unexplained = unexplained(frame)
                            return event
                        self._emit(event)
        except Exception as exc:  # noqa: BLE001 (an exception group is no error of cloche's)
            return exc
        return None

    async def _with_engines_word(self, box: Box, event: Finished) -> Finished:
        """The end of a script that may have been out of memory, where the supervisor could not see that: the engine can."""
        fate = await self._fate(box)
        if fate.kind is not FateKind.OOM_KILLED:
            return event
        usage = replace(event.usage, oom_kills=max(1, event.usage.oom_kills))
        if event.signal == "SIGKILL":
            return replace(event, outcome=Outcome.OUT_OF_MEMORY, signal=None, usage=usage)
        return replace(event, usage=usage)

    async def _fate(self, box: Box, within_s: float = FATE_S, *, ended: bool = True) -> Fate:
        """The engine's word, for which is waited no longer than a bound."""
        fate = Fate(FateKind.LOST, f"It gave no answer within {within_s:g} s.")
        with anyio.move_on_after(within_s, shield=True):
            try:
                fate = await box.fate(ended=ended)
            except Exception as exc:  # noqa: BLE001 (an engine may fail in any way)
                _log.debug("the engine has no word on run %s", self.run_id, exc_info=True)
                fate = Fate(FateKind.LOST, str(exc))
        return fate

    def _script_started(self) -> None:
        self._deadline.start(anyio.current_time())
        self._lap("start")
        if self._talk is not None:
            self._talk.deadline = self._deadline.at

    def _script_ended(self, run_ms: float) -> None:
        self._lap("collect")
        since_start = self._timings["collect"] or 0.0
        self._timings["run"] = run_ms
        self._timings["collect"] = max(0.0, round(since_start - run_ms, 3))

    async def _without_last_frame(self, box: Box) -> Finished | Exception:
        """What the engine's word makes of a run whose output ended too early."""
        return self._by_fate(await self._fate(box))

    def _by_fate(self, fate: Fate) -> Finished | Exception:
        said = _says(fate)
        match fate.kind:
            case FateKind.NOT_STARTED:
                return BackendUnavailable(f"The engine could not make the box.{said}")
            case FateKind.OOM_KILLED:
                return self._cut(Outcome.OUT_OF_MEMORY)
            case FateKind.IMAGE:
                return ImageUnavailable(f"The engine cannot have the image.{said}")
            case FateKind.UNSCHEDULABLE:
                return Unschedulable(f"The engine found no place for the box.{said}")
            case FateKind.QUOTA:
                return QuotaExceeded(f"A quota of the engine's forbids the box.{said}")
            case FateKind.DENIED:
                return PermissionDenied(f"The engine's rules forbid the box.{said}")
            case FateKind.LOST | FateKind.RUNNING:
                return EngineLost(f"The connection to the box was lost.{said}", retryable=True)
            case FateKind.EXITED:
                return EngineLost(f"The box ended without a word on how the script ended.{said}")
            case FateKind.EVICTED:
                return EngineLost(f"The box was evicted before the script ended.{said}")
            case FateKind.DELETED:
                return EngineLost(f"The box was deleted before the script ended.{said}")

    async def _without_start(self, box: Box) -> Exception:
        """Why a box did not start in time, as far as the engine says so."""
        fate = await self._fate(box, UNSTARTED_FATE_S, ended=False)
        said = _says(fate)
        waited = f"The box was not ready within {self._house.settings.start_timeout:g} s.{said}"
        match fate.kind:
            case FateKind.IMAGE:
                return ImageUnavailable(waited)
            case FateKind.UNSCHEDULABLE:
                return Unschedulable(waited)
            case FateKind.QUOTA:
                return QuotaExceeded(waited)
            case FateKind.DENIED:
                return PermissionDenied(waited)
            case _:
                return StartTimeout(waited)

    async def _without_answer(self, box: Box) -> Finished | Exception | None:
        """What became of a script whose time is over and whose supervisor has not said so. None: it has to be killed.

        Its word may have been lost on the way: where the engine can tell, nobody guesses.
        """
        if self._reading is None or not self._reading.connected:
            return EngineLost(
                "The connection to the box was lost, and its time was over before there was one again.", retryable=True
            )
        if not self._house.chosen.capabilities.replayable:
            return None
        fate = await self._fate(box, LATE_FATE_S)
        if fate.kind is FateKind.RUNNING:
            return None
        if fate.kind is not FateKind.EXITED:
            return self._by_fate(fate)
        with anyio.move_on_after(LATE_READING_S, shield=True):
            if (ending := await self._listen(box)) is not None:
                return ending
        return EngineLost(
            f"The box ended in time, and its last word did not come in time.{_says(fate)}", retryable=True
        )

    def _cut(self, outcome: Outcome) -> Finished:
        started = self._deadline.started_at
        run_ms = 0.0 if started is None else round((anyio.current_time() - started) * 1000, 3)
        if started is not None:
            self._timings["run"] = run_ms
        *before, last = self._assembler.cut_short(outcome, run_ms)
        for event in before:
            self._emit(event)
        assert isinstance(last, Finished)
        return last

    def _too_slow(self) -> StartTimeout:
        return StartTimeout(
            f"The box was not ready within {self._house.settings.start_timeout:g} s.",
        )


def _says(fate: Fate) -> str:
    return f" The engine says: {fate.message.rstrip('.')}." if fate.message else ""
