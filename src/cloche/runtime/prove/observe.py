"""What the prober printed → observations. Pure.

The bytes come out of a box, so nothing in them is trusted: they are bounded, and what is no observation is an error. Kinds and
fields that this version does not know are passed over; one that it knows has the type that it must have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloche.errors import ProtocolError

MAX_BYTES = 512 * 1024
"""The prober stops at 192 KiB; the rest is what a newer one may have."""
MAX_LINES = 4000
MAX_LINE_BYTES = 8192

_HINT = "Something that is not cloche's prober may have written it: the image, or the engine. Do not trust this engine."


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the prober was, by the kernel's own word (``/proc/self/status``). Numbers are None where the kernel does not say."""

    pid: int
    guard: int
    """Its parent: the supervisor."""
    uids: tuple[int, ...] = ()
    gids: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    capabilities: Mapping[str, int] = field(default_factory=dict)
    """By the kernel's names: CapInh, CapPrm, CapEff, CapBnd, CapAmb."""
    no_new_privileges: int | None = None
    seccomp: int | None = None
    filters: int | None = None
    uid_map: str = ""
    label: str = ""
    """Of a security module such as AppArmor."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel that the prober saw."""

    release: str = ""
    version: str = ""
    machine: str = ""
    banner: str = ""
    """/proc/version"""
    boot_id: str = ""


