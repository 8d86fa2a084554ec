"""An engine that plays what a test wrote down: for tests of the runtime, and of programs that use cloche.

    backend = FakeBackend([Play([Hello(1, 1, 0), Start(), Data("stdout", 0, b"hi"), end()])])
    async with Sandbox(settings, backends={"local": backend.factory}) as sandbox:
        ...

Nothing is run. A play says what comes out of a box, when, and how the box ends.
"""

from __future__ import annotations

import binascii
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias, assert_never

import anyio
import anyio.lowlevel

from cloche.backends.contract import Box, Capabilities, Examination, Fate, FateKind, Leftover, Profile
from cloche.isolation import Isolation, Posture
from cloche.settings import Settings
from cloche.spec import encode
from cloche.supervisor.bundle import Bundle
from cloche.supervisor.frames import VERSION, Data, End, Fail, File, FileData, Frame, Hardening, Hello, Start

Step: TypeAlias = Frame | bytes | float | Exception
"""A frame, bytes as they are, seconds to wait (``math.inf``: for ever), or an error of the engine."""


def encode_frame(seq: int, frame: Frame) -> bytes:
    """One line, as the supervisor writes it (``c/frames.c``). Pure."""
    match frame:
        case Hello():
            rest = b" hello %d %d %d" % (frame.version, frame.pid, frame.uid)
        case Start():
            rest = b" start"
        case Data():
            rest = b" %s %d %s" % (frame.stream[3:4].encode(), frame.offset, _base64(frame.data))
        case File():
            rest = b" file %d %d %s" % (frame.size, frame.truncated, _base64(encode(frame.path)))
        case FileData():
            rest = b" data %s" % _base64(frame.data)
        case Fail():
            rest = b" fail %s %s" % (frame.code.encode(), _base64(encode(frame.message)))
        case End():
            how = b"exit %d" % frame.exit_code if frame.exit_code is not None else b"signal %d" % (frame.signal or 0)
            rest = b" end %s %s %d %d %d %d %d %d %d %d %d %d" % (
                how,
                frame.cause.encode(),
                frame.run_us,
                frame.cpu_us,
                frame.peak_memory_bytes,
                frame.oom_kills,
                frame.stdout_bytes,
                frame.stderr_bytes,
                frame.stdout_truncated,
                frame.stderr_truncated,
                frame.artifacts_skipped,
                frame.hardening,
            )
        case _:
            assert_never(frame)
    return b"@c %d%s\n" % (seq, rest)


def encode_frames(frames: Iterable[Frame]) -> bytes:
    """A whole stream of frames, numbered from 0. Pure."""
    return b"".join(encode_frame(seq, frame) for seq, frame in enumerate(frames))


def _base64(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False)


_END = End(
    exit_code=0,
    signal=None,
    cause="none",
    run_us=1000,
    cpu_us=500,
    peak_memory_bytes=2**20,
    oom_kills=0,
    stdout_bytes=0,
    stderr_bytes=0,
    stdout_truncated=False,
    stderr_truncated=False,
    artifacts_skipped=0,
    hardening=Hardening.PID_1,
)


def end(exit_code: int = 0, *, stdout: int = 0, stderr: int = 0) -> End:
    """The last frame of a script that exited, having written so many bytes."""
    return replace(_END, exit_code=exit_code, stdout_bytes=stdout, stderr_bytes=stderr)


def ended_by(signal: int, cause: str = "none", *, stdout: int = 0) -> End:
    """The last frame of a script that a signal ended: its own, or the supervisor's for ``cause``."""
    return replace(_END, exit_code=None, signal=signal, cause=cause, stdout_bytes=stdout)  # type: ignore[arg-type]


def begin() -> list[Step]:
    """The frames of a script that has started."""
    return [Hello(VERSION, 1, 0), Start()]


@dataclass(slots=True)
class Play:
    """What one box does."""

    steps: Sequence[Step] = ()
    """What ``output()`` gives; after it the stream ends. The default is a script that prints nothing and exits with 0."""
    again: Sequence[Sequence[Step]] = ()
    """What each further ``output()`` gives, where the backend is replayable; the last one is repeated."""
    when_stopped: Sequence[Step] = ()
    """What comes, in place of the rest of the steps, once ``stop()`` was called. Frames are numbered on."""
    heeds_stop: bool = True
    """False: the supervisor is deaf, and ``stop()`` changes nothing."""
    fate: Fate = field(default_factory=lambda: Fate(FateKind.EXITED))
    open_s: float = 0.0
    """How long the engine takes to make the box (``math.inf``: for ever)."""
    open_error: Exception | None = None
    feed_s: float = 0.0
    feed_error: Exception | None = None
    removal_s: float = 0.0
    """How long removal takes, whoever cancels (``math.inf``: for ever, unless the runtime gives up)."""
    removal_error: Exception | None = None


