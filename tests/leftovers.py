"""What runs of cloche could leave on a machine: processes, cgroups, files of their owners, folders.

Other programs on the machine may use cloche at the same time. What descends from them, or belongs to an owner that they
keep alive (by a lock on its file), is none of our business.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests import clusters, daemons, services

GRACE_S = 5.0
"""Removal goes on after a result. On a busy machine it takes a while; what is still there after this time is left behind."""
PROGRAMS = (b"bwrap", b"cloche-supervisor")
STANDBY = ("cloche-guard", "cloche-standby")
LASTING = ("shelf", "place")
"""Made once and kept: the empty folder on which a root cloche builds its boxes, and the name of the folder of locks."""


def now() -> frozenset[str]:
    """All there is at this moment, as text for people."""
    others = frozenset(_owners_of_others())
    engines = {*daemons.all_remains(others), *clusters.all_remains(), *services.all_remains(others)}
    return frozenset({*_processes(), *_cgroups(), *_owner_files(), *_folders(), *engines})


def beside_standby() -> frozenset[str]:
    """All there is but the launcher that each open sandbox keeps standing by for its next run, and its cgroup."""
    return frozenset(thing for thing in now() if not _stands_by(thing))


def _stands_by(thing: str) -> bool:
    kind, _, name = thing.partition(" ")
    with contextlib.suppress(OSError):
        if kind == "process":
            return Path(f"/proc/{name.split(',')[0]}/comm").read_text().strip() in STANDBY
        if kind == "cgroup":
            # A scope of systemd's has its processes in folders below its own; one of them only keeps it.
            lists = [procs for procs in Path(name).glob("**/cgroup.procs") if procs.parent.name != "keeper"]
            pids = [pid for procs in lists for pid in procs.read_text().split()]
            if len(lists) > 1 and not pids:
                return True
            return bool(pids) and all(Path(f"/proc/{pid}/comm").read_text().strip() in STANDBY for pid in pids)
    return False


def left_since(before: frozenset[str]) -> list[str]:
    """What has come since, and does not go."""
    end = time.monotonic() + GRACE_S
    left = now() - before
    while left and time.monotonic() < end:
        time.sleep(0.05)
        left &= now()
    return sorted(left)


def _parents() -> dict[int, int]:
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found[int(entry.name)] = int(Path(entry.path, "stat").read_text().rsplit(")", 1)[1].split()[1])
    return found


def _ours(pid: int, parents: dict[int, int]) -> bool:
    """Whether a process descends from this one."""
    while pid > 1 and pid != os.getpid():
        pid = parents.get(pid, 0)
    return pid == os.getpid()


def _program(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return os.path.basename(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0])
    return b""


def _processes() -> Iterator[str]:
    """Processes of boxes that descend from us, or whose starter is dead."""
    parents = _parents()
    for pid in parents:
        if (program := _program(pid)) in PROGRAMS:
            top = pid
            while (above := parents.get(top, 0)) > 1 and _program(above) in PROGRAMS:
                top = above
            if _ours(pid, parents) or parents.get(top, 0) <= 1:
                yield f"process {pid}, {program.decode()}"


def _state_folder() -> Path:
    if os.geteuid() == 0:
        return Path("/run/cloche")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "cloche") if runtime else Path(f"/tmp/cloche-{os.geteuid()}")


def _owners_of_others() -> set[str]:
    """Owners that a living process keeps, which is no descendant of ours."""
    parents = _parents()
    holders = {}
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if "FLOCK" in words:
            at = words.index("FLOCK")
            holders[int(words[at + 4].rsplit(":", 1)[1])] = int(words[at + 3])
    found = set()
    for path in _state_folder().glob("*.owner"):
        with contextlib.suppress(OSError):
            holder = holders.get(path.stat().st_ino)
            # A holder outside of our process namespace has no number here.
            others = _is_locked(path) if holder is None else not _ours(holder, parents)
            if others:
                found.add(path.stem)
    return found


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _owner_files() -> Iterator[str]:
    folder, others = _state_folder(), _owners_of_others()
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name not in LASTING and path.stem not in others and not _waits_for_an_engine(path):
                yield f"file {path}"


def _waits_for_an_engine(path: Path) -> bool:
    """Whether a sweep found the owner dead, and keeps his file for what his engine may still make."""
    with contextlib.suppress(OSError):
        return "\nfound dead at " in path.read_text()
    return False


def _cgroups() -> Iterator[str]:
    others = _owners_of_others()
    for folder, folders, _ in os.walk("/sys/fs/cgroup"):
        for name in [name for name in folders if name.startswith("cloche")]:
            folders.remove(name)
            if not name.startswith("cloche-engine") and not any(owner in name for owner in others):
                yield f"cgroup {folder}/{name}"


def _is_served(folder: Path) -> bool:
    """Whether it holds the uploads of a service that lives: that is locked. Whether one of ours should live, its test knows."""
    if not folder.name.startswith("cloche-serve-"):
        return False
    try:
        with (folder / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _folders() -> Iterator[str]:
    kept = {_state_folder(), Path("/run/cloche")}
    for top in {
        tempfile.gettempdir(),
        "/tmp",
        "/var/tmp",
        "/run",
        "/dev/shm",
        os.environ.get("XDG_RUNTIME_DIR") or "/run",
    }:
        with contextlib.suppress(OSError):
            for path in Path(top).iterdir():
                if path.name.startswith(("cloche-vm", "cloche-engines")) or _is_served(path):
                    continue  # engines of tests/engines, uploads of a service that lives
                if path.name.startswith("cloche") and path not in kept and path.stat().st_uid == os.geteuid():
                    yield f"path {path}"
