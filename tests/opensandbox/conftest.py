"""What the tests of the opensandbox mode stand on: the service that the environment names, and what is behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import modes, services
from tests.engines.docker.api import Engine
from tests.engines.opensandbox.service import Service as Server
from tests.services import Service

from cloche.testing.conformance import Target, absent


@pytest.fixture(scope="session")
def opensandbox() -> Target:
    """The service, as the mode's settings name it."""
    return modes.ready("opensandbox")


@pytest.fixture(scope="session")
def service(opensandbox: Target) -> Service:
    """The same, past cloche."""
    del opensandbox
    found = services.find("opensandbox")
    assert found is not None
    return found


@pytest.fixture(scope="session")
def daemon(service: Service) -> Engine:
    """The daemon on which its sandboxes are."""
    if not service.docker_host:
        absent("opensandbox", "CLOCHE_TEST_OPENSANDBOX_DOCKER_HOST is not set: its sandboxes are out of reach")
    return Engine(Path(service.docker_host.removeprefix("unix://")))


@pytest.fixture(scope="session")
def server(service: Service) -> Iterator[Server]:
    """The server itself, which can be killed and started again."""
    del service
    folder = os.environ.get("CLOCHE_TEST_OPENSANDBOX_FOLDER", "")
    if not folder:
        absent("opensandbox", "CLOCHE_TEST_OPENSANDBOX_FOLDER is not set: this service cannot be stopped")
    found = Server("current", Path(folder), owned=False)
    yield found
    found.leave()
