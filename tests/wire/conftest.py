"""A small server of our own, and what it plays: a Docker daemon, or a cluster's API server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest
from tests.wire.docker import Docker
from tests.wire.engine import Engine, serving
from tests.wire.kubernetes import Kubernetes

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


def forget(address: str) -> None:
    """Where a removal failed, the owner's file stays until somebody sweeps that engine, which nobody will."""
    for path in owners.state_folder().glob("*.owner"):
        with contextlib.suppress(OSError):
            if address in path.read_text():
                path.unlink()
