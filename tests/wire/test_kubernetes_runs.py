"""Runs that go well: what is asked of the API server, how often, and what is not."""

from __future__ import annotations

import pytest
from tests.wire.kubernetes import Kubernetes
from tests.wire.kubernetes_runs import SPEC, run, sandbox

pytestmark = pytest.mark.anyio


async def test_result(cluster: Kubernetes) -> None:
    """x."""
    import time
    t=time.monotonic()
    assert (await run(cluster)).stdout == "hi"
    print(time.monotonic()-t, cluster.asked())
