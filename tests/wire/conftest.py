"""A small server of our own at a Unix socket, and a Docker daemon that it plays."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.wire.docker import Docker
from tests.wire.engine import Engine, serving


@pytest.fixture
async def engine(anyio_backend: object) -> AsyncIterator[Engine]:
    """A server that knows nothing yet."""
    async with serving() as engine:
        yield engine


@pytest.fixture
def docker(engine: Engine) -> Docker:
    """The same server as a Docker daemon in good order."""
    return Docker(engine)
