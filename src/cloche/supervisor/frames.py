"""What comes out of a box: numbered text lines, decoded here without any I/O.

A line is ``@c SEQ KIND FIELD… LF``, at most 8 KiB. Payloads are base64, so that a line survives pod logs and JSON streams.

======= ============================================================ =====================================================
kind    fields                                                       when
======= ============================================================ =====================================================
hello   version pid uid                                              first
start                                                                the script was started, its clock runs
o, e    offset payload                                               bytes of stdout, of stderr
file    size truncated(0|1) path                                     an artifact begins
data    payload                                                      bytes of that artifact
end     see :class:`End`                                             last
fail    code message                                                 last: the script was not started
======= ============================================================ =====================================================

The writer is ``c/frames.c``.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import Literal, TypeAlias

from cloche.events import StreamName

VERSION = 1
MAGIC = b"@c "
MAX_LINE_BYTES = 8192
MAX_PAYLOAD_BYTES = 6000
"""Of one frame, before base64; a multiple of 3, so that full frames need no padding."""


class Hardening(IntFlag):
    """What the supervisor could apply. The same bits stand in ``c/cloche.h``."""

    PID_1 = 1
    NO_NEW_PRIVS = 2
    NO_CAPABILITIES = 4
    SECCOMP = 8
    SOCKETS_UNIX_ONLY = 16
    LANDLOCK_WRITES = 32
    LANDLOCK_SIGNALS = 64
    OWN_UID = 128
    """The script's uid is not the supervisor's."""
    WORKSPACE_SEALED = 256
    """/workspace is a read-only mount."""
    MEMORY_WATCH = 512
    OOM_COUNTER = 1024
    """The box's own oom-kill counter can be read."""
    NPROC = 2048
    INODES = 4096
    """The number of files in each writable mount is bounded."""


class FrameError(Exception):
    """A line that is no frame, or a frame out of order."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The supervisor is up."""

    version: int
    pid: int
    uid: int


@dataclass(frozen=True, slots=True)
class Start:
    """The script was started."""


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of stdout or stderr from ``offset`` on."""

    stream: StreamName
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class File:
    """An artifact begins. ``size`` is the file's; fewer bytes follow when ``truncated``."""

    path: str
    size: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class FileData:
    """Bytes of the artifact that began last."""

    data: bytes


Cause: TypeAlias = Literal["none", "timeout", "memory", "cancel"]


@dataclass(frozen=True, slots=True)
class End:
    """How the script ended. Exactly one of ``exit_code`` and ``signal`` is set."""

    exit_code: int | None
    signal: int | None
    cause: Cause
    """What ended it, where the supervisor did: its time, its memory (as the watch or the box's oom counter says), a stop."""
    run_us: int
    cpu_us: int
    peak_memory_bytes: int
    oom_kills: int
    stdout_bytes: int
    stderr_bytes: int
    stdout_truncated: bool
    stderr_truncated: bool
    artifacts_skipped: int
    hardening: Hardening


@dataclass(frozen=True, slots=True)
class Fail:
    """The script was not started; ``code`` is one of cloche's error codes."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Foreign:
    """A line that no supervisor wrote: an engine mixed it in."""

    line: bytes


Frame: TypeAlias = Hello | Start | Data | File | FileData | End | Fail

_N = rb"(0|[1-9][0-9]{0,17})"
_B64 = rb"([A-Za-z0-9+/]+={0,2})"
_LINE = re.compile(rb"@c " + _N + rb" ([a-z]+)(?: (.*))?")
_FIELDS = {
    b"hello": re.compile(rb"%s %s %s" % (_N, _N, _N)),
    b"o": re.compile(rb"%s %s" % (_N, _B64)),
    b"e": re.compile(rb"%s %s" % (_N, _B64)),
    b"file": re.compile(rb"%s ([01]) %s" % (_N, _B64)),
    b"data": re.compile(_B64),
    b"end": re.compile(
        rb"(exit|signal) %s (none|timeout|memory|cancel) " % _N
        + b" ".join([_N] * 6)
        + rb" ([01]) ([01]) %s %s" % (_N, _N)
    ),
    b"fail": re.compile(rb"([a-z]+(?:-[a-z]+)*) %s" % _B64),
}


def _payload(text: bytes) -> bytes:
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as exc:
        raise FrameError(f"base64: {exc}") from None
    if len(data) > MAX_PAYLOAD_BYTES:
        raise FrameError("payload over the bound")
    return data


def _safe_path(raw: bytes) -> str:
    """Check an artifact's path again: the box is not trusted to have done it."""
    path = raw.decode("utf-8", "surrogateescape")
    if path.startswith("/") or "\0" in path or any(part in {"", ".", ".."} for part in path.split("/")):
        raise FrameError("an artifact's path leaves the folder")
    return path


