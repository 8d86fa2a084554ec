"""The service as a process of its own over the local engine, one for each module."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from tests.modes import ready
from tests.server.serving import ALICE, BOB, Served, serving


@pytest.fixture(scope="session")
def _local() -> None:
    """Skips, or fails under CLOCHE_MUST_WORK, where the local engine is not."""
    ready("local")


@pytest.fixture(scope="module")
def served(_nothing_left: None, _local: None) -> Iterator[Served]:
    """With two tokens, and small bounds."""
    with serving(
        CLOCHE_SERVE_TOKENS=f"alice:{ALICE},bob:{BOB}:3",
        CLOCHE_MAX_WORKSPACE_BYTES="4Mi",
        CLOCHE_MAX_SCRIPT_BYTES="64Ki",
        CLOCHE_MAX_CONCURRENT="4",
        CLOCHE_TIMEOUT="20",
        CLOCHE_SERVE_DRAIN="1",
    ) as found:
        yield found


@pytest.fixture
def alice(served: Served) -> Iterator[httpx2.Client]:
    with served.client(ALICE) as client:
        yield client


@pytest.fixture
def bob(served: Served) -> Iterator[httpx2.Client]:
    with served.client(BOB) as client:
        yield client
