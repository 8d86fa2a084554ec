"""What answers at the daemon's address, and what is said to a user for whom it does not work."""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest
from tests.wire.docker import INFO, VERSION, Docker
from tests.wire.engine import Engine, Raw, Reply, serving

import cloche
from cloche.backends.docker.backend import DockerBackend
from cloche.isolation import Isolation, Posture, State

pytestmark = pytest.mark.anyio

HTML = b"<html><body><h1>It works!</h1></body></html>"


async def probe(settings: cloche.Settings) -> Posture:
    backend = DockerBackend(settings, f"o{secrets.token_hex(8)}")
    try:
        return await backend.probe()
    finally:
        await backend.aclose()


async def refusal(docker: Docker, **settings: Any) -> Posture:
    """The posture of a daemon that cannot be used."""
    posture = await probe(docker.settings(**settings))
    assert not posture.available
    assert posture.isolation is Isolation.NONE
    assert posture.reason.endswith(".")
    assert posture.hint.endswith(".")
    return posture


async def test_good(docker: Docker) -> None:
    """A daemon in good order is a container's isolation, by the engine that it says it is."""
    posture = await probe(docker.settings())
    assert posture.available
    assert (posture.isolation, posture.engine, posture.reason) == (Isolation.CONTAINER, "Docker 28.3.0", "")
    assert all(g.state is not State.NOT_IN_FORCE for g in posture.guarantees if g.name != "user-namespace")


