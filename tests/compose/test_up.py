"""The compose files brought up on a daemon, with runs through HTTP; and what becomes of values that are wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.compose.conftest import Make
from tests.compose.project import Project
from tests.engines.docker.api import Engine
from tests.engines.opensandbox import images as opensandbox_images
from tests.engines.service.archive import Layered

pytestmark = pytest.mark.timeout(600)

KEY = "key-of-the-tests"


def up(project: Project) -> Project:
    """The project, healthy."""
    done = project.up()
    assert done.returncode == 0, f"{done.stderr}\n{project.logs()}\n{project.logs('opensandbox')}"
    return project


def wait_for(look: Callable[[], str], words: str) -> None:
    """Wait until a look has these words."""
    end = time.monotonic() + 30
    while words not in (seen := look()):
        assert time.monotonic() < end, seen
        time.sleep(0.2)


def inspect(engine: Engine, project: Project, service: str = "cloche") -> dict[str, Any]:
    """A container of the project, as the daemon tells it."""
    name = project.compose("ps", "--all", "--quiet", service).stdout.strip()
    found: dict[str, Any] = engine.get(f"/containers/{name}/json")
    return found


def boxes(engine: Engine) -> list[dict[str, Any]]:
    """Containers that cloche made."""
    return _labelled(engine, "cloche.expires")


def sandboxes(engine: Engine) -> list[dict[str, Any]]:
    """Containers that an OpenSandbox server made."""
    return _labelled(engine, "opensandbox.io/id")


def _labelled(engine: Engine, label: str) -> list[dict[str, Any]]:
    query = json.dumps({"label": [label]})
    found: list[dict[str, Any]] = engine.get("/containers/json", all=1, filters=query)
    return found


def test_as_it_comes(place: Make, engine: Engine) -> None:
    """With nothing but a token the service comes up healthy, refuses each run with a reason, and ends in order."""
    project = up(place())
    assert project.ask("GET", "/healthz").status == 200
    refused = project.run("echo hello")
    assert (refused.status, refused.body["code"]) == (403, "sandbox-disabled")
    assert "CLOCHE_MODE" in refused.body["hint"]
    assert project.ask("POST", "/v1/runs", b"{}", Authorization="Bearer " + "f" * 16).status == 401
    assert project.compose("stop").returncode == 0
    assert inspect(engine, project)["State"]["ExitCode"] == 0


def test_docker(place: Make, engine: Engine, socket: dict[str, str]) -> None:
    """With the daemon's socket handed in, a run through HTTP is a container of that daemon's, and leaves none."""
    project = up(place(**socket))
    answer = project.run("cat; echo $1; echo oops >&2; exit 3", args=["there"], stdin="aGVsbG8g")
    assert answer.status == 200, answer.body
    result = answer.body
    assert (result["outcome"], result["exit_code"], result["mode"]) == ("exited", 3, "docker")
    assert (result["stdout"], result["stderr"]) == ("hello there\n", "oops\n")
    assert result["isolation"] == "container"
    assert result["fallback_from"] is None
    posture = project.ask("GET", "/v1/posture")
    assert (posture.body["mode"], posture.body["available"]) == ("docker", True)


def test_least_rights(place: Make, engine: Engine) -> None:
    """The container that runs is what the files say: no root, no capability, nothing that it could write to but /tmp."""
    found = inspect(engine, up(place()))
    assert found["Config"]["User"] == "10001:10001"
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert (host["Memory"], host["PidsLimit"]) == (2**30, 256)
    assert host["Tmpfs"] == {"/tmp": "mode=1777,size=512m"}
    assert not found["Mounts"]


def test_workspace(place: Make, socket: dict[str, str]) -> None:
    """A folder can be uploaded, though /tmp is the only place where the service has any."""
    project = up(place(**socket))
    result = project.upload({"main.sh": b"cat data/input", "data/input": b"x" * 2**20}, script="main.sh").body
    assert (result["outcome"], result["exit_code"], result["stdout_bytes"]) == ("exited", 0, 2**20)


def test_stop(place: Make, engine: Engine, socket: dict[str, str]) -> None:
    """Asked to stop, the service ends what still runs after CLOCHE_SERVE_DRAIN, removes it, and ends in order."""
    project = up(place(**socket, CLOCHE_SERVE_DRAIN="1"))
    accepted = project.run("sleep 300", prefer="respond-async")
    assert accepted.status == 202
    wait_for(lambda: str(len(boxes(engine))), "1")
    assert project.compose("stop").returncode == 0
    assert inspect(engine, project)["State"]["ExitCode"] == 0
    assert boxes(engine) == []


def with_opensandbox(place: Make, engine: Engine, image: Layered, **variables: str) -> Project:
    """A project with a server beside the service."""
    usual = {
        "COMPOSE_PROFILES": "opensandbox",
        "CLOCHE_MODE": "opensandbox",
        "CLOCHE_OPENSANDBOX_API_KEY": KEY,
        "CLOCHE_IMAGE": opensandbox_images.SANDBOX.name,
        "DOCKER_SOCKET": str(engine.path),
        "OPENSANDBOX_IMAGE": image.name,
        "OPENSANDBOX_EXECD_IMAGE": opensandbox_images.execd("current").name,
    }
    return place(**usual | variables)


def test_opensandbox(place: Make, engine: Engine, opensandbox_image: Layered) -> None:
    """With the profile, a run through HTTP is a sandbox of the server beside the service, and leaves none.

    The service has no socket, and no script reaches it, also not one with a network: its requests pass through the server.
    """
    project = up(with_opensandbox(place, engine, opensandbox_image, CLOCHE_SERVE_NETWORK="open"))
    service = inspect(engine, project)
    assert not service["Mounts"]
    answer = project.run(
        "cat; echo $1; echo oops >&2; echo made >/output/file; exit 3", args=["there"], stdin="aGVsbG8g"
    )
    assert answer.status == 200, answer.body
    result = answer.body
    assert (result["outcome"], result["exit_code"], result["mode"]) == ("exited", 3, "opensandbox")
    assert (result["stdout"], result["stderr"]) == ("hello there\n", "oops\n")
    assert [found["path"] for found in result["artifacts"]] == ["file"]
    (network,) = service["NetworkSettings"]["Networks"].values()
    result = project.run(
        f"import socket; socket.create_connection(({network['IPAddress']!r}, 8080), timeout=3)",
        interpreter="python3",
        network="open",
    ).body
    assert "TimeoutError" in result["stderr"]
    wait_for(lambda: str(len(sandboxes(engine))), "0")


def test_opensandbox_without_its_proxy(place: Make, engine: Engine, opensandbox_image: Layered) -> None:
    """Directly there is no way to the sandboxes: the run is refused with the address that the server told for one."""
    project = up(with_opensandbox(place, engine, opensandbox_image, CLOCHE_OPENSANDBOX_SERVER_PROXY="false"))
    refused = project.run("echo hello")
    assert (refused.status, refused.body["code"]) == (502, "permission-denied")
    assert "CLOCHE_SSRF_WHITELIST" in refused.body["hint"]
    wait_for(lambda: str(len(sandboxes(engine))), "0")


def test_wrong_socket(place: Make, socket: dict[str, str]) -> None:
    """A path that is no socket ends the start, and makes no folder of that name."""
    project = place(**socket)
    project.set(**socket, SERVICE_IMAGE="cloche-test/service:1", CLOCHE_SERVE_TOKENS="a:" + "0" * 16)
    done = project.compose("up", "--detach", "--pull", "never", DOCKER_SOCKET=str(project.folder / "docker.sock"))
    assert done.returncode != 0
    assert "docker.sock" in done.stderr
    assert "does not exist" in done.stderr
    assert not project.folder.joinpath("docker.sock").exists()


def test_wrong_group(place: Make, socket: dict[str, str]) -> None:
    """With a group that is not the socket's the service does not become healthy, and its log says what is missing."""
    project = place(**socket | {"DOCKER_SOCKET_GROUP": "4711"})
    assert project.up().returncode != 0
    assert "may not use the Docker daemon's socket" in project.logs()


