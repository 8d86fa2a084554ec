"""Profile and layout → the argument vector of one box. Pure.

The vector is three programs, each becoming the next: ``launch`` (the supervisor's file in its other role: cgroups, uid,
parent's death), bubblewrap (namespaces and mounts), and the supervisor as PID 1. Nothing of the script stands in it. A
launcher can stand by before there is a run, so that what takes long in the kernel is done by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from cloche.backends import shape
from cloche.backends.contract import Profile
from cloche.spec import Network

DEVICES = ("null", "zero", "full", "random", "urandom")
SYSTEM_FILES = ("ld.so.cache", "alternatives")
"""Below /etc: what the loader needs, and what /usr's links lead to. Each mount costs some 0.1 ms of every run."""
NETWORK_FILES = ("hosts", "resolv.conf", "ssl/certs", "pki")
"""Below /etc, shown when the network is open."""
OWN_FILES = ("passwd", "group", "nsswitch.conf")
ETC_IN_BOX = f"{shape.SUPERVISOR_FOLDER}/etc"


@dataclass(frozen=True, slots=True)
class Bind:
    """A path of the host shown read-only in the box."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class CgroupPlan:
    """How the box's cgroup is entered and shown."""

    procs: tuple[str, ...] = ()
    """The files through which the launcher enters it."""
    bounded: bool = False
    """Whether a cgroup bounds the box at all."""
    shown: tuple[Bind, ...] = ()
    """The box's own counters, where a container would see them."""
    prefix: tuple[str, ...] = ()
    """What starts everything, where a service manager makes the cgroup."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What of this host goes into a box."""

    bwrap: str
    bwrap_folder: str | None
    """The folder that holds a bundled bubblewrap and its libraries; None: the system's."""
    supervisor: str
    etc: str
    """Folder with the box's own passwd, group, hosts and nsswitch.conf."""
    cgroup: CgroupPlan
    host_uid: int | None = None
    """A uid of the run's own, when cloche is root; None: stay who we are."""
    shelf: str | None = None
    """Folder on which the launcher lays what is ``hidden``; needs root."""
    hidden: frozenset[str] = frozenset()
    """Paths of this layout that ``host_uid`` could not reach by itself, such as what lies in /root."""
    root_links: tuple[tuple[str, str], ...] = ()
    """Links of the host's root folder that lead into /usr: path and target."""
    binds: tuple[Bind, ...] = ()
    """What the interpreter needs beside /usr, and folders such as /lib on hosts where they are no links."""
    program: tuple[str, str] | None = None
    """The interpreter's bare name and its path, when it is not on the box's PATH."""
    private_nproc: bool = False
    """Whether RLIMIT_NPROC counts this box alone (a user namespace's own count: Linux 5.14)."""


def launcher(supervisor: str, cgroup: CgroupPlan, parent_pid: int) -> list[str]:
    """The vector of a launcher that stands by: it needs no profile yet."""
    procs = (word for path in cgroup.procs for word in ("--procs", path))
    return [*cgroup.prefix, supervisor, "launch", "--parent", str(parent_pid), *procs]


def argv(profile: Profile, layout: Layout, status_fd: int) -> list[str]:
    """The rest of the vector, which the launcher is told when there is a run.

    ``status_fd`` is where bubblewrap writes the supervisor's pid as JSON.
    """
    shelf = _Shelf(layout)
    bwrap = shelf.path(layout.bwrap)
    if layout.bwrap_folder and layout.bwrap_folder in layout.hidden:
        # The folder of a bundled bubblewrap is shown whole, since its libraries are found beside it.
        inside = PurePosixPath(layout.bwrap).relative_to(layout.bwrap_folder)
        bwrap = f"{shelf.path(layout.bwrap_folder)}/{inside}"
    box = [bwrap, *_namespaces(profile), "--json-status-fd", str(status_fd), *_mounts(profile, layout, shelf)]
    return [*_launch(layout, shelf), "--", *box, "--", *_supervisor(profile, layout)]


class _Shelf:
    """Numbers what the launcher is to show; what is not hidden keeps its own path."""

    def __init__(self, layout: Layout) -> None:
        self.folder = layout.shelf
        self.hidden = layout.hidden
        self.shown: list[str] = []

    def path(self, source: str) -> str:
        if source not in self.hidden:
            return source
        if source not in self.shown:
            self.shown.append(source)
        return f"{self.folder}/{self.shown.index(source)}"


def _launch(layout: Layout, shelf: _Shelf) -> Iterator[str]:
    if shelf.folder is not None and shelf.shown:
        yield from ("--shelf", shelf.folder)
        for source in shelf.shown:
            yield from ("--show", source)
    if layout.host_uid is not None:
        yield from ("--uid", str(layout.host_uid), "--gid", str(layout.host_uid))


def _namespaces(profile: Profile) -> Iterator[str]:
    yield from ("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try")
    if profile.network is Network.NONE:
        yield "--unshare-net"
    yield from ("--hostname", shape.HOSTNAME, "--uid", str(shape.BOX_UID), "--gid", str(shape.BOX_UID))
    yield from ("--as-pid-1", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL")
    # For the supervisor alone, inside the box's own user namespace: to seal /workspace after it has been filled, and then
    # to empty the bounding set. It drops both before the script exists.
    yield from ("--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP")


def _mounts(profile: Profile, layout: Layout, shelf: _Shelf) -> Iterator[str]:
    yield from ("--ro-bind-try", "/usr", "/usr")
    for path, target in layout.root_links:
        yield from ("--symlink", target, path)
    for name in SYSTEM_FILES:
        yield from ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")
    yield from ("--ro-bind", shelf.path(layout.etc), ETC_IN_BOX)
    for name in OWN_FILES if profile.network is Network.OPEN else (*OWN_FILES, "hosts"):
        yield from ("--symlink", f"{ETC_IN_BOX}/{name}", f"/etc/{name}")
    if profile.network is Network.OPEN:
        for name in NETWORK_FILES:
            yield from ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")
    yield from ("--proc", "/proc", "--tmpfs", "/dev")
    for name in DEVICES:
        yield from ("--dev-bind", f"/dev/{name}", f"/dev/{name}")
    # bubblewrap's own --dev would mount a devpts, for which it needs a second user namespace; the box's mounts would then
    # belong to the first one, and the supervisor could not seal the workspace.
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        yield from ("--symlink", f"/proc/self/fd{target}", f"/dev/{name}")
    size = str(shape.writable_bytes(profile.limits))
    for path_in_box in shape.WRITABLES:
        yield from ("--size", size, "--tmpfs", path_in_box)
    yield from ("--size", str(shape.workspace_bytes(profile)), "--tmpfs", shape.WORKSPACE)
    yield from ("--ro-bind", shelf.path(layout.supervisor), shape.SUPERVISOR)
    for bind in (*layout.binds, *layout.cgroup.shown):
        source = bind.source if bind in layout.cgroup.shown else shelf.path(bind.source)
        yield from ("--ro-bind", source, bind.target)
    yield from ("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/")


def _supervisor(profile: Profile, layout: Layout) -> Sequence[str]:
    command = [shape.SUPERVISOR, "run", "--seal", "--inodes", str(shape.INODES)]
    command += ["--fsize", str(shape.file_size_limit_bytes(profile.limits))]
    if not layout.cgroup.bounded:
        command += ["--memory-watch", str(profile.limits.memory_bytes)]
        if layout.private_nproc or layout.host_uid is not None:
            command += ["--nproc", str(profile.limits.pids)]
    if layout.program is not None:
        command += ["--program", layout.program[0], "--program-path", layout.program[1]]
    return command
