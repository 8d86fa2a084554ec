"""A runtime that is not known: one trial box shows which kernel it gives."""

from __future__ import annotations

import secrets
from typing import Any

import anyio
import pytest
from tests.wire.docker import BEGIN, HI, INFO, Docker, frames, piece, says
from tests.wire.engine import Peer, Reply, Request
from tests.wire.runs import SPEC, sandbox

import cloche
from cloche.backends.docker.backend import DockerBackend
from cloche.isolation import Isolation, Posture
from cloche.supervisor.frames import Data, Fail, Hello
from cloche.testing.fake import end

pytestmark = pytest.mark.anyio


def shows(kernel: str) -> bytes:
    """What comes out of a box that runs ``supervisor version``."""
    said = f"cloche-supervisor 0.1.0, kernel {kernel}\n".encode()
    return frames(*BEGIN, Data("stdout", 0, said), end(stdout=len(said)))


async def probe(docker: Docker, **settings: Any) -> Posture:
    backend = DockerBackend(docker.settings(**settings), f"o{secrets.token_hex(8)}")
    try:
        posture = await backend.probe()
    finally:
        await backend.aclose()
    assert not docker.containers
    return posture


@pytest.mark.parametrize(("kernel", "level"), [("4.19.0-gvisor", Isolation.KERNEL), ("6.1.0", Isolation.CONTAINER)])
async def test_kernel(docker: Docker, kernel: str, level: Isolation) -> None:
    """A box that sees another kernel than the engine's host is isolated by it; one that sees the same is not."""
    docker.play = says(shows(kernel))
    posture = await probe(docker, docker_runtime="runsc")
    assert posture.available
    assert posture.isolation is level
    assert kernel in posture.engine
    assert "runsc" in posture.engine
    (box,) = docker.boxes()
    assert box.body["HostConfig"]["Runtime"] == "runsc"


async def test_no_kernel_told(docker: Docker) -> None:
    """A box that tells no kernel proves nothing."""
    docker.play = says(HI)
    assert (await probe(docker, docker_runtime="runsc")).isolation is Isolation.CONTAINER


async def test_default_runtime_of_the_daemon(docker: Docker) -> None:
    """A daemon whose own default is no plain runtime is tried too, with no runtime asked for."""
    docker.engine.on("GET /info", Reply(body={**INFO, "DefaultRuntime": "kata"}))
    docker.play = says(shows("5.10.0"))
    assert (await probe(docker)).isolation is Isolation.KERNEL
    (box,) = docker.boxes()
    assert "Runtime" not in box.body["HostConfig"]


@pytest.mark.parametrize("runtime", [None, "runc", "crun"])
async def test_plain(docker: Docker, runtime: str | None) -> None:
    """A runtime of which it is known that it shares the host's kernel costs no trial box."""
    assert (await probe(docker, docker_runtime=runtime)).isolation is Isolation.CONTAINER
    assert not docker.made


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (piece(2, b"runsc: cannot find the sandbox\n"), "runsc: cannot find the sandbox"),
        (frames(Hello(1, 1, 0), Fail("isolation-unavailable", "no seccomp here")), "no seccomp here"),
        (piece(1, b"hello\n"), "a foreign line"),
        (b"\x07garbage", "stream of a container"),
        (b"", "ended with 0"),
        (frames(*BEGIN, end(1)), ""),
    ],
    ids=["words", "fail", "foreign", "garbage", "nothing", "failed"],
)
async def test_no_box_can_be_made(docker: Docker, said: bytes, reason: str) -> None:
    """Where no script can run in the trial box the mode is unavailable, with the reason, and nothing is left."""
    docker.play = says(said)
    posture = await probe(docker, docker_runtime="runsc")
    assert not posture.available
    assert reason in posture.reason
    assert posture.hint


async def test_runtime_is_not_there(docker: Docker) -> None:
    """A runtime that the daemon does not know leads to the setting that names it."""

    async def refuse(request: Request, peer: Peer) -> Reply:
        if "Runtime" in request.json()["HostConfig"]:
            return Reply(400, {"message": "unknown or invalid runtime name: nope"})
        return await docker.create(request, peer)

    docker.engine.on("POST /containers/create", refuse)
    posture = await probe(docker, docker_runtime="nope")
    assert not posture.available
    assert "nope" in posture.reason
    assert "CLOCHE_DOCKER_RUNTIME" in posture.hint


async def test_never_ready(docker: Docker) -> None:
    """A trial box that is not ready in time is a reason too, and is removed."""
    docker.play = says(60.0)
    posture = await probe(docker, docker_runtime="runsc", start_timeout=0.5)
    assert "0.5 s" in posture.reason


async def test_asked_for_by_the_floor(docker: Docker) -> None:
    """A sandbox that must have a kernel of its own opens with it, and does not without."""
    docker.play = says(shows("4.19.0-gvisor"))
    async with sandbox(docker, docker_runtime="runsc", min_isolation="kernel") as opened:
        docker.play = says(HI)
        assert (await opened.run(SPEC)).isolation == "kernel"
    async with sandbox(docker, min_isolation="kernel") as opened:
        with pytest.raises(cloche.IsolationUnavailable):
            await opened.run(SPEC)


async def test_caller_leaves(docker: Docker) -> None:
    """Who goes away while the trial box runs leaves none."""
    docker.play = says(60.0)
    async with anyio.create_task_group() as group:
        group.start_soon(probe, docker)
        group.cancel_scope.cancel()
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: probe(docker, docker_runtime="runsc"))
        await docker.engine.wait_for("POST /containers/*/start")
        await anyio.sleep(0.05)
        group.cancel_scope.cancel()
    assert not docker.containers
    assert docker.removed