@pytest.mark.parametrize(
    "body",
    [
        HTML,
        b"",
        b"[]",
        b'"x"',
        b"null",
        b"{}",
        b'{"ApiVersion": 1.41}',
        b'{"ApiVersion": "x"}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
    ids=["html", "empty", "list", "text", "null", "object", "number", "word", "bytes", "deep"],
)
async def test_no_docker(docker: Docker, body: bytes) -> None:
    """Something else that answers with 200 is said to be no Docker daemon, and what to check."""
    docker.engine.on("GET /version", Reply(body=body))
    posture = await refusal(docker)
    assert posture.reason == f"What answers at {docker.engine.address} is no Docker daemon."
    assert "DOCKER_HOST" in posture.hint


@pytest.mark.parametrize("status", [404, 302, 500, 503])
async def test_error(docker: Docker, status: int) -> None:
    """Something that answers with an error is named with its status and its words."""
    docker.engine.on("GET /version", Reply(status, HTML))
    posture = await refusal(docker)
    assert f"status {status}" in posture.reason
    assert "It works!" in posture.reason
    assert "DOCKER_HOST" in posture.hint


@pytest.mark.parametrize("status", [401, 403])
async def test_not_allowed(docker: Docker, status: int) -> None:
    """A daemon, or what guards it, that refuses cloche is told from one that is not there."""
    docker.engine.on("GET /version", Reply(status, {"message": "authorization denied by plugin opa"}))
    posture = await refusal(docker)
    assert "refuses cloche: authorization denied by plugin opa" in posture.reason
    assert "authorization plugin" in posture.hint


async def test_wants_tls(docker: Docker) -> None:
    """A daemon that answers plain HTTP with Go's sentence about TLS wants TLS, and the hint says how."""
    docker.engine.on("GET /version", Reply(400, b"Client sent an HTTP request to an HTTPS server.\n"))
    posture = await refusal(docker)
    assert "wants TLS" in posture.reason
    assert "DOCKER_TLS_VERIFY=1" in posture.hint


async def test_has_no_tls() -> None:
    """A daemon without TLS to which cloche speaks it is said to be so."""
    async with serving(tcp=True) as engine:
        posture = await refusal(Docker(engine), docker_host=engine.address.replace("tcp:", "https:"))
    assert "could not agree on TLS" in posture.reason
    assert "unset both for a daemon without TLS" in posture.hint


async def test_nobody_there() -> None:
    """A port at which nobody listens, and a socket that is not there, are told apart, with how to start a daemon."""
    async with serving(tcp=True) as engine:
        pass
    posture = await refusal(Docker(engine))
    assert posture.reason == f"No Docker daemon listens at {engine.address}."
    assert "systemctl start docker" in posture.hint
    posture = await refusal(Docker(engine), docker_host="unix:///nonexistent/docker.sock")
    assert posture.reason == "There is no Docker daemon: the socket /nonexistent/docker.sock is not there."


@pytest.mark.parametrize("path", ["/version", "/info"])
@pytest.mark.parametrize(
    "raw", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"], ids=["cut", "ssh", "part"]
)
async def test_no_answer(docker: Docker, path: str, raw: bytes) -> None:
    """Something that cuts the connection or speaks no HTTP gives no answer that a daemon would give."""
    docker.engine.on(f"GET {path}", Raw(raw))
    posture = await refusal(docker)
    assert "gives no answer that a Docker daemon would give" in posture.reason
    assert "TLS" in posture.hint


@pytest.mark.parametrize(
    ("found", "reason", "hint"),
    [
        ({"ApiVersion": "1.39"}, "Docker 28.3.0 speaks the API 1.39 at most; cloche needs 1.40.", "19.03"),
        ({"Os": "windows"}, "The Docker daemon runs windows containers.", "Linux containers"),
        ({"Arch": "riscv64"}, "There is no supervisor for the architecture riscv64.", "x86_64 or aarch64"),
    ],
    ids=["old", "windows", "architecture"],
)
async def test_of_another_kind(docker: Docker, found: dict[str, str], reason: str, hint: str) -> None:
    """A daemon that is too old, or runs containers of another kind, is told from one that is broken."""
    docker.engine.on("GET /version", Reply(body={**VERSION, **found}))
    posture = await refusal(docker)
    assert posture.reason == reason
    assert hint in posture.hint


@pytest.mark.parametrize(
    ("api", "oldest", "spoken"),
    [
        ("1.41", "1.12", "1.41"),
        ("1.56", "1.44", "1.56"),
        ("1.99", "1.44", "1.56"),
        ("2.3", "1.60", "1.60"),
        ("1.40", None, "1.40"),
    ],
)
async def test_spoken_api(docker: Docker, api: str, oldest: str | None, spoken: str) -> None:
    """A daemon is spoken to in the newest version of the API that both know, whatever path is asked for."""
    docker.engine.on("GET /version", Reply(body={**VERSION, "ApiVersion": api, "MinAPIVersion": oldest}))
    assert (await probe(docker.settings())).available
    targets = [request.target for request in docker.engine.requests]
    assert targets[0] == "/version"
    assert all(target.startswith(f"/v{spoken}/") for target in targets[1:])


@pytest.mark.parametrize("value", [None, 7, -1, "x", True, [], [None, 7, {}], {}, {"a": None}, 1e300], ids=repr)
async def test_fields_of_another_type(docker: Docker, value: Any) -> None:
    """Fields of a type that was not agreed on count as not said, also where a box is made from them."""
    docker.engine.on(
        "GET /version",
        Reply(body={**dict.fromkeys(VERSION, value), "ApiVersion": "1.41", "Arch": VERSION["Arch"], "Os": "linux"}),
    )
    docker.engine.on("GET /info", Reply(body={**dict.fromkeys(INFO, value), "DefaultRuntime": "runc"}))
    async with cloche.Sandbox(docker.settings()) as sandbox:
        result = await sandbox.run(cloche.Spec(content="pass", name="main.py"))
    assert result.stdout == "hi"


@pytest.mark.parametrize("body", [b"[]", b"null", b"7"])
async def test_info_of_another_type(docker: Docker, body: bytes) -> None:
    """A daemon that says nothing of its host can be used."""
    docker.engine.on("GET /info", Reply(body=body))
    assert (await probe(docker.settings())).available


async def test_missing_limits(docker: Docker) -> None:
    """Limits that the daemon says it cannot set are not promised, and advice says what to do."""
    docker.engine.on("GET /info", Reply(body={**INFO, "MemoryLimit": False, "PidsLimit": False, "CpuCfsQuota": False}))
    posture = await probe(docker.settings())
    missing = {g.name for g in posture.guarantees if g.state is State.NOT_IN_FORCE and g.advice}
    assert missing >= {"memory-limit", "process-limit", "cpu-limit"}


async def test_podman(docker: Docker) -> None:
    """Podman is called by its name."""
    docker.engine.on(
        "GET /version", Reply(body={**VERSION, "Version": "5.4.0", "Components": [7, {"Name": "Podman Engine"}]})
    )
    assert (await probe(docker.settings())).engine == "Podman 5.4.0"


async def test_told_on_entering(engine: Engine) -> None:
    """A sandbox that may not fall back raises what the probe found, with its hint."""
    docker = Docker(engine)
    engine.on("GET /version", Reply(body=json.dumps([]).encode()))
    with pytest.raises(cloche.BackendUnavailable, match="is no Docker daemon") as caught:
        async with cloche.Sandbox(docker.settings()):
            pass
    assert "DOCKER_HOST" in caught.value.hint
