from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

import cloche
from cloche.testing.conformance import Target


@pytest.fixture
async def sandbox(target: Target) -> AsyncIterator[cloche.Sandbox]:
    async with target.sandbox() as opened:
        yield opened