def test_no_daemon(place: Make) -> None:
    """The mode docker without a socket does not become healthy, and the log says that none is there."""
    project = place(CLOCHE_MODE="docker")
    assert project.up().returncode != 0
    assert "There is no Docker daemon" in project.logs()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("CLOCHE_TIMEOUT", "soon", "CLOCHE_TIMEOUT='soon' is not allowed"),
        ("CLOCHE_MODE", "dokcer", "CLOCHE_MODE='dokcer' is not allowed"),
        ("WEKNORA_SANDBOX_TIMEOUT", "soon", "WEKNORA_SANDBOX_TIMEOUT='soon' is not allowed"),
        ("CLOCHE_SERVE_TOKENS", "short", "CLOCHE_SERVE_TOKENS"),
        ("CLOCHE_SERVE_TOKENS_FILE", "/nowhere", "/nowhere"),
    ],
)
def test_wrong_value(place: Make, name: str, value: str, words: str) -> None:
    """A value that is not allowed ends the service with 125, and its words name the variable and say what is."""
    # Started in the foreground; in the background the daemon starts it again and again.
    done = place(**{name: value}).compose("run", "--rm", "--no-TTY", "cloche")
    assert done.returncode == 125, done.stderr
    assert words in done.stderr
    assert "Allowed" in done.stderr or name.startswith("CLOCHE_SERVE")


def test_opensandbox_without_key(place: Make, engine: Engine, opensandbox_image: Layered) -> None:
    """The server of the profile does not start without a key, so that the service is not started either."""
    project = with_opensandbox(place, engine, opensandbox_image, CLOCHE_OPENSANDBOX_API_KEY="")
    done = project.up()
    assert done.returncode != 0
    assert "opensandbox" in done.stderr
    wait_for(lambda: project.logs("opensandbox").lower(), "api_key")


def test_opensandbox_without_socket(place: Make, engine: Engine, opensandbox_image: Layered) -> None:
    """The profile without a socket ends the start with the name of what is not set."""
    done = with_opensandbox(place, engine, opensandbox_image, DOCKER_SOCKET="").up()
    assert done.returncode != 0
    assert "DOCKER_SOCKET is not set" in done.stderr
