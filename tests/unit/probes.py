"""What a prober prints in a healthy box of the local mode, as rows that a test can change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from cloche.events import Outcome
from cloche.isolation import Guarantee, Isolation, Posture, State
from cloche.runtime.prove.case import Case, Host, MemoryRun
from cloche.runtime.prove.judge import judge
from cloche.runtime.prove.observe import observe
from cloche.spec import Limits

MIB = 2**20
LIMITS = Limits(memory_bytes=256 * MIB, cpus=0.25, pids=64)
HOST = Host(
    here=True, release="6.18.0", boot_id="b", namespaces={"pid": 11, "mnt": 12, "net": 13, "ipc": 14, "uts": 15}
)
CLAIMS = (
    "process-tree",
    "network",
    "identity",
    "no-capabilities",
    "no-new-privileges",
    "system-call-filter",
    "engine-call-filter",
    "read-only-root",
    "workspace-read-only",
    "memory-limit",
    "process-limit",
    "cpu-limit",
)
CALLS = ("unshare-user", "clone3", "mount", "ptrace", "bpf", "i386", "x32", "kill-all")
GUARDED = ("kill", "prlimit", "ptrace")
Row = dict[str, Any]
Change = Callable[[list[Row]], Iterable[Row]]


def healthy() -> list[Row]:
    """The rows of a box in which everything holds."""
    capabilities = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0000000000000000")
    rows: list[Row] = [
        {
            "see": "identity",
            "pid": 2,
            "guard": 1,
            "Uid": "1000\t1000\t1000\t1000",
            "Gid": "1000\t1000\t1000\t1000",
            "Groups": "",
            **capabilities,
            "NoNewPrivs": "1",
            "Seccomp": "2",
            "Seccomp_filters": "2",
            "uid_map": "      1000 1888742398          1",
        },
        {"see": "namespaces", "user": 21, "pid": 22, "mnt": 23, "net": 24, "ipc": 25, "uts": 26, "cgroup": 27},
        {
            "see": "kernel",
            "release": "6.18.0",
            "version": "#1 SMP",
            "proc_version": "Linux version 6.18.0",
            "boot_id": "b",
        },
        {"see": "process", "pid": 1, "name": "supervisor", "environ": 13, "memory": 13},
        {"see": "processes", "count": 2},
        {"see": "environment", "names": ["PATH", "HOME", "LANG"]},
        *({"see": "call", "group": "filter", "name": name, "errno": 1} for name in CALLS),
        {"see": "call", "group": "identity", "name": "setuid-0", "errno": 22},
        *({"see": "call", "group": "guard", "name": name, "errno": 1} for name in GUARDED),
        *({"see": "create", "path": path, "errno": 30} for path in ("/", "/etc", "/usr", "/var", "/workspace")),
        *(
            {"see": "create", "path": path, "errno": 0, "bytes": 42 * MIB, "files": 65536}
            for path in ("/output", "/tmp", "/dev/shm")
        ),
        {"see": "open", "path": "/proc/self/oom_score_adj", "for": "write", "kind": "file", "errno": 13},
        {"see": "open", "path": "/proc/sysrq-trigger", "for": "write", "kind": "file", "errno": 13},
        {"see": "open", "path": "/dev/termination-log", "for": "write", "kind": "none", "errno": 2},
        {"see": "mount", "path": "/", "type": "tmpfs", "source": "tmpfs", "options": "ro,nosuid"},
        {"see": "mount", "path": "/usr", "type": "ext4", "source": "/dev/vda", "options": "ro,nosuid"},
        {"see": "mount", "path": "/proc", "type": "proc", "source": "proc", "options": "rw,nosuid"},
        {"see": "credential", "path": "/run/secrets", "kind": "none", "errno": 2, "size": 0},
        {"see": "devices", "count": 0},
        *(
            {"see": "socket", "kind": kind, "errno": 0}
            for kind in ("inet-stream", "inet-dgram", "inet6-stream", "inet6-dgram", "unix")
        ),
        *({"see": "socket", "kind": kind, "errno": 1} for kind in ("packet", "vsock", "alg")),
        {"see": "interfaces", "names": ["lo"]},
        {"see": "connect", "name": "metadata", "to": "169.254.169.254:80", "by": "tcp", "errno": 101, "at": "connect"},
        {"see": "connect", "name": "host-network", "to": "10.0.0.5:999", "by": "tcp", "errno": 101, "at": "connect"},
        {"see": "reach-size", "path": "/tmp", "asked": 80 * MIB, "got": 42 * MIB, "errno": 28},
        {"see": "reach-cpu", "ms": 500, "processes": 2, "cpu_ms": 130, "ran_ms": 120, "stalls": 8},
        {"see": "reach-processes", "asked": 128, "got": 62, "errno": 11},
        {"see": "end", "ms": 900, "cut": 0},
    ]
    return rows


def printed(rows: Iterable[Row]) -> bytes:
    """The rows as the prober prints them."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def changed(row_kind: str, where: Row | None = None, **values: Any) -> Change:
    """A change of the rows of a kind (that have certain fields)."""

    def change(rows: list[Row]) -> Iterable[Row]:
        for row in rows:
            fits = row["see"] == row_kind and all(row.get(name) == value for name, value in (where or {}).items())
            yield {**row, **{name.rstrip("_"): value for name, value in values.items()}} if fits else row

    return change


def added(**row: Any) -> Change:
    """A change that adds a row."""
    return lambda rows: [*rows, {name.rstrip("_"): value for name, value in row.items()}]


def memory(**values: Any) -> MemoryRun:
    """A script that was ended for want of memory, unless told otherwise."""
    rows = values.pop("rows", [{"see": "memory", "bytes": 70 * MIB}])
    given: dict[str, Any] = {"outcome": Outcome.OUT_OF_MEMORY, "signal": None, **values}
    return MemoryRun(64 * MIB, 192 * MIB, seen=observe(printed(rows)), **given)


def declared(isolation: Isolation = Isolation.CONTAINER) -> Posture:
    """A backend that claims everything."""
    claims = tuple(Guarantee(name, State.IN_FORCE, "it says so") for name in CLAIMS)
    return Posture("docker", available=True, isolation=isolation, guarantees=claims)


def case(*changes: Change, **values: Any) -> Case:
    """A healthy case, with these changes of what was seen, and of what is known beside it."""
    rows: Iterable[Row] = healthy()
    for change in changes:
        rows = list(change(list(rows)))
    given: dict[str, Any] = {
        "declared": declared(),
        "limits": LIMITS,
        "host": HOST,
        "memory": memory(),
        "answering": frozenset({"host-network"}),
        "remains": (),
        **values,
    }
    return Case(look=observe(printed(rows)), **given)


def verdict(*changes: Change, **values: Any) -> Posture:
    """What is made of it."""
    return judge(case(*changes, **values))


def states(posture: Posture) -> dict[str, State]:
    """By name."""
    return {guarantee.name: guarantee.state for guarantee in posture.guarantees}