@dataclass(frozen=True, slots=True)
class Process:
    """Another process that the prober saw. ``environ`` and ``memory``: 0 if it could read them, else the error."""

    pid: int
    name: str
    environ: int
    memory: int


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that was tried: its error (0: the kernel did it), or the signal that it brought."""

    group: str
    name: str
    errno: int | None
    signal: int | None


@dataclass(frozen=True, slots=True)
class Connection:
    """An address that was tried. ``errno`` 0: there was an answer. ``at``: what failed, ``socket``, ``connect`` or ``answer``."""

    name: str
    to: str
    by: str
    errno: int
    at: str = ""
    said: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder in which a file was to be made. Sizes are those of its file system, where that worked."""

    path: str
    errno: int
    bytes: int | None = None
    files: int | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """A file that was to be opened for reading or writing."""

    path: str
    purpose: str
    kind: str
    errno: int


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount of the box. ``options`` begin with ``rw`` or ``ro``."""

    path: str
    type: str
    source: str
    options: str

    @property
    def writable(self) -> bool:
        """Whether the mount itself lets anybody write."""
        return self.options.split(",")[0] == "rw"


@dataclass(frozen=True, slots=True)
class Credential:
    """A place where credentials are on many machines."""

    path: str
    kind: str
    errno: int
    size: int


@dataclass(frozen=True, slots=True)
class Device:
    """A device beyond those that every box has. ``read`` and ``write``: 0, or the error."""

    path: str
    kind: str
    read: int
    write: int


@dataclass(frozen=True, slots=True)
class Reach:
    """A bound that was to be reached: how much was asked for, how much there was, and the error that ended it (0: none)."""

    asked: int
    got: int
    errno: int


@dataclass(frozen=True, slots=True)
class Cpu:
    """What some processes had that wanted all of it: by the kernel's count (``cpu_ms``), by the clock that they saw going on
    (``ran_ms``), and how often that stood still for long. ``throttled`` is the cgroup's own count, where it is seen.
    """

    ms: int
    processes: int
    cpu_ms: int
    ran_ms: int
    stalls: int
    throttled: int | None = None


@dataclass(slots=True)
class Seen:
    """All that one prober saw. What it did not say, or did not come to, is empty or None."""

    identity: Identity | None = None
    namespaces: dict[str, int] = field(default_factory=dict)
    kernel: Kernel | None = None
    processes: list[Process] = field(default_factory=list)
    process_count: int | None = None
    environment: tuple[str, ...] | None = None
    calls: list[Call] = field(default_factory=list)
    sockets: dict[str, int] = field(default_factory=dict)
    interfaces: tuple[str, ...] | None = None
    connections: list[Connection] = field(default_factory=list)
    listening: str = ""
    """Where it listens for another box: ``10.0.0.7:4711``."""
    places: dict[str, Place] = field(default_factory=dict)
    openings: dict[str, Opening] = field(default_factory=dict)
    mounts: list[Mount] = field(default_factory=list)
    credentials: list[Credential] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    cgroup: dict[str, str] = field(default_factory=dict)
    reached: dict[str, Reach] = field(default_factory=dict)
    """By what: ``processes``, ``memory``, and ``size`` and ``files`` with the folder behind them."""
    touched_bytes: int | None = None
    """The most memory that it said it had."""
    cpu: Cpu | None = None
    complete: bool = False
    """Whether it came to its end."""

    def mount_of(self, path: str) -> Mount | None:
        """The mount on this very path; the last one covers those before it."""
        found = [mount for mount in self.mounts if mount.path == path]
        return found[-1] if found else None


def observe(data: bytes) -> Seen:
    """Read what a prober printed. A last line that was cut is left out: the box may have ended in it.

    Raises:
        ProtocolError: it is not what a prober prints.
    """
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"The prober's output has {len(data)} bytes, more than {MAX_BYTES}.", hint=_HINT)
    lines = data.split(b"\n")[:-1]
    if len(lines) > MAX_LINES:
        raise ProtocolError(f"The prober's output has {len(lines)} lines, more than {MAX_LINES}.", hint=_HINT)
    seen = Seen()
    for line in lines:
        row = _row(line)
        reader = _READERS.get(row.text("see"))
        if reader is not None:
            reader(seen, row)
    return seen


class _Row:
    """One line's fields, each taken with the type that it must have."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def text(self, name: str, default: str | None = None) -> str:
        value = self._fields.get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name)
        return value

    def number(self, name: str) -> int:
        value = self.number_or_none(name)
        if value is None:
            raise self._wrong(name)
        return value

    def number_or_none(self, name: str) -> int | None:
        value = self._fields.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63):
            raise self._wrong(name)
        return value

    def numbers(self, name: str, base: int = 10) -> tuple[int, ...]:
        """Numbers in a text, as /proc has them."""
        words = self.text(name, "").split()
        try:
            return tuple(int(word, base) for word in words)
        except ValueError:
            raise self._wrong(name) from None

    def names(self, name: str) -> tuple[str, ...]:
        value = self._fields.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name)
        return tuple(value)

    def items(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in self._fields.items() if name not in {"see", "cut"}]

    def _wrong(self, name: str) -> ProtocolError:
        kind = str(self._fields.get("see"))[:40]
        return ProtocolError(f"The prober's {kind!r} has no {name!r} that makes sense.", hint=_HINT)


def _row(line: bytes) -> _Row:
    fields = None
    if len(line) <= MAX_LINE_BYTES:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
    if not isinstance(fields, dict):
        raise ProtocolError(f"The prober printed what is no observation: {line[:80]!r}.", hint=_HINT)
    return _Row(fields)


def _identity(seen: Seen, row: _Row) -> None:
    def one(name: str) -> int | None:
        found = row.numbers(name)
        return found[0] if found else None

    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    seen.identity = Identity(
        pid=row.number("pid"),
        guard=row.number("guard"),
        uids=row.numbers("Uid"),
        gids=row.numbers("Gid"),
        groups=row.numbers("Groups"),
        capabilities={name: found[0] for name in names if (found := row.numbers(name, 16))},
        no_new_privileges=one("NoNewPrivs"),
        seccomp=one("Seccomp"),
        filters=one("Seccomp_filters"),
        uid_map=row.text("uid_map", ""),
        label=row.text("label", ""),
    )


def _kernel(seen: Seen, row: _Row) -> None:
    seen.kernel = Kernel(
        row.text("release", ""),
        row.text("version", ""),
        row.text("machine", ""),
        row.text("proc_version", ""),
        row.text("boot_id", ""),
    )


