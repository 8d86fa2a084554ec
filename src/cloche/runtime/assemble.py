"""Frames → events. Pure. Whatever a box says, no more is kept than the run's limits allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from cloche._kit.signals import signal_name
from cloche.errors import ClocheError, ProtocolError
from cloche.events import Artifact, Event, Finished, Outcome, Output, Started, StreamName, Usage
from cloche.result import error_class
from cloche.spec import Limits
from cloche.supervisor.frames import Data, End, Fail, File, FileData, Frame, Hardening, Hello, Start

_TOO_MUCH = "Something that is not cloche's supervisor may have written it; do not trust this run, and report it."


class _Stream:
    """What came of stdout or stderr."""

    def __init__(self) -> None:
        self.kept = 0
        self.end = 0

    @property
    def whole(self) -> bool:
        return self.kept == self.end

    def take(self, data: Data, bound: int) -> None:
        self.kept += len(data.data)
        self.end = data.offset + len(data.data)
        if self.kept > bound:
            raise ProtocolError(
                f"The box sent more than the {bound} bytes of {data.stream} that it may.", hint=_TOO_MUCH
            )


class Assembler:
    """Makes events of the frames of one run, in order."""

    def __init__(self, limits: Limits, started: Started) -> None:
        self._limits = limits
        self._started = started
        self._streams: dict[StreamName, _Stream] = {"stdout": _Stream(), "stderr": _Stream()}
        self._file: File | None = None
        self._data = bytearray()
        self._files = 0
        self._file_bytes = 0

    def add(self, frame: Frame) -> Iterator[Event]:
        """The events that ``frame`` completes; ``Finished`` is the last one.

        Raises:
            ProtocolError: the box sent more than its limits allow, or less than it says that it sent.
            ClocheError: of a ``fail`` frame, the error with its code.
        """
        match frame:
            case Hello():
                pass
            case Start():
                yield self._started
            case Data():
                self._streams[frame.stream].take(frame, self._limits.output_bytes)
                yield Output(frame.stream, frame.offset, frame.data)
            case File():
                yield from self._close_file()
                self._open_file(frame)
            case FileData():
                self._take_file(frame.data)
            case End():
                yield from self._close_file()
                yield self._finished(frame)
            case Fail():
                raise _failure(frame)
            case _:
                assert_never(frame)

    def cut_short(self, outcome: Outcome, run_ms: float) -> Iterator[Event]:
        """The events that end a run whose last frame will not come: what came so far is kept."""
        yield from self._close_file()
        stdout, stderr = self._streams["stdout"], self._streams["stderr"]
        yield Finished(
            outcome,
            stdout_bytes=stdout.end,
            stderr_bytes=stderr.end,
            stdout_truncated=not stdout.whole,
            stderr_truncated=not stderr.whole,
            run_ms=run_ms,
        )

    def _open_file(self, file: File) -> None:
        self._files += 1
        if self._files > self._limits.artifact_count:
            raise ProtocolError(
                f"The box sent more than the {self._limits.artifact_count} artifacts that it may.", hint=_TOO_MUCH
            )
        self._file = file

    def _take_file(self, data: bytes) -> None:
        self._data += data
        self._file_bytes += len(data)
        if self._file_bytes > self._limits.artifact_bytes or (self._file and len(self._data) > self._file.size):
            raise ProtocolError("The box sent more bytes of artifacts than it may.", hint=_TOO_MUCH)

    def _close_file(self) -> Iterator[Artifact]:
        if self._file is not None:
            file, data = self._file, bytes(self._data)
            self._file = None
            self._data.clear()
            # Fewer bytes than the file has: cut, whether the supervisor knew before it read or not.
            yield Artifact(file.path, file.size, data, truncated=file.truncated or len(data) < file.size)

    def _finished(self, end: End) -> Finished:
        for name, total, truncated in (
            ("stdout", end.stdout_bytes, end.stdout_truncated),
            ("stderr", end.stderr_bytes, end.stderr_truncated),
        ):
            stream = self._streams[name]  # type: ignore[index]
            if stream.end > total or (not truncated and stream.kept != total):
                raise ProtocolError(f"The box says that it sent all {total} bytes of {name}, but {stream.kept} came.")
        outcome = _outcome(end)
        return Finished(
            outcome,
            exit_code=end.exit_code if outcome is Outcome.EXITED else None,
            signal=signal_name(end.signal) if outcome is Outcome.SIGNALED and end.signal is not None else None,
            stdout_bytes=end.stdout_bytes,
            stderr_bytes=end.stderr_bytes,
            stdout_truncated=end.stdout_truncated,
            stderr_truncated=end.stderr_truncated,
            artifacts_skipped=end.artifacts_skipped,
            run_ms=end.run_us / 1000,
            usage=Usage(end.cpu_us / 1000, end.peak_memory_bytes or None, end.oom_kills),
        )


def unexplained(frame: Frame) -> bool:
    """Whether a script failed in a box whose supervisor cannot see if memory was what it lacked.

    Under a kernel of the box's own it is the engine that counts, not the box.
    """
    if not isinstance(frame, End) or frame.cause != "none" or frame.exit_code == 0:
        return False
    return not frame.hardening & (Hardening.OOM_COUNTER | Hardening.MEMORY_WATCH)


def _outcome(end: End) -> Outcome:
    match end.cause:
        case "timeout":
            return Outcome.TIMED_OUT
        case "memory":
            return Outcome.OUT_OF_MEMORY
        case "cancel":
            return Outcome.CANCELLED
        case "none":
            return Outcome.EXITED if end.exit_code is not None else Outcome.SIGNALED
        case _:
            assert_never(end.cause)


def _failure(fail: Fail) -> ClocheError:
    known = error_class(fail.code)
    if known is ClocheError:
        return ProtocolError(
            f"The box failed with a code that this version does not know, {fail.code}: {fail.message}."
        )
    return known(fail.message.rstrip(".") + ".")
