"""Where the cgroup of a box can be made on this machine, and its life.

Three ways, tried in this order: cgroup v2 in a folder that was delegated to us, cgroup v1 controllers, and a scope of the
user's systemd. Without any, the supervisor watches the box itself and the posture says so. All functions here block for a
moment; call them in a worker thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cloche.backends.contract import Profile
from cloche.backends.local.manifest import Bind, CgroupPlan, memory_limit_bytes

CPU_PERIOD_US = 100_000
"""The kernel's default period for CPU bandwidth (Documentation/scheduler/sched-bwc.rst)."""
MONITOR_PIDS = 1
"""bubblewrap's outer process lives in the box's cgroup too; in a scope the launcher's guardian as well."""
REMOVE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Flavour:
    """A way to bound a box here. ``roots`` maps a controller to the folder in which a box's own folder can be made."""

    kind: str
    """``v2``, ``v1``, ``systemd`` or ``none``."""
    roots: Mapping[str, Path] = field(default_factory=dict)

    @property
    def controllers(self) -> frozenset[str]:
        """Which of memory, pids, cpu are bounded by it."""
        return frozenset({"memory", "pids", "cpu"} if self.kind == "systemd" else self.roots)


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The cgroup of one box."""

    plan: CgroupPlan
    folders: tuple[Path, ...] = ()
    """What is to be removed; empty where a service manager does that."""
    counters: Path | None = None
    """The folder with the memory counters."""

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


def flavours() -> Iterator[Flavour]:
    """The ways that look possible here, best first; whether one works is shown by a real box."""
    mounts = _mounts(Path("/proc/self/mountinfo").read_text())
    own = _own_paths(Path("/proc/self/cgroup").read_text())
    unified = _unified(mounts, own)
    if unified is not None:
        yield unified
    legacy = {
        controller: folder
        for controller in ("memory", "pids", "cpu")
        if (folder := _legacy_folder(controller, mounts, own)) is not None
    }
    if {"memory", "pids"} <= legacy.keys():
        yield Flavour("v1", legacy)
    scope = _systemd_scope(mounts)
    if scope is not None:
        yield scope
    yield Flavour("none")


def name_prefix(owner: str) -> str:
    """How the names of all cgroups of an owner begin."""
    return f"cloche-{owner}."


def create(flavour: Flavour, owner: str) -> Cgroup:
    """Make a box's cgroup, still without limits. For ``v1`` and ``v2``; a scope is made with its limits, by :func:`scope`.

    Raises:
        OSError: the kernel refused it.
    """
    name = f"{name_prefix(owner)}{secrets.token_hex(6)}"
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


def scope(flavour: Flavour, profile: Profile) -> Cgroup:
    """A scope of the user's systemd, which makes it, bounds it and removes it."""
    name = f"{name_prefix(profile.owner)}{profile.run_id}"
    folder = flavour.roots["scope"] / f"{name}.scope"
    plan = CgroupPlan(bounded=True, shown=(Bind(str(folder), "/sys/fs/cgroup"),), prefix=_scope_command(profile, name))
    return Cgroup(plan, (), folder)


def limit(flavour: Flavour, cgroup: Cgroup, profile: Profile) -> None:
    """Write the limits of a run into the cgroup of its box, before the script exists.

    Raises:
        OSError: the kernel refused one.
    """
    limits, memory = profile.limits, str(memory_limit_bytes(profile))
    pids, quota = str(limits.pids + MONITOR_PIDS), str(max(1000, round(limits.cpus * CPU_PERIOD_US)))
    wanted: dict[str, dict[str, str]] = {
        "v2": {
            "memory.max": memory,
            "memory.swap.max?": "0",
            "pids.max": pids,
            "cpu.max?": f"{quota} {CPU_PERIOD_US}",
        },
        "v1": {
            "memory.limit_in_bytes": memory,
            "memory.memsw.limit_in_bytes?": memory,
            "pids.max": pids,
            "cpu.cfs_quota_us?": quota,  # of the kernel's own period of 100 ms
        },
    }
    for name, value in wanted.get(flavour.kind, {}).items():
        optional = name.endswith("?")  # swap accounting may be off, the cpu controller may not be ours
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
        return False
    return True


def _kill_all(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if (folder / "cgroup.kill").exists():
            (folder / "cgroup.kill").write_text("1")
            return
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _scope_command(profile: Profile, name: str) -> tuple[str, ...]:
    limits = profile.limits
    properties = (
        f"MemoryMax={memory_limit_bytes(profile)}",
        "MemorySwapMax=0",
        f"TasksMax={limits.pids + MONITOR_PIDS + 1}",
        f"CPUQuota={max(1, round(limits.cpus * 100))}%",
        f"RuntimeMaxSec={max(1, round(profile.expires_at - time.time()))}",
    )
    systemd_run = shutil.which("systemd-run") or "systemd-run"
    options = ("--user", "--scope", "--quiet", "--collect", "--slice=app.slice", f"--unit={name}")
    return (systemd_run, *options, *(f"--property={p}" for p in properties), "--")


def _mounts(mountinfo: str) -> dict[str, tuple[Path, str]]:
    """Mount point and root of each cgroup hierarchy: key ``""`` for v2, else the controller's name."""
    found: dict[str, tuple[Path, str]] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = [*right.split(), "", "", ""][:3]
        root, point = left.split()[3:5]
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point)
        if kind == "cgroup2":
            found.setdefault("", (Path(point), root))
        elif kind == "cgroup":
            for option in options.split(","):
                found.setdefault(option, (Path(point), root))
    return found


def _own_paths(cgroup: str) -> dict[str, str]:
    """Our own path in each hierarchy, by the same keys."""
    found: dict[str, str] = {}
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _folder(point: Path, root: str, own: str) -> Path:
    """Our own folder below a mount point whose root may itself be a cgroup (a container's)."""
    inside = own if root == "/" else own.removeprefix(root)
    folder = point / inside.lstrip("/")
    return folder if folder.is_dir() else point


def _unified(mounts: dict[str, tuple[Path, str]], own: dict[str, str]) -> Flavour | None:
    """The nearest folder above us (or ours) that is writable and passes memory and pids on to its children."""
    if "" not in mounts or "" not in own:
        return None
    point, root = mounts[""]
    folder = _folder(point, root, own[""])
    for candidate in (folder, *folder.parents):
        if not candidate.is_relative_to(point):
            break
        if not os.access(candidate, os.W_OK) or not os.access(candidate / "cgroup.procs", os.W_OK):
            continue
        passed = set((candidate / "cgroup.subtree_control").read_text().split())
        if {"memory", "pids"} <= passed:
            return Flavour("v2", {name: candidate for name in ("memory", "pids", "cpu") if name in passed})
    return None


def _legacy_folder(controller: str, mounts: dict[str, tuple[Path, str]], own: dict[str, str]) -> Path | None:
    if controller not in mounts or controller not in own:
        return None
    folder = _folder(*mounts[controller], own[controller])
    return folder if os.access(folder, os.W_OK) else None


def _systemd_scope(mounts: dict[str, tuple[Path, str]]) -> Flavour | None:
    """The user's systemd, if it answers and was given the controllers."""
    if "" not in mounts or os.geteuid() == 0 or shutil.which("systemd-run") is None:
        return None
    try:
        command = ["systemctl", "--user", "show", "--property=ControlGroup", "--value"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    folder = mounts[""][0] / answer.stdout.strip().lstrip("/")
    with contextlib.suppress(OSError):
        if {"memory", "pids"} <= set((folder / "cgroup.subtree_control").read_text().split()):
            return Flavour("systemd", {"scope": folder / "app.slice"})
    return None
