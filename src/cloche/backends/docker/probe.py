"""What works on the daemon, from what it says of itself; and why nothing does, in words that tell what to do."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from cloche._kit.http import ConnectFailure, HttpFailure, TlsFailure
from cloche.backends.docker.address import Address
from cloche.backends.docker.client import DockerClient, Refused
from cloche.backends.docker.facts import OLDEST_API, PODMAN, Info, Version
from cloche.errors import BackendUnavailable
from cloche.isolation import Guarantee, State
from cloche.supervisor.frames import Hardening

PLAIN_RUNTIMES = frozenset({"", "runc", "crun", "youki", "io.containerd.runc.v2"})
"""Those of which it is known that their containers share the host's kernel. All others are tried."""

_START = "Start it (systemctl start docker), or say where it is: DOCKER_HOST=unix:///path/to/socket or tcp://host:port."


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon that can be used."""

    version: Version
    info: Info


async def look(client: DockerClient, address: Address) -> Daemon:
    """Ask the daemon what it is.

    Raises:
        BackendUnavailable: there is none, or none that can be used. Reason and hint say why.
    """
    try:
        version = await client.version()
        if version is None:
            raise BackendUnavailable(
                f"What answers at {address.text} is no Docker daemon.",
                hint="Check DOCKER_HOST: it has to be the Engine API, of Docker or Podman.",
            )
        _check(version)
        return Daemon(version, await client.info())
    except HttpFailure as exc:
        raise _unreachable(exc, address) from exc
    except Refused as exc:
        raise _refused(exc, address) from exc


def _check(version: Version) -> None:
    if version.os != "linux":
        raise BackendUnavailable(
            f"The Docker daemon runs {version.os} containers.",
            hint="Switch it to Linux containers, or use another one.",
        )
    if version.api < OLDEST_API:
        raise BackendUnavailable(
            f"{version.name} speaks the API {version.api[0]}.{version.api[1]} at most;"
            f" cloche needs {OLDEST_API[0]}.{OLDEST_API[1]}.",
            hint="Update it: Docker 19.03 or newer, or Podman 4 or newer.",
        )


def _unreachable(exc: HttpFailure, address: Address) -> BackendUnavailable:
    where = address.text
    path = address.server.socket
    match exc:
        case TlsFailure():
            return BackendUnavailable(
                f"The Docker daemon at {where} and cloche could not agree on TLS: {exc}.",
                hint="Set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH to the folder with its ca.pem and your cert.pem and"
                " key.pem; unset both for a daemon without TLS.",
            )
        case ConnectFailure(errno=errno.ENOENT) if path is not None:
            return BackendUnavailable(f"There is no Docker daemon: the socket {path} is not there.", hint=_START)
        case ConnectFailure(errno=errno.EACCES | errno.EPERM) if path is not None:
            return BackendUnavailable(
                f"This user may not use the Docker daemon's socket {path}.",
                hint="Add the user to the group that owns the socket (usually docker; its members are as good as root), or"
                " use rootless Docker or Podman and set DOCKER_HOST to their socket.",
            )
        case ConnectFailure(errno=errno.ECONNREFUSED):
            return BackendUnavailable(f"No Docker daemon listens at {where}.", hint=_START)
        case ConnectFailure():
            return BackendUnavailable(f"The Docker daemon at {where} cannot be reached: {exc}.", hint=_START)
        case _:
            return BackendUnavailable(
                f"What listens at {where} gives no answer that a Docker daemon would give: {exc}.",
                hint="Check DOCKER_HOST, and whether the daemon wants TLS (DOCKER_TLS_VERIFY, DOCKER_CERT_PATH).",
            )


def _refused(exc: Refused, address: Address) -> BackendUnavailable:
    if "HTTP request to an HTTPS server" in exc.message:
        return BackendUnavailable(
            f"The Docker daemon at {address.text} wants TLS.",
            hint="Set DOCKER_TLS_VERIFY=1, and DOCKER_CERT_PATH to the folder with ca.pem, cert.pem and key.pem.",
        )
    if exc.status in {401, 403}:
        return BackendUnavailable(
            f"The Docker daemon at {address.text} refuses cloche: {exc}.",
            hint="Whatever guards the daemon (a proxy, an authorization plugin) has to let cloche make containers.",
        )
    return BackendUnavailable(
        f"What answers at {address.text} is no Docker daemon that can be used: {exc}.",
        hint="Check DOCKER_HOST: it has to be the Engine API, of Docker or Podman.",
    )


def runtime_in_force(chosen: str | None, info: Info) -> str:
    """The name of the runtime that containers get."""
    return chosen or info.default_runtime


def guarantees(daemon: Daemon, seen: Hardening | None, *, guest: bool) -> tuple[Guarantee, ...]:
    """What a box of this daemon gives. ``seen`` is what a trial box's supervisor reported, where there was one.

    Much of it the supervisor checks in every run: what it cannot do then, it refuses the run for.
    """
    info, checked = daemon.info, "the supervisor checks it in every run"

    def asked(name: str, *, offered: bool, yes: str, no: str, advice: str = "") -> Guarantee:
        if offered:
            return Guarantee(name, State.IN_FORCE, yes)
        return Guarantee(name, State.NOT_IN_FORCE, no, advice)

    landlock = State.UNKNOWN
    if seen is not None:
        landlock = State.IN_FORCE if Hardening.LANDLOCK_WRITES in seen else State.NOT_IN_FORCE
    return (
        Guarantee("process-tree", State.IN_FORCE, "the supervisor is PID 1 of the container"),
        Guarantee(
            "network", State.IN_FORCE, "no network (mode none) unless network is open: only a loopback of its own"
        ),
        Guarantee("identity", State.IN_FORCE, f"uid 1000, another one than the supervisor's; {checked}"),
        Guarantee("no-capabilities", State.IN_FORCE, f"no capability is left to the script; {checked}"),
        Guarantee("no-new-privileges", State.IN_FORCE, f"set by the engine and by the supervisor; {checked}"),
        Guarantee("system-call-filter", State.IN_FORCE, f"the supervisor's own filter; {checked}"),
        asked(
            "engine-call-filter",
            offered="seccomp" in info.security or guest,
            yes="a kernel of its own takes the calls" if guest else "the engine's seccomp profile is in force as well",
            no="the daemon says nothing of seccomp",
            advice="Start the daemon with its default seccomp profile.",
        ),
        Guarantee(
            "read-only-root", State.IN_FORCE, "the image's files cannot be changed; no path of the host is mounted"
        ),
        Guarantee("workspace-read-only", State.IN_FORCE, "it belongs to the supervisor's uid"),
        asked(
            "file-count-limit",
            offered=daemon.version.product != PODMAN and not guest,
            yes="each writable mount holds at most 65536 files",
            no="the engine takes no such bound: the memory limit alone bounds empty files",
        ),
        Guarantee(
            "landlock",
            landlock,
            "asked of a trial box" if seen is not None else "every run tries it, and no trial was made",
        ),
        asked(
            "memory-limit",
            offered=info.memory_limit,
            yes="a cgroup of the engine's bounds memory" + ("" if info.swap_limit else "; swap is not accounted for"),
            no="the daemon cannot limit memory: the supervisor sums the processes' memory every 20 ms and kills",
            advice="Give the daemon the memory controller (docs/backends/docker.md, rootless).",
        ),
        asked(
            "process-limit",
            offered=info.pids_limit or guest,
            yes="the guest kernel counts them (RLIMIT_NPROC)" if guest else "a cgroup of the engine's bounds processes",
            no="the daemon cannot limit processes",
            advice="Give the daemon the pids controller (docs/backends/docker.md, rootless).",
        ),
        asked(
            "cpu-limit",
            offered=info.cpu_limit,
            yes="a cgroup of the engine's bounds CPU time",
            no="the daemon cannot limit CPU time",
            advice="Give the daemon the cpu controller (docs/backends/docker.md, rootless).",
        ),
        Guarantee("user-namespace", *_user_namespace(info, guest=guest)),
    )


def _user_namespace(info: Info, *, guest: bool) -> tuple[State, str, str]:
    if guest:
        return State.IN_FORCE, "a kernel of its own: uid 0 in it is nobody on the host", ""
    if info.security & {"rootless", "userns"}:
        return State.IN_FORCE, "root in the container is not root on the host", ""
    return (
        State.NOT_IN_FORCE,
        "uids in the container are the host's; the script has 1000, and no right to become another",
        "Rootless Docker, or userns-remap, gives one more wall.",
    )
