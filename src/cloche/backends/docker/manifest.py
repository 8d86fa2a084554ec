"""Profile → the bodies of requests to the daemon. Pure.

Nothing of the script stands in them: whoever may list containers sees limits, labels and the supervisor's options.

The container's first process is the supervisor as root, with four capabilities and nothing else: to give the script a uid
and gid without any (SETUID, SETGID), to empty the script's bounding set (SETPCAP), to end it (KILL). So the script and its
guard are two users, the workspace belongs to the other one, and both hold under gVisor and old daemons too, where there is
no Landlock and no mount that could be made read-only later.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloche.backends import shape
from cloche.backends.contract import Profile
from cloche.backends.docker.facts import Image
from cloche.spec import Network

CAPABILITIES = ("KILL", "SETGID", "SETPCAP", "SETUID")
LABEL_RUN = "cloche.run"
LABEL_OWNER = "cloche.owner"
LABEL_EXPIRES = "cloche.expires"
"""Unix time in whole seconds, by the daemon's clock, from which on anybody may remove the thing."""
LABEL_PLACE = "cloche.place"
"""Where the owner's lock is: only who shares that folder can tell whether the owner lives."""
START_PIDS = 32
"""runc's own threads count while the container starts; a bound below is set after that."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What of the daemon and the settings goes into every container."""

    volume: str
    """The name of the volume that holds the supervisor."""
    place: str | None = None
    runtime: str | None = None
    cpus: int = 0
    """Of the engine's host; it refuses to give more. 0: not known."""
    memory_limit: bool = True
    """Whether the engine can bound memory; else the supervisor watches over it."""
    podman: bool = False
    """Podman takes no owner and no number of files for a mount (tried with 4.3), and copies the image's files into it unless
    told not to."""
    guest_kernel: bool = False
    """Whether the runtime has a kernel of its own: then the engine's limits bound that kernel, not the script alone."""


GUEST_MEMORY_BYTES = 40 * 2**20
"""What gVisor's own processes may take beside what the script has; measured with runsc release-20260905: 20 to 40 MiB."""
GUEST_PIDS, GUEST_PIDS_EACH = 128, 3
"""gVisor's own threads on the host, and how many more each of the script's processes may take there: past that bound runsc
ends without a word, so it is far above what was measured with release-20260905 (28 and 1.5). The script's processes are
bounded inside."""


def labels(profile: Profile, ground: Ground, expires_at: float) -> dict[str, str]:
    """What tells whose a container is. ``expires_at`` is by the daemon's clock."""
    found = {
        LABEL_RUN: profile.run_id,
        LABEL_OWNER: profile.owner,
        LABEL_EXPIRES: str(int(expires_at)),
    }
    return found if ground.place is None else {**found, LABEL_PLACE: ground.place}


def container(profile: Profile, ground: Ground, image: Image, labels: Mapping[str, str]) -> dict[str, Any]:
    """The body of ``POST /containers/create``.

    Where the image wants a writable volume on the host's disk, it gets an empty, read-only mount.
    """
    host = {
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        # Podman cannot mount /output as the script's: there the supervisor gives it away.
        "CapAdd": [*CAPABILITIES, *(["CHOWN"] if ground.podman else [])],
        "SecurityOpt": ["no-new-privileges"],
        "NetworkMode": "none" if profile.network is Network.NONE else "default",
        "IpcMode": "none",  # a namespace of its own, without the engine's /dev/shm
        "Tmpfs": _mounts(profile, ground, image.volumes),
        "Mounts": [_supervisor_mount(ground, read_only=True)],
        "LogConfig": {"Type": "none", "Config": {}},
        "Init": False,
        "AutoRemove": False,
        **_limits(profile, ground),
    }
    if ground.runtime is not None:
        host["Runtime"] = ground.runtime
    return {
        "Image": image.id,
        "Hostname": shape.HOSTNAME,
        "User": "0:0",
        "Entrypoint": _supervisor(profile, ground),
        "Cmd": [],
        "Env": [],
        "WorkingDir": "/",
        "Labels": dict(labels),
        "Healthcheck": {"Test": ["NONE"]},
        "StopSignal": "SIGKILL",  # who stops it from outside ends it: that is no cancelled run
        "Tty": False,
        "OpenStdin": True,
        "StdinOnce": True,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "HostConfig": host,
    }


