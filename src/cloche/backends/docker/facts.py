"""What the daemon says of itself, of images and of containers, as values. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cloche._kit.fields import field, texts

PODMAN = "Podman"
OLDEST_API = (1, 40)
"""Docker 19.03, of 2019."""
NEWEST_API = (1, 56)
"""The newest one that this client was checked with (Docker Engine 29). A daemon with a newer one is spoken to in this."""


@dataclass(frozen=True, slots=True)
class Version:
    """The answer to ``/version``."""

    product: str
    version: str
    api: tuple[int, int]
    oldest_api: tuple[int, int]
    os: str
    arch: str
    kernel: str
    """Of the engine's own host."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.product} {self.version}"

    @property
    def spoken_api(self) -> tuple[int, int]:
        """The version of the API in which to speak to it."""
        return max(min(self.api, NEWEST_API), self.oldest_api)


def parse_version(found: object) -> Version | None:
    """None: what answered is no Docker daemon."""
    api = _numbers(field(found, "ApiVersion", str, ""))
    if api is None:
        return None
    components = field(found, "Components", list, [])
    podman = any("podman" in field(part, "Name", str, "").lower() for part in components)
    return Version(
        product=PODMAN if podman else "Docker",
        version=field(found, "Version", str, "?"),
        api=api,
        oldest_api=_numbers(field(found, "MinAPIVersion", str, "")) or (1, 12),
        os=field(found, "Os", str, "linux"),
        arch=field(found, "Arch", str, ""),
        kernel=field(found, "KernelVersion", str, ""),
    )


def _numbers(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Info:
    """The answer to ``/info``: what the engine's host offers."""

    runtimes: frozenset[str]
    default_runtime: str
    security: frozenset[str]
    """Names of what is in force, such as ``seccomp``, ``apparmor``, ``rootless``, ``userns``."""
    cpus: int
    """0: not said."""
    memory_limit: bool
    swap_limit: bool
    pids_limit: bool
    cpu_limit: bool


def parse_info(found: object) -> Info:
    """Of an engine that says nothing of a limit it is taken that the limit holds: Docker names all of them."""
    options = [option.split(",") for option in texts(field(found, "SecurityOptions", list, []))]
    names = {part.removeprefix("name=") for option in options for part in option if part.startswith("name=")}
    return Info(
        runtimes=frozenset(field(found, "Runtimes", dict, {})),
        default_runtime=field(found, "DefaultRuntime", str, ""),
        security=frozenset(names),
        cpus=field(found, "NCPU", int, 0),
        memory_limit=field(found, "MemoryLimit", bool, True),  # noqa: FBT003
        swap_limit=field(found, "SwapLimit", bool, True),  # noqa: FBT003
        pids_limit=field(found, "PidsLimit", bool, True),  # noqa: FBT003
        cpu_limit=field(found, "CpuCfsQuota", bool, True),  # noqa: FBT003
    )


@dataclass(frozen=True, slots=True)
class Image:
    """An image that the daemon has."""

    id: str
    arch: str
    os: str
    volumes: tuple[str, ...]
    """Paths that a container of it would get as writable volumes on the host's disk."""


def parse_image(found: object) -> Image:
    """From the answer to ``/images/{name}/json``."""
    config = field(found, "Config", dict, {})
    return Image(
        id=field(found, "Id", str, ""),
        arch=field(found, "Architecture", str, ""),
        os=field(found, "Os", str, ""),
        volumes=tuple(sorted(path for path in field(config, "Volumes", dict, {}) if isinstance(path, str))),
    )


@dataclass(frozen=True, slots=True)
class State:
    """How a container is doing."""

    running: bool
    oom_killed: bool
    exit_code: int
    error: str


def parse_state(found: object) -> State:
    """From the answer to ``/containers/{id}/json``."""
    state = field(found, "State", dict, {})
    return State(
        running=field(state, "Running", bool, False),  # noqa: FBT003
        oom_killed=field(state, "OOMKilled", bool, False),  # noqa: FBT003
        exit_code=field(state, "ExitCode", int, 0),
        error=field(state, "Error", str, ""),
    )


@dataclass(frozen=True, slots=True)
class Labelled:
    """Something with labels on the daemon: a container or a volume, by its name."""

    name: str
    labels: Mapping[str, str]


def parse_containers(found: object) -> list[Labelled]:
    """From the answer to ``/containers/json``."""
    rows = found if isinstance(found, list) else []
    names = [(next(iter(texts(field(row, "Names", list, []))), ""), row) for row in rows]
    return [Labelled(name.lstrip("/"), _labels(row)) for name, row in names if name]


def parse_volumes(found: object) -> list[Labelled]:
    """From the answer to ``/volumes``."""
    rows = field(found, "Volumes", list, [])
    return [Labelled(field(row, "Name", str, ""), _labels(row)) for row in rows if field(row, "Name", str, "")]


def _labels(row: object) -> dict[str, str]:
    return {k: v for k, v in field(row, "Labels", dict, {}).items() if isinstance(k, str) and isinstance(v, str)}
