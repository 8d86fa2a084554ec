"""A small server of our own, and what it plays: a Docker daemon, a cluster's API server, or an OpenSandbox service."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest
from tests.wire.docker import Docker
from tests.wire.engine import Engine, serving
from tests.wire.kubernetes import Kubernetes
from tests.wire.opensandbox import OpenSandbox

from cloche.backends import owners


@pytest.fixture
async def engine(anyio_backend: object) -> AsyncIterator[Engine]:
    """A server that knows nothing yet."""
    async with serving() as engine:
        yield engine


@pytest.fixture
def docker(engine: Engine) -> Iterator[Docker]:
    """The same server as a Docker daemon in good order."""
    yield Docker(engine)
    forget(engine.address)


@pytest.fixture
async def _cluster(anyio_backend: object, tmp_path: Path) -> AsyncIterator[Kubernetes]:
    async with serving(tcp=True) as engine, anyio.create_task_group() as group:
        yield Kubernetes(engine, tmp_path, group)
        group.cancel_scope.cancel()


@pytest.fixture
def cluster(_cluster: Kubernetes) -> Iterator[Kubernetes]:
    """A cluster in good order, whose API server is at a port of the loopback."""
    yield _cluster
    forget(_cluster.base)


@pytest.fixture
async def _service(anyio_backend: object) -> AsyncIterator[OpenSandbox]:
    async with serving(tcp=True) as engine, serving(tcp=True) as execd:
        yield OpenSandbox(engine, execd)


@pytest.fixture
def service(_service: OpenSandbox) -> Iterator[OpenSandbox]:
    """An OpenSandbox service in good order, at a port of the loopback, with execd at another one."""
    yield _service
    forget(_service.base)


@pytest.fixture
def place() -> str:
    """The folder of this machine's locks."""
    return owners.place_id(owners.state_folder())


@pytest.fixture
def alive() -> Iterator[str]:
    """The name of an owner that lives."""
    name = f"o{secrets.token_hex(8)}"
    owner = owners.Owner(owners.state_folder(), name)
    yield name
    owner.close()


@pytest.fixture
def dead() -> Iterator[str]:
    """The name of an owner that has died: its lock is there, and nobody holds it."""
    # With something elsewhere: else the sweep of any other process on this machine may forget him meanwhile.
    with died(note="of a test") as name:
        yield name


@contextlib.contextmanager
def died(note: str) -> Iterator[str]:
    """The name of an owner that has died, and had things at the place of this note."""
    name = f"o{secrets.token_hex(8)}"
    owner = owners.Owner(owners.state_folder(), name)
    owner.note(note)
    owner.close(left=True)
    yield name
    owners.state_folder().joinpath(f"{name}.owner").unlink(missing_ok=True)


def forget(address: str) -> None:
    """Where a removal failed, the owner's file stays until somebody sweeps that engine, which nobody will."""
    for path in owners.state_folder().glob("*.owner"):
        with contextlib.suppress(OSError):
            if address in path.read_text():
                path.unlink()