def parse_line(line: bytes) -> tuple[int, Frame]:
    """Number and frame of one line without its LF.

    Raises:
        FrameError: the line has the magic but is malformed.
    """
    match = _LINE.fullmatch(line)
    if match is None:
        raise FrameError("no frame")
    seq, kind, rest = int(match[1]), match[2], match[3]
    if kind == b"start":
        if rest is not None:
            raise FrameError("fields after start")
        return seq, Start()
    pattern = _FIELDS.get(kind)
    fields = pattern.fullmatch(rest or b"") if pattern is not None else None
    if fields is None:
        raise FrameError("unknown kind or wrong fields")
    return seq, _frame(kind, fields)


def _frame(kind: bytes, f: re.Match[bytes]) -> Frame:
    match kind:
        case b"hello":
            return Hello(int(f[1]), int(f[2]), int(f[3]))
        case b"o":
            return Data("stdout", int(f[1]), _payload(f[2]))
        case b"e":
            return Data("stderr", int(f[1]), _payload(f[2]))
        case b"file":
            return File(_safe_path(_payload(f[3])), int(f[1]), f[2] == b"1")
        case b"data":
            return FileData(_payload(f[1]))
        case b"fail":
            return Fail(f[1].decode(), _payload(f[2]).decode("utf-8", "replace"))
        case _:
            return _end(f)


def _end(f: re.Match[bytes]) -> End:
    exited, number = f[1] == b"exit", int(f[2])
    if number > 255 or (not exited and not 1 <= number <= 64):
        raise FrameError("no such exit code or signal")
    cause: Cause
    match f[3]:
        case b"timeout":
            cause = "timeout"
        case b"memory":
            cause = "memory"
        case b"cancel":
            cause = "cancel"
        case _:
            cause = "none"
    return End(
        exit_code=number if exited else None,
        signal=None if exited else number,
        cause=cause,
        run_us=int(f[4]),
        cpu_us=int(f[5]),
        peak_memory_bytes=int(f[6]),
        oom_kills=int(f[7]),
        stdout_bytes=int(f[8]),
        stderr_bytes=int(f[9]),
        stdout_truncated=f[10] == b"1",
        stderr_truncated=f[11] == b"1",
        artifacts_skipped=int(f[12]),
        hardening=Hardening(int(f[13])),
    )


class Decoder:
    """Turns bytes, cut anywhere, into frames. Incremental, bounded, no I/O.

    After :meth:`restart` (the connection was lost and the stream is read again from its start) frames that were already
    given out are skipped by their number.
    """

    def __init__(self) -> None:
        self._partial = bytearray()
        self._next = 0
        self._ends: dict[StreamName, int] = {"stdout": 0, "stderr": 0}
        self._in_file = False
        self._started = False
        self.finished = False
        """Whether the last frame (end or fail) has been seen."""

    def restart(self) -> None:
        """The stream will come again from its beginning."""
        self._partial.clear()

    @property
    def cut(self) -> bool:
        """Whether the bytes so far end in the middle of a line."""
        return bool(self._partial)

    def feed(self, data: bytes) -> Iterator[Frame | Foreign]:
        """The frames that ``data`` completes.

        Raises:
            FrameError: a malformed frame, one out of order, an over-long line, or bytes after the last frame.
        """
        self._partial += data
        *lines, rest = self._partial.split(b"\n")
        self._partial = rest
        for line in lines:
            yield from self._line(bytes(line))
        if len(rest) >= MAX_LINE_BYTES:
            raise FrameError("over-long line")

    def _line(self, line: bytes) -> Iterator[Frame | Foreign]:
        if len(line) >= MAX_LINE_BYTES:
            raise FrameError("over-long line")
        if not line.startswith(MAGIC):
            yield Foreign(line)
            return
        seq, frame = parse_line(line)
        if seq < self._next:
            return
        if seq > self._next:
            raise FrameError(f"frame {self._next} is missing")
        if self.finished:
            raise FrameError("a frame after the last one")
        self._check_order(frame)
        self._next += 1
        yield frame

    def _check_order(self, frame: Frame) -> None:
        if isinstance(frame, Hello) is not (self._next == 0):
            raise FrameError("hello is the first frame, and only the first")
        match frame:
            case Hello(version=version):
                if version != VERSION:
                    raise FrameError(f"the supervisor speaks version {version}, this is {VERSION}")
            case Start():
                if self._started:
                    raise FrameError("started twice")
                self._started = True
            case Data(stream=stream, offset=offset, data=data):
                if not self._started or offset < self._ends[stream]:
                    raise FrameError("output out of order")
                self._ends[stream] = offset + len(data)
            case File():
                self._in_file = True
            case FileData():
                if not self._in_file:
                    raise FrameError("data without a file")
            case End():
                if not self._started:
                    raise FrameError("an end without a start")
                self.finished = True
            case Fail():
                self.finished = True
