"""x"""
import pytest
from tests.wire.opensandbox import A_RUN, OpenSandbox
from tests.wire.opensandbox_runs import run, sandbox
from tests.wire.runs import SPEC
pytestmark = pytest.mark.anyio

async def test_requests_of_a_run(service: OpenSandbox) -> None:
    async with sandbox(service) as opened:
        for _ in range(3):
            before = len(service.asked())
            r = await opened.run(SPEC, wait_cleanup=True)
            assert r.stdout == "hi"
            assert service.asked()[before:] == A_RUN
    for r in service.requests: print(r.line, dict(r.headers), r.body[:300])
