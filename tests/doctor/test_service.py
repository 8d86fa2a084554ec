"""A proof by a service that is somewhere else."""

from __future__ import annotations

import pytest
from tests.modes import ready

from cloche.isolation import Isolation
from cloche.spec import Spec
from cloche.testing.conformance import Target


@pytest.fixture
def remote() -> Target:
    return ready("remote")


async def test_a_service_proves_its_own_isolation(remote: Target) -> None:
    """Asked over HTTP, a service looks from inside of its own boxes; the level is what it found, and runs name the guarantees."""
    async with remote.sandbox() as sandbox:
        posture = await sandbox.posture(prove=True)
        assert (posture.proved, posture.mode, posture.isolation) == (True, "remote", Isolation.NAMESPACE)
        result = await sandbox.run(Spec(content="", name="a.sh"))
        assert {"network", "memory-limit", "no-credentials"} <= set(result.guarantees)
