"""A small server of our own at a Unix socket, and a Docker daemon that it plays."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import pytest
from tests.wire.docker import Docker
from tests.wire.engine import Engine, serving

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
    # Where a removal failed, the owner's file stays until somebody sweeps that daemon, which nobody will.
    for path in owners.state_folder().glob("*.owner"):
        with contextlib.suppress(OSError):
            if engine.address in path.read_text():
                path.unlink()