def start_pids(profile: Profile, ground: Ground) -> int | None:
    """The bound of processes to set after the start, where it could not be set before; None: it was."""
    return profile.limits.pids if _pids(profile, ground) > profile.limits.pids and not ground.guest_kernel else None


def volume(name: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """The body of ``POST /volumes/create``."""
    return {"Name": name, "Labels": dict(labels)}


def filler(ground: Ground, image: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """The body for a container that is never started: through it the supervisor gets into its volume."""
    return {
        "Image": image,
        "Entrypoint": [shape.SUPERVISOR],
        "Cmd": [],
        "Labels": dict(labels),
        "HostConfig": {
            "NetworkMode": "none",
            "Mounts": [_supervisor_mount(ground, read_only=False)],
            "LogConfig": {"Type": "none", "Config": {}},
        },
    }


def _supervisor_mount(ground: Ground, *, read_only: bool) -> dict[str, Any]:
    return {
        "Type": "volume",
        "Source": ground.volume,
        "Target": shape.SUPERVISOR_FOLDER,
        "ReadOnly": read_only,
        "VolumeOptions": {"NoCopy": True},
    }


def _mounts(profile: Profile, ground: Ground, image_volumes: tuple[str, ...]) -> dict[str, str]:
    each, theirs = shape.writable_bytes(profile.limits), f",uid={shape.BOX_UID},gid={shape.BOX_UID}"
    every, few, many = "nosuid,nodev", ",nr_inodes=64", f",nr_inodes={shape.INODES}"
    if ground.podman:
        every, few, many, theirs = "nosuid,nodev,notmpcopyup", "", "", ""
    # What engines and images would leave open to write is covered.
    covered = [*([] if ground.guest_kernel else ["/dev/mqueue"]), *(["/run", "/var/tmp"] if ground.podman else [])]
    covered += _volumes(image_volumes)
    mounts = dict.fromkeys(covered, f"ro,noexec,{every},size=64k{few}")
    mounts[shape.WORKSPACE] = f"rw,exec,{every},mode=0755,size={shape.workspace_bytes(profile)}"
    for path in shape.WRITABLES:
        mode = "0755" if path == "/output" else "1777"
        mounts[path] = f"rw,exec,{every},mode={mode},size={each}{theirs}{many}"
    return mounts


def _volumes(paths: tuple[str, ...]) -> list[str]:
    """Where an image's volumes are covered: normalised, without what is a mount already, and without what lies in another
    one of them, for which there is no place any more.
    """
    taken = ["/dev", "/proc", "/sys", shape.SUPERVISOR_FOLDER, shape.WORKSPACE, *shape.WRITABLES]
    kept: list[str] = []
    for path in sorted(posixpath.normpath(f"/{path}").replace("//", "/") for path in paths):
        if path != "/" and not any(path == other or path.startswith(f"{other}/") for other in (*taken, *kept)):
            kept.append(path)
    return kept


def _limits(profile: Profile, ground: Ground) -> dict[str, Any]:
    limits = profile.limits
    guest = ground.guest_kernel
    cpus = min(limits.cpus, float(ground.cpus)) if ground.cpus else limits.cpus
    found: dict[str, Any] = {
        "NanoCpus": max(10**7, round(cpus * 10**9)),  # the engine takes no less than a hundredth
        "PidsLimit": _pids(profile, ground),
    }
    if ground.memory_limit:
        memory = shape.memory_limit_bytes(profile) + (GUEST_MEMORY_BYTES if guest else 0)
        # Both the same: no swap.
        found |= {"Memory": memory, "MemorySwap": memory}
    return found


def _pids(profile: Profile, ground: Ground) -> int:
    """The bound with which a container starts."""
    pids = profile.limits.pids
    if ground.guest_kernel:
        return pids * GUEST_PIDS_EACH + GUEST_PIDS
    return pids if ground.podman else max(pids, START_PIDS)  # Podman starts with few threads, and has no update


def _supervisor(profile: Profile, ground: Ground) -> list[str]:
    uid = str(shape.BOX_UID)
    command = [shape.SUPERVISOR, "run", "--script-uid", uid, "--script-gid", uid, "--lifeline"]
    command += ["--fsize", str(shape.file_size_limit_bytes(profile.limits))]
    if ground.guest_kernel:
        # gVisor counts a user's processes in its own kernel; the supervisor is another user, and one of the number.
        command += ["--nproc", str(profile.limits.pids - 1)]
    if not ground.memory_limit:
        command += ["--memory-watch", str(profile.limits.memory_bytes)]
    return command
