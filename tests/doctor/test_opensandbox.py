"""The doctor before a real OpenSandbox service."""

from __future__ import annotations

import pytest
from tests.doctor.ask import broken, doctor, states
from tests.modes import ready

from cloche.testing.conformance import Target


@pytest.fixture(scope="module")
def healthy() -> Target:
    return ready("opensandbox")


def test_healthy(healthy: Target) -> None:
    """What cloche can do there is in force; what the service does not give is said, and is no broken promise."""
    status, report = doctor("opensandbox", settings=healthy.environ)
    assert broken(report) == set()
    assert (status, report["ok"], report["level"]) == (0, True, "container")
    found = states(report)
    assert (found["socket-filter"], found["network"]) == ("in-force", "in-force")
    assert found["network-policy"] == "not-in-force", "sandboxes of one service reach each other"
    assert (found["read-only-root"], found["disk-limit"]) == ("not-in-force", "not-in-force")


def test_a_key_that_is_not_taken(healthy: Target) -> None:
    """The service refuses it: the doctor says which step of the way that is."""
    status, report = doctor("opensandbox", settings={**healthy.environ, "CLOCHE_OPENSANDBOX_API_KEY": "another"})
    assert (status, report["ok"]) == (125, False)
    assert [check["name"] for check in report["checks"] if check["verdict"] == "not-ok"] == ["service"]