def _namespaces(seen: Seen, row: _Row) -> None:
    seen.namespaces |= {name: row.number(name) for name, _ in row.items()}


def _cgroup(seen: Seen, row: _Row) -> None:
    seen.cgroup |= {name: row.text(name) for name, _ in row.items()}


def _process(seen: Seen, row: _Row) -> None:
    seen.processes.append(Process(row.number("pid"), row.text("name"), row.number("environ"), row.number("memory")))


def _process_count(seen: Seen, row: _Row) -> None:
    seen.process_count = row.number("count")


def _environment(seen: Seen, row: _Row) -> None:
    seen.environment = row.names("names")


def _call(seen: Seen, row: _Row) -> None:
    seen.calls.append(
        Call(row.text("group"), row.text("name"), row.number_or_none("errno"), row.number_or_none("signal"))
    )


def _socket(seen: Seen, row: _Row) -> None:
    seen.sockets[row.text("kind")] = row.number("errno")


def _interfaces(seen: Seen, row: _Row) -> None:
    seen.interfaces = row.names("names")


def _connection(seen: Seen, row: _Row) -> None:
    seen.connections.append(
        Connection(
            row.text("name"),
            row.text("to"),
            row.text("by"),
            row.number("errno"),
            row.text("at", ""),
            row.text("said", ""),
        )
    )


def _listen(seen: Seen, row: _Row) -> None:
    address, port = row.text("address"), row.number("port")
    if row.number("errno") == 0 and address and len(address) < 64:
        seen.listening = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _place(seen: Seen, row: _Row) -> None:
    path = row.text("path")
    seen.places[path] = Place(path, row.number("errno"), row.number_or_none("bytes"), row.number_or_none("files"))


def _opening(seen: Seen, row: _Row) -> None:
    path = row.text("path")
    seen.openings[path] = Opening(path, row.text("for"), row.text("kind"), row.number("errno"))


def _mount(seen: Seen, row: _Row) -> None:
    seen.mounts.append(Mount(row.text("path"), row.text("type"), row.text("source"), row.text("options")))


def _credential(seen: Seen, row: _Row) -> None:
    seen.credentials.append(Credential(row.text("path"), row.text("kind"), row.number("errno"), row.number("size")))


def _device(seen: Seen, row: _Row) -> None:
    seen.devices.append(Device(row.text("path"), row.text("kind"), row.number("read"), row.number("write")))


def _memory(seen: Seen, row: _Row) -> None:
    seen.touched_bytes = max(seen.touched_bytes or 0, row.number("bytes"))


def _cpu(seen: Seen, row: _Row) -> None:
    seen.cpu = Cpu(
        row.number("ms"),
        row.number("processes"),
        row.number("cpu_ms"),
        row.number("ran_ms"),
        row.number("stalls"),
        row.number_or_none("throttled"),
    )


def _reach(seen: Seen, row: _Row) -> None:
    what = row.text("see").removeprefix("reach-")
    path = row.text("path", "")
    reach = Reach(row.number("asked"), row.number("got"), row.number("errno"))
    seen.reached[f"{what} {path}" if path else what] = reach


def _end(seen: Seen, row: _Row) -> None:
    seen.complete = row.number("cut") == 0


_READERS = {
    "identity": _identity,
    "namespaces": _namespaces,
    "kernel": _kernel,
    "process": _process,
    "processes": _process_count,
    "environment": _environment,
    "cgroup": _cgroup,
    "call": _call,
    "socket": _socket,
    "interfaces": _interfaces,
    "connect": _connection,
    "listen": _listen,
    "create": _place,
    "open": _opening,
    "mount": _mount,
    "credential": _credential,
    "device": _device,
    "memory": _memory,
    "reach-processes": _reach,
    "reach-memory": _reach,
    "reach-size": _reach,
    "reach-files": _reach,
    "reach-cpu": _cpu,
    "end": _end,
}
