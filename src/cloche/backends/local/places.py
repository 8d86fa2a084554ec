"""Where the cgroup of a box can be made on this machine.

Tried in this order:

1. cgroup v2, in a folder that was delegated to us: a unit with ``Delegate=yes``, a container's own cgroup;
2. cgroup v2, in a scope of systemd's that holds all our boxes. Nobody may move a process into it from outside the part of
   the tree that he owns, so this is for root, and for a user whose session is run by his own systemd (most desktops);
3. cgroup v2, in a folder above us that is writable and passes controllers on;
4. cgroup v1;
5. a scope of the user's systemd for each box, which is born in it. This is for logins by ssh: their session is outside.

Without any, the supervisor watches the box itself and the posture says so. No way moves a process of anybody else.
All functions here block for a moment; call them in a worker thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from cloche.backends.local.cgroup import Flavour, name_prefix

WANTED = ("memory", "pids", "cpu")
NEEDED = {"memory", "pids"}
ANSWER_TIMEOUT_S = 20.0
"""For systemd; it answers within some milliseconds, unless the machine is very busy. Its own clients wait 25 s."""
KEEPER_SCRIPT = """\
cd "$0" && mkdir keeper && echo 0 >keeper/cgroup.procs && echo "$1" >cgroup.subtree_control && echo ready && exec cat
"""
"""The keeper leaves the scope's own folder, since one with processes passes no controllers on, and waits for our end."""

Mounts = dict[str, tuple[Path, str]]


def flavours(owner: str) -> Iterator[Flavour]:
    """The ways that look possible here, best first; whether one works is shown by a real box. Each is to be closed."""
    mounts = read_mounts(Path("/proc/self/mountinfo").read_text())
    own = read_own_paths(Path("/proc/self/cgroup").read_text())
    if "" in mounts and "" in own:
        yield from _unified(owner, mounts, own[""])
    legacy = {name: folder for name in WANTED if (folder := _legacy_folder(name, mounts, own)) is not None}
    if legacy.keys() >= NEEDED:
        yield Flavour("v1", legacy)
    yield Flavour("none")


def _unified(owner: str, mounts: Mounts, own: str) -> Iterator[Flavour]:
    point, root = mounts[""]
    if (delegated := _delegated(point, root, own)) is not None:
        yield delegated
        return
    if (kept := _kept_scope(owner, point, own)) is not None:
        yield kept
    if (writable := _writable(point, inside(point, root, own))) is not None:
        yield writable
    elif kept is None and (scopes := _scopes(point)) is not None:
        yield scopes


# --- what the kernel says -------------------------------------------------------------------------------------------


def read_mounts(mountinfo: str) -> Mounts:
    """Mount point and root of each cgroup hierarchy in /proc/self/mountinfo: key ``""`` for v2, else the controller's name."""
    found: Mounts = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = [*right.split(), "", "", ""][:3]
        root, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), word) for word in left.split()[3:5])
        if kind == "cgroup2":
            found.setdefault("", (Path(point), root))
        elif kind == "cgroup":
            for option in options.split(","):
                found.setdefault(option, (Path(point), root))
    return found


def read_own_paths(cgroup: str) -> dict[str, str]:
    """Our own path in each hierarchy of /proc/self/cgroup, by the same keys."""
    found: dict[str, str] = {}
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def inside(point: Path, root: str, own: str) -> Path:
    """Our own folder below a mount point whose root may itself be a cgroup (a container's)."""
    path = PurePosixPath(own)
    # A path with ".." is outside of our cgroup namespace.
    if not path.is_relative_to(root) or ".." in path.parts:
        return point
    folder = point / path.relative_to(root)
    return folder if folder.is_dir() else point


def _words(file: Path) -> set[str]:
    """The words of a cgroup's file; none when it cannot be read."""
    try:
        return set(file.read_text().split())
    except OSError:
        return set()


def _roots(folder: Path) -> dict[str, Path]:
    """The controllers that a folder passes on to its children."""
    passed = _words(folder / "cgroup.subtree_control")
    return {name: folder for name in WANTED if name in passed}


# --- folders that are there -----------------------------------------------------------------------------------------


def _delegated(point: Path, root: str, own: str) -> Flavour | None:
    """Our own folder, or the one above it where a service manager put us into a subfolder (systemd's DelegateSubgroup)."""
    folder = inside(point, root, own)
    for candidate in (folder, folder.parent):
        if not candidate.is_relative_to(point) or not _is_ours(candidate, point):
            continue
        if not _roots(candidate).keys() >= NEEDED:
            _pass_on(candidate)
        if (roots := _roots(candidate)).keys() >= NEEDED:
            return Flavour("v2", roots)
    return None


def _is_ours(folder: Path, point: Path) -> bool:
    """Whether it was delegated to us: systemd marks such a folder, and the root of a container's view is one."""
    if not all(os.access(folder / name, os.W_OK) for name in (".", "cgroup.procs", "cgroup.subtree_control")):
        return False
    if re.fullmatch(r"user@\d+\.service", folder.name):
        return False  # delegated to the user's systemd
    with contextlib.suppress(OSError):
        return os.getxattr(folder, "user.delegate") == b"1"  # systemd 251
    # Only the root of the whole tree has no type. It is ours where no service manager has it.
    return folder == point and ((folder / "cgroup.type").exists() or not _has_systemd())


