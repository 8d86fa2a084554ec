"""What the tests of the docker mode stand on: the daemon that the environment names, and daemons of a test's own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import daemons, modes
from tests.engines.docker import images
from tests.engines.docker.api import Engine
from tests.engines.docker.daemon import Daemon
from tests.engines.docker.host import MissingError

from cloche.testing.conformance import Target, absent


@pytest.fixture(scope="session", params=["docker", "docker-old"])
def docker(request: pytest.FixtureRequest) -> Target:
    """The daemons that are shared, each in turn."""
    return modes.ready(request.param)


@pytest.fixture(scope="session", params=["docker", "docker-guest", "docker-old", "podman"])
def anywhere(request: pytest.FixtureRequest) -> Target:
    """Every daemon and runtime that is shared."""
    return modes.ready(request.param)


@pytest.fixture
def engine(docker: Target) -> Engine:
    """The same daemon, past cloche."""
    return daemons.engine(docker.environ["CLOCHE_DOCKER_HOST"])


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for a daemon: with a name that is short enough for a socket in it."""
    with tempfile.TemporaryDirectory(prefix="cloche-engines-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def daemon(folder: Path) -> Iterator[Daemon]:
    """A daemon of the test's own, which it may kill. It has the sandbox image."""
    started = private(Daemon("current", folder / "d"))
    try:
        started.add(images.SANDBOX)
        yield started
    finally:
        started.close()


def private(daemon: Daemon) -> Daemon:
    """The daemon, if it can be had here; else the test is skipped."""
    try:
        daemon.start()
    except MissingError as exc:
        absent("docker", f"a daemon of the test's own cannot be had: {exc}")
    return daemon
