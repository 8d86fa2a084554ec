"""The way to a container, step by step, for those who want to know how it is."""

from __future__ import annotations

from cloche._kit.http import HttpFailure
from cloche.backends.docker import probe
from cloche.backends.docker.client import DockerClient, Refused
from cloche.backends.docker.manifest import LABEL_RUN
from cloche.backends.docker.probe import Daemon
from cloche.backends.docker.store import Images
from cloche.errors import ImageUnavailable
from cloche.isolation import Check, Verdict

_CONTROLLERS = "Give the daemon the cgroup controllers (docs/backends/docker.md, rootless)."


async def image(images: Images, name: str) -> Check:
    """Whether the daemon has it. One that is missing is pulled, as the first run would have it."""
    try:
        found = await images.ensure(name)
    except ImageUnavailable as exc:
        return Check("image", Verdict.NOT_OK, exc.message, exc.hint)
    except (Refused, HttpFailure) as exc:
        return Check("image", Verdict.UNKNOWN, f"the daemon could not be asked: {exc}")
    return Check("image", Verdict.OK, f"the daemon has {name}, for {found.os or 'linux'}/{found.arch or '?'}")


def daemon(found: Daemon, where: str, runtime: str | None) -> tuple[Check, ...]:
    """What it says of itself. Pure."""
    version, info = found.version, found.info
    in_force = probe.runtime_in_force(runtime, info)
    has = not info.runtimes or in_force in info.runtimes or in_force == ""
    limits = {"memory": info.memory_limit, "processes": info.pids_limit, "CPU time": info.cpu_limit}
    missing = [name for name, there in limits.items() if not there]
    return (
        Check("daemon", Verdict.OK, f"{version.name} at {where}, API {version.api[0]}.{version.api[1]}"),
        Check("rights", Verdict.OK, "the daemon takes requests; who may speak to it is as good as root on its host"),
        Check("runtime", Verdict.OK, f"containers are made with {in_force or 'the default runtime'}")
        if has
        else Check(
            "runtime",
            Verdict.NOT_OK,
            f"the daemon has no runtime {in_force}",
            "Set CLOCHE_DOCKER_RUNTIME to one that docker info lists, or add it to the daemon's configuration.",
        ),
        Check("limits", Verdict.OK, "the daemon can bound memory, processes and CPU time")
        if not missing
        else Check("limits", Verdict.NOT_OK, f"the daemon cannot bound {', '.join(missing)}", _CONTROLLERS),
    )


async def remains(client: DockerClient, run_id: str) -> list[str]:
    """Containers of a run.

    Raises:
        Refused, HttpFailure.
    """
    return [f"the container {found.name}" for found in await client.containers(f"{LABEL_RUN}={run_id}")]