def _pass_on(folder: Path) -> None:
    """Have the folder pass its controllers on. If we are alone in it, we go into a folder of our own below it."""
    available = _words(folder / "cgroup.controllers")
    try:
        if _words(folder / "cgroup.procs") == {str(os.getpid())} and (folder / "cgroup.type").exists():
            leaf = folder / "main"
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text("0")
        (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in WANTED if name in available))
    except OSError:
        return  # others live there: it passes nothing on, which the caller sees


def _writable(point: Path, folder: Path) -> Flavour | None:
    """The nearest folder above us (or ours) that is writable and passes memory and pids on; better one with cpu as well."""
    found: list[dict[str, Path]] = []
    for candidate in (folder, *folder.parents):
        if not candidate.is_relative_to(point):
            break
        if os.access(candidate, os.W_OK) and os.access(candidate / "cgroup.procs", os.W_OK):
            found.append(_roots(candidate))
    best = next((r for r in found if len(r) == len(WANTED)), next((r for r in found if r.keys() >= NEEDED), None))
    return None if best is None else Flavour("v2", best)


def _legacy_folder(controller: str, mounts: Mounts, own: dict[str, str]) -> Path | None:
    if controller not in mounts or controller not in own:
        return None
    folder = inside(*mounts[controller], own[controller])
    return folder if os.access(folder, os.W_OK) else None


# --- scopes of systemd ----------------------------------------------------------------------------------------------


def _has_systemd() -> bool:
    """Whether systemd is the system's manager (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


def manager_environment() -> dict[str, str]:
    """Our environment, with the way to the user's systemd where it is missing (``su`` without ``-l``, cron)."""
    runtime = f"/run/user/{os.geteuid()}"
    return dict(os.environ) if "XDG_RUNTIME_DIR" in os.environ else {**os.environ, "XDG_RUNTIME_DIR": runtime}


def _scope_command(manager: str) -> tuple[str, ...] | None:
    program = shutil.which("systemd-run")
    if program is None or not _has_systemd():
        return None
    slice_ = ("--slice=app.slice",) if manager == "--user" else ()
    return (program, manager, "--scope", "--quiet", "--collect", "--property=Delegate=yes", *slice_)


def _kept_scope(owner: str, point: Path, own: str) -> Flavour | None:
    """One delegated scope for all our boxes."""
    uid = os.geteuid()
    manager = "--system" if uid == 0 else "--user"
    if uid != 0 and f"/user@{uid}.service/" not in own:
        return None
    command = _scope_command(manager)
    if command is None:
        return None
    name = f"{name_prefix(owner)}scope"
    parent = point / "system.slice"
    if uid != 0:
        parent = point / own[: own.index(f"/user@{uid}.service/")].lstrip("/") / f"user@{uid}.service/app.slice"
    # A scope has the controllers of its parent's children once it is delegated; the script asks for those that it wants.
    wanted = _words(parent.parent / "cgroup.controllers")
    enabled = " ".join(f"+{controller}" for controller in WANTED if controller in wanted)
    keeper = _start_keeper(
        (*command, f"--unit={name}", "--", "/bin/sh", "-c", KEEPER_SCRIPT, str(parent / name), enabled)
    )
    if keeper is None:
        return None
    flavour = Flavour("v2", _roots(parent / name), keeper=keeper)
    if flavour.controllers >= NEEDED:
        return flavour
    flavour.close()
    return None


def _start_keeper(command: tuple[str, ...]) -> subprocess.Popen[bytes] | None:
    """A running keeper, or None when systemd would not have it."""
    try:
        keeper = subprocess.Popen(  # noqa: S603 - a vector of ours
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=manager_environment(),
            cwd="/",
            start_new_session=True,
        )
    except OSError:
        return None
    assert keeper.stdout is not None
    if select.select([keeper.stdout], [], [], ANSWER_TIMEOUT_S)[0] and keeper.stdout.readline() == b"ready\n":
        return keeper
    keeper.kill()
    keeper.communicate()
    return None


def _scopes(point: Path) -> Flavour | None:
    """A scope for each box, if the user's systemd answers and was given the controllers."""
    command = _scope_command("--user")
    if command is None or os.geteuid() == 0:
        return None
    try:
        answer = subprocess.run(
            ["systemctl", "--user", "show", "--property=ControlGroup", "--value"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=ANSWER_TIMEOUT_S,
            check=True,
            env=manager_environment(),
        )
    except (OSError, subprocess.SubprocessError):
        return None
    folder = point / answer.stdout.strip().lstrip("/")
    roots = _roots(folder)
    if not roots.keys() >= NEEDED:
        return None
    return Flavour("systemd", dict.fromkeys(roots, folder / "app.slice"), prefix=command)


def stop_scopes(folders: Iterable[Path]) -> None:
    """Have systemd end those of the folders that are scopes.

    It does so by itself when the last process leaves, but not when a process died while it was being put in (seen with
    systemd 257: the scope stays, active and empty).
    """
    names = [folder.name for folder in folders if folder.suffix == ".scope" and folder.is_dir()]
    if names and _has_systemd():
        manager = "--system" if os.geteuid() == 0 else "--user"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(  # noqa: S603 - a vector of ours
                ["systemctl", manager, "stop", *names],  # noqa: S607
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=ANSWER_TIMEOUT_S,
                check=False,
                env=manager_environment(),
            )
