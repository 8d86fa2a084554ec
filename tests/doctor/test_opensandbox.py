"""The doctor before a real OpenSandbox service: healthy, and one whose daemon weakens each sandbox."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.doctor import meddler
from tests.doctor.ask import broken, doctor, states
from tests.doctor.meddler import Change, host_config, meddling
from tests.engines.opensandbox.service import Service
from tests.modes import ready
from tests.supervisor.harness import public_folder

from cloche.testing.conformance import Target, absent

WEAK: Mapping[str, tuple[Change, set[str], str]] = {
    **meddler.WEAK,
    "privileged": (host_config(Privileged=True), {"devices", "kernel-files"}, "namespace"),
}
"""What is changed behind the service's back, what the doctor then finds broken, and the level that is left."""


@pytest.fixture(scope="module")
def healthy() -> Target:
    return ready("opensandbox")


@pytest.fixture
def server(healthy: Target) -> Iterator[Service]:
    """The server, whose daemon a test may change; in the end it has its own again."""
    del healthy
    folder = os.environ.get("CLOCHE_TEST_OPENSANDBOX_FOLDER", "")
    if not folder:
        absent("opensandbox", "CLOCHE_TEST_OPENSANDBOX_FOLDER is not set: this service cannot be started anew")
    found = Service("current", Path(folder), owned=False)
    try:
        yield found
    finally:
        found.kill_server()
        found.start_server()
        found.leave()


@pytest.fixture
def folder() -> Iterator[Path]:
    with public_folder() as path:
        yield path


def test_healthy(healthy: Target) -> None:
    """What cloche can do there is in force; what the service does not give is said, and is no broken promise."""
    status, report = doctor("opensandbox", settings=healthy.environ)
    assert broken(report) == set()
    assert (status, report["ok"], report["level"]) == (0, True, "container")
    found = states(report)
    assert (found["socket-filter"], found["network"]) == ("in-force", "in-force")
    assert found["network-policy"] == "not-in-force", "sandboxes of one service reach each other"
    assert (found["read-only-root"], found["disk-limit"]) == ("not-in-force", "not-in-force")


@pytest.mark.parametrize("name", WEAK)
def test_weakened(healthy: Target, server: Service, folder: Path, name: str) -> None:
    """One thing is changed on the way from the service to its daemon: that is found, and nothing else."""
    change, expected, level = WEAK[name]
    with meddling(server.host, folder, change) as host:
        server.kill_server()
        server.start_server(daemon=host)
        status, report = doctor("opensandbox", settings=healthy.environ)
        server.kill_server()
    assert report["error"] is None, report["error"]
    found = broken(report)
    assert found == expected, [g for g in report["guarantees"] if g["name"] in found ^ expected]
    assert (status, report["ok"], report["level"]) == (1, False, level)


def test_a_key_that_is_not_taken(healthy: Target) -> None:
    """The service refuses it: the doctor says which step of the way that is."""
    status, report = doctor("opensandbox", settings={**healthy.environ, "CLOCHE_OPENSANDBOX_API_KEY": "another"})
    assert (status, report["ok"]) == (125, False)
    assert [check["name"] for check in report["checks"] if check["verdict"] == "not-ok"] == ["service"]
