"""What the tests of the compose files and of the service's image stand on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests import daemons
from tests.compose.project import TOKEN, Project
from tests.engines.compose import images as compose_images
from tests.engines.compose.__main__ import COMPOSE
from tests.engines.docker.api import Engine
from tests.engines.docker.host import MissingError
from tests.engines.docker.images import SANDBOX
from tests.engines.opensandbox import images as opensandbox_images
from tests.engines.service import images as service_images
from tests.engines.service.__main__ import DOCKER
from tests.engines.service.archive import Layered

from cloche.testing.conformance.target import absent

Make = Callable[..., Project]


@pytest.fixture(scope="session")
def program() -> Path:
    """Docker Compose: what the environment names, else the one on the PATH."""
    found = os.environ.get(COMPOSE) or shutil.which("docker-compose")
    if not found:
        absent("compose", f"{COMPOSE} is not set, and no docker-compose is on the PATH")
        raise AssertionError
    return Path(found)


@pytest.fixture
def make(program: Path, tmp_path: Path) -> Make:
    """Lays out a project that is only looked at."""
    return lambda **variables: Project.make(program, tmp_path / "compose", **variables)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The daemon that projects are brought up on."""
    host = os.environ.get(DOCKER, "")
    if not host.startswith("unix://"):
        absent("compose", f"{DOCKER} names no socket of a daemon (make engines-docker starts one for the tests)")
    return daemons.engine(host)


@pytest.fixture(scope="session")
def service_image(engine: Engine) -> Layered:
    """The service's image, of the sources as they are, on the daemon."""
    image = service_images.service()
    try:
        image.load(Engine(engine.path))
    except MissingError as exc:
        absent("compose", f"the service's image cannot be made here: {exc}")
    return image


@pytest.fixture(scope="session")
def opensandbox_image(engine: Engine) -> Layered:
    """The OpenSandbox server's image on the daemon, and those of its sandboxes."""
    patient = Engine(engine.path)
    compose_images.SERVER.load(patient)
    for image in (opensandbox_images.SANDBOX, opensandbox_images.execd("current")):
        patient.add(image)
    return compose_images.SERVER


@pytest.fixture
def place(
    program: Path, engine: Engine, service_image: Layered, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Make]:
    """Lays out a project that is brought up: with the test's image, at any free port, and taken down in the end."""
    Engine(engine.path).add(SANDBOX)
    made: list[Project] = []

    def make(**variables: str) -> Project:
        usual = {
            "SERVICE_IMAGE": service_image.name,
            "PUBLISH": "127.0.0.1:0",
            "CLOCHE_SERVE_TOKENS": f"tests:{TOKEN}",
            "CLOCHE_IMAGE": SANDBOX.name,
            "CLOCHE_PULL": "never",
        }
        # Compose's names are of the engine: letters of the test's own make them different for tests beside each other.
        folder = tmp_path / f"t{os.getpid()}-{len(made)}"
        made.append(Project.make(program, folder, f"unix://{engine.path}", **usual | variables))
        return made[-1]

    yield make
    for project in made:
        project.down()


@pytest.fixture
def socket(engine: Engine) -> dict[str, str]:
    """What hands the daemon's socket to the service."""
    return {
        "COMPOSE_FILE": "docker-compose.yml:docker-socket.yml",
        "DOCKER_SOCKET": str(engine.path),
        "DOCKER_SOCKET_GROUP": str(engine.path.stat().st_gid),
    }
