"""What goes into a box: the plan, the workspace and stdin as one sequence of bounded records. Pure.

A record is one byte of kind, four bytes of length (little endian) and the payload, at most 256 KiB. The reader is
``c/bundle.c``; it checks every path again.

==== ============================== ==========================================================================
kind payload                        meaning
==== ============================== ==========================================================================
M    ``cloche-bundle 1``            first: magic and version
L    ``name=number``                a bound of the run, see :meth:`Bundle.records`
A    bytes                          one argument of the script's argv, in order
E    ``NAME=value``                 one variable of the script's environment
D    path                           a folder of the workspace; parents come before what they hold
F    ``x`` or ``-``, then path      a file, executable or not; its bytes follow in C records
S    target NUL path                a symbolic link, after all folders and files
I                                   stdin; its bytes follow in C records. Without it stdin is /dev/null
C    bytes                          the next bytes of the file or stdin that was opened last
Z                                   last
==== ============================== ==========================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from cloche.spec import Limits, encode

MAGIC = b"cloche-bundle 1"
MAX_RECORD_BYTES = 256 * 1024
CHUNK_BYTES = 64 * 1024
_HEADER = struct.Struct("<cI")


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of the workspace."""

    path: str


@dataclass(frozen=True, slots=True)
class File:
    """A regular file of the workspace."""

    path: str
    data: bytes = field(repr=False)
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link of the workspace; ``target`` is relative and stays inside."""

    path: str
    target: str


Entry: TypeAlias = Folder | File | Link


@dataclass(frozen=True, slots=True)
class Bundle:
    """Everything that one run needs, in the form in which it enters the box.

    ``argv`` is exec'd as it is: no shell anywhere. ``env`` is the whole environment.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(repr=False)
    limits: Limits
    entries: Sequence[Entry] = ()
    stdin: bytes | None = field(default=None, repr=False)

    @property
    def payload_bytes(self) -> int:
        """Size of workspace and stdin, in bytes: what must fit into the box's memory."""
        files = sum(len(e.data) for e in self.entries if isinstance(e, File))
        return files + len(self.stdin or b"")

    @property
    def delivery_bytes(self) -> int:
        """Size of all records, in bytes: what has to travel."""
        texts = [*map(encode, self.argv), *(encode(f"{name}={value}") for name, value in self.env.items())]
        size = sum(_HEADER.size + len(text) for text in texts)
        for entry in self.entries:
            size += len(_opening(entry)) + (_chunked(entry.data) if isinstance(entry, File) else 0)
        size += sum(map(len, self._limits())) + sum(map(len, (_record(b"M", MAGIC), _record(b"Z", b""))))
        return size + (0 if self.stdin is None else _HEADER.size + _chunked(self.stdin))

    def _limits(self) -> Iterator[bytes]:
        limits = self.limits
        for name, number in (
            ("timeout_ms", max(1, round(limits.timeout_s * 1000))),
            ("grace_ms", round(limits.grace_s * 1000)),
            ("output_bytes", limits.output_bytes),
            ("artifact_bytes", limits.artifact_bytes),
            ("artifact_count", limits.artifact_count),
        ):
            yield _record(b"L", b"%s=%d" % (name.encode(), number))

    def records(self) -> Iterator[bytes]:
        """The bundle as bytes, record by record."""
        yield _record(b"M", MAGIC)
        yield from self._limits()
        for arg in self.argv:
            yield _record(b"A", encode(arg))
        for name, value in self.env.items():
            yield _record(b"E", encode(f"{name}={value}"))
        # Links last: the reader then never creates anything through one.
        for entry in sorted(self.entries, key=lambda e: isinstance(e, Link)):
            yield from _entry(entry)
        if self.stdin is not None:
            yield _record(b"I", b"")
            yield from _chunks(self.stdin)
        yield _record(b"Z", b"")


def _entry(entry: Entry) -> Iterator[bytes]:
    yield _opening(entry)
    if isinstance(entry, File):
        yield from _chunks(entry.data)


def _opening(entry: Entry) -> bytes:
    match entry:
        case Folder(path=path):
            return _record(b"D", encode(path))
        case File(path=path, executable=executable):
            return _record(b"F", (b"x" if executable else b"-") + encode(path))
        case Link(path=path, target=target):
            return _record(b"S", encode(target) + b"\0" + encode(path))


def _chunks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), CHUNK_BYTES):
        yield _record(b"C", data[start : start + CHUNK_BYTES])


def _chunked(data: bytes) -> int:
    """The size of data's records."""
    return len(data) + _HEADER.size * -(-len(data) // CHUNK_BYTES)


def _record(kind: bytes, payload: bytes) -> bytes:
    if len(payload) > MAX_RECORD_BYTES:
        raise ValueError(f"a record of {len(payload)} bytes is over the bound of {MAX_RECORD_BYTES}")
    return _HEADER.pack(kind, len(payload)) + payload