class FakeBox:
    """A box that plays. What was done to it stands in its attributes."""

    def __init__(self, profile: Profile, play: Play) -> None:
        self.profile = profile
        self.play = play
        self.bundle: Bundle | None = None
        self.reads = 0
        self.removed = False
        self._stopped = anyio.Event()
        self._seq = 0

    @property
    def stopped(self) -> bool:
        """Whether somebody called ``stop()``."""
        return self._stopped.is_set()

    async def feed(self, bundle: Bundle) -> None:
        """Take the bundle."""
        await anyio.sleep(self.play.feed_s)
        if self.play.feed_error is not None:
            raise self.play.feed_error
        self.bundle = bundle

    async def output(self) -> AsyncIterator[bytes]:
        """Play the steps; a further call plays the next of ``again``."""
        self.reads += 1
        again = self.play.again
        steps = again[min(self.reads - 2, len(again) - 1)] if self.reads > 1 and again else self.play.steps
        self._seq = 0
        for step in steps:
            if await self._stopped_meanwhile(step):
                break
            yield self._bytes(step)
        if self.stopped and self.play.heeds_stop:
            for step in self.play.when_stopped:
                if isinstance(step, (int, float)):
                    await anyio.sleep(step)
                else:
                    yield self._bytes(step)

    async def stop(self) -> None:
        """Note that it was called."""
        self._stopped.set()

    async def fate(self, *, ended: bool) -> Fate:
        """The play's."""
        del ended
        return self.play.fate

    async def _stopped_meanwhile(self, step: Step) -> bool:
        if not isinstance(step, (int, float)):
            await anyio.lowlevel.checkpoint()
        elif self.play.heeds_stop:
            with anyio.move_on_after(step):
                await self._stopped.wait()
        else:
            await anyio.sleep(step)
        return self.stopped and self.play.heeds_stop

    def _bytes(self, step: Step) -> bytes:
        match step:
            case bytes():
                return step
            case int() | float():
                return b""
            case Exception():
                raise step
            case _:
                self._seq += 1
                return encode_frame(self._seq - 1, step)


class FakeBackend:
    """A backend whose boxes play, one play after the other (the last one is repeated), or what a function makes of the profile.

    ``alive`` and ``most_alive`` count boxes, ``boxes`` has them all, ``tended`` and ``sweeps`` count
    calls, ``closed`` tells whether the sandbox let go of it.
    """

    def __init__(
        self,
        plays: Sequence[Play] | Callable[[Profile], Play] = (),
        *,
        posture: Posture | None = None,
        capabilities: Capabilities | None = None,
        leftovers: Sequence[Leftover] | Exception = (),
        sweep_s: float = 0.0,
        tend_error: Exception | None = None,
        examination: Examination | None = None,
    ) -> None:
        self._plays = plays
        self._posture = posture or Posture("local", available=True, isolation=Isolation.NAMESPACE, engine="fake")
        self._capabilities = capabilities or Capabilities(mode=self._posture.mode)
        self._leftovers = leftovers
        self._sweep_s = sweep_s
        self._tend_error = tend_error
        self._examination = examination or Examination()
        self.boxes: list[FakeBox] = []
        self.alive = 0
        self.most_alive = 0
        self.probes = 0
        self.tended = 0
        self.sweeps = 0
        self.closed = False

    def factory(self, settings: Settings, owner: str) -> FakeBackend:
        """This backend, as an entry for the table of modes."""
        del settings, owner
        return self

    def capabilities(self) -> Capabilities:
        """As it was made."""
        return self._capabilities

    async def probe(self) -> Posture:
        """As it was made."""
        self.probes += 1
        return self._posture

    async def tend(self) -> None:
        """Count, then raise the error that it was made with, if any."""
        self.tended += 1
        if self._tend_error is not None:
            raise self._tend_error

    @asynccontextmanager
    async def open(self, profile: Profile) -> AsyncIterator[Box]:
        """A box that plays the next play."""
        play = self._next_play(profile)
        await anyio.sleep(play.open_s)
        if play.open_error is not None:
            raise play.open_error
        box = FakeBox(profile, play)
        self.boxes.append(box)
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        try:
            yield box
        finally:
            await self._remove(box)

    async def sweep(self, *, dry_run: bool = False) -> Sequence[Leftover]:
        """The leftovers that it was made with, after ``sweep_s`` seconds."""
        self.sweeps += 1
        await anyio.sleep(self._sweep_s)
        if isinstance(self._leftovers, Exception):
            raise self._leftovers
        return self._leftovers

    async def examine(self) -> Examination:
        """As it was made."""
        return self._examination

    async def remains(self, run_ids: Collection[str]) -> Sequence[str]:
        """The boxes of these runs that were not removed."""
        return [box.profile.run_id for box in self.boxes if box.profile.run_id in run_ids and not box.removed]

    async def aclose(self) -> None:
        """Note that it was called."""
        self.closed = True

    async def _remove(self, box: FakeBox) -> None:
        await anyio.sleep(box.play.removal_s)
        if box.play.removal_error is not None:
            raise box.play.removal_error
        box.removed = True
        self.alive -= 1

    def _next_play(self, profile: Profile) -> Play:
        if callable(self._plays):
            return self._plays(profile)
        if not self._plays:
            return Play([*begin(), end()])
        return self._plays[min(len(self.boxes), len(self._plays) - 1)]
