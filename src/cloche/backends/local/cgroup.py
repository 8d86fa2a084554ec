"""The cgroup of one box, from its making to its removal. Where it can be made is found by ``places``.

All functions here block for a moment; call them in a worker thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cloche.backends.contract import Profile
from cloche.backends.local.manifest import Bind, CgroupPlan
from cloche.backends.shape import memory_limit_bytes

CPU_PERIOD_US = 100_000
"""The kernel's default period for CPU bandwidth (Documentation/scheduler/sched-bwc.rst)."""
MONITOR_PIDS = 1
"""bubblewrap's outer process lives in the box's cgroup too."""
REMOVE_TIMEOUT_S = 5.0

# What makes a folder of a delegated scope ready for boxes. The processes of the scope have to leave its own folder first:
# a cgroup with processes passes no controllers on (Documentation/admin-guide/cgroup-v2.rst, "no internal process").
SCOPE_SCRIPT = """\
cd "$0" && mkdir guard box && echo 0 >guard/cgroup.procs && echo "$1" >cgroup.subtree_control && shift && exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Flavour:
    """A way to bound a box here. ``roots`` maps a controller to the folder in which a box's own folder can be made."""

    kind: str
    """``v2``, ``v1``, ``systemd`` (each box in a scope of its own) or ``none``."""
    roots: Mapping[str, Path] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    """How a scope is made, up to its name."""
    keeper: subprocess.Popen[bytes] | None = None
    """A process of ours without which the root would not exist; it ends when its stdin does, so with us at the latest."""

    @property
    def controllers(self) -> frozenset[str]:
        """Which of memory, pids, cpu are bounded by it."""
        return frozenset(self.roots)

    def close(self) -> None:
        """Let the root go. All boxes are gone by then."""
        if self.keeper is not None:
            self.keeper.communicate()


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The cgroup of one box."""

    plan: CgroupPlan
    folders: tuple[Path, ...] = ()
    """What is to be removed; empty where a service manager does that."""
    counters: Path | None = None
    """The folder with the memory counters."""

    @property
    def is_there(self) -> bool:
        """Whether limits can be written into it."""
        return self.counters is not None and (self.counters / "memory.max").exists()

    def oom_kills(self) -> int:
        """Processes of the box that the kernel killed for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                match = re.search(
                    r"^oom_kill (\d+)$", Path(self.counters or "/nonexistent", name).read_text(), re.MULTILINE
                )
                if match is not None:
                    return int(match[1])
        return 0


NO_CGROUP = Cgroup(plan=CgroupPlan())


def name_prefix(owner: str) -> str:
    """How the names of all cgroups of an owner begin."""
    return f"cloche-{owner}."


def create(flavour: Flavour, owner: str) -> Cgroup:
    """Make a box's cgroup, still without limits. A scope is made only when its plan's prefix is run.

    Raises:
        OSError: the kernel refused it.
    """
    name = f"{name_prefix(owner)}{secrets.token_hex(6)}"
    if flavour.kind == "systemd":
        return _scope(flavour, name)
    made: list[Path] = []
    try:
        for folder in dict.fromkeys(root / name for root in flavour.roots.values()):
            folder.mkdir()
            made.append(folder)
    except OSError:
        remove(made)
        raise
    memory = flavour.roots["memory"] / name
    shown = Bind(str(memory), "/sys/fs/cgroup" if flavour.kind == "v2" else "/sys/fs/cgroup/memory")
    procs = tuple(f"{folder}/cgroup.procs" for folder in made)
    return Cgroup(CgroupPlan(procs=procs, bounded=True, shown=(shown,)), tuple(made), memory)


def _scope(flavour: Flavour, name: str) -> Cgroup:
    """A scope that systemd makes, delegates and removes; in it a folder for the box and one for the launcher's guardian."""
    folder = flavour.roots["memory"] / f"{name}.scope"
    enabled = " ".join(f"+{controller}" for controller in flavour.roots)
    prefix = (*flavour.prefix, f"--unit={name}.scope", "--", "/bin/sh", "-c", SCOPE_SCRIPT, str(folder), enabled)
    box = folder / "box"
    plan = CgroupPlan((f"{box}/cgroup.procs",), bounded=True, shown=(Bind(str(box), "/sys/fs/cgroup"),), prefix=prefix)
    return Cgroup(plan, (box,), box)


def limit(flavour: Flavour, cgroup: Cgroup, profile: Profile) -> None:
    """Write the limits of a run into the cgroup of its box, before the script exists.

    Raises:
        OSError: the kernel refused one.
    """
    limits, memory = profile.limits, str(memory_limit_bytes(profile))
    pids, quota = str(limits.pids + MONITOR_PIDS), str(max(1000, round(limits.cpus * CPU_PERIOD_US)))
    unified = {
        "memory.max": memory,
        "memory.swap.max?": "0",
        "pids.max": pids,
        "cpu.max?": f"{quota} {CPU_PERIOD_US}",
    }
    wanted: dict[str, dict[str, str]] = {
        "v2": unified,
        "systemd": unified,
        "v1": {
            "memory.limit_in_bytes": memory,
            "memory.memsw.limit_in_bytes?": memory,
            "pids.max": pids,
            "cpu.cfs_quota_us?": quota,  # of the kernel's own period of 100 ms
        },
    }
    for name, value in wanted.get(flavour.kind, {}).items():
        # Swap accounting may be off, the cpu controller may not be ours.
        optional = name.endswith("?") and not (name.startswith("cpu") and "cpu" in flavour.controllers)
        there = [file for folder in cgroup.folders if (file := folder / name.removesuffix("?")).exists()]
        if not there and not optional:
            raise FileNotFoundError(f"no {name} in {', '.join(map(str, cgroup.folders))}")
        for file in there:
            file.write_text(value)


def remove(folders: Iterable[Path]) -> list[Path]:
    """Kill what is left in a box's cgroups and remove them. Gives the folders that would not go."""
    end = time.monotonic() + REMOVE_TIMEOUT_S
    left = []
    for folder in folders:
        step = 0.0005
        while not _try_remove(folder):
            if time.monotonic() > end:
                left.append(folder)
                break
            time.sleep(step)
            step = min(step * 2, 0.05)
    return left


def _try_remove(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        _kill_all(folder)
        for below in folder.glob("*/"):  # of a scope; a box can make none
            with contextlib.suppress(OSError):
                below.rmdir()
        return False
    return True


def _kill_all(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if (folder / "cgroup.kill").exists():
            (folder / "cgroup.kill").write_text("1")
            return
        for pid in map(int, (folder / "cgroup.procs").read_text().split()):
            if pid > 0:  # 0 stands for a process that our process namespace does not show
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
