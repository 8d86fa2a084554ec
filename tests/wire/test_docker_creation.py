"""Containers that cannot be made or started: what is said, and that nothing is left."""

from __future__ import annotations

import math

import anyio
import pytest
from tests.wire.docker import HI, IMAGE, UPGRADED, Docker, says
from tests.wire.engine import DEFAULT, Peer, Raw, Reply, Request
from tests.wire.runs import SPEC, ended, failure, prepared, sandbox

import cloche

pytestmark = pytest.mark.anyio

CREATE = "POST /containers/create"
START = "POST /containers/*/start"
NO_IMAGE = Reply(404, {"message": "No such image: sha256:1"})
MISSING = Reply(500, {"message": 'OCI runtime create failed: exec: "/bin/other": permission denied: unknown'})


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (409, "Conflict. The name is in use"),
        (400, "invalid CPU shares"),
        (500, "no space left on device"),
        (503, "node is down"),
    ],
)
async def test_refused(docker: Docker, status: int, message: str) -> None:
    """A daemon that refuses to make a container is quoted, and nothing is started."""
    await prepared(docker)
    docker.engine.on(CREATE, Reply(status, {"message": message}))
    error = await failure(docker)
    assert error.code == "backend-unavailable"
    assert message in error.message
    assert "log" in error.hint
    assert not error.retryable
    assert not docker.made


async def test_a_daemon_that_is_about_to_end(docker: Docker) -> None:
    """What a daemon does not do because it, or its containerd, is being ended may be tried again."""
    await prepared(docker)
    docker.engine.on(
        CREATE, Reply(500, {"message": "Canceled: grpc: the client connection is closing: context canceled"})
    )
    error = await failure(docker)
    assert (error.code, error.retryable) == ("backend-unavailable", True)


async def test_unknown_runtime(docker: Docker) -> None:
    """A runtime that the daemon does not have leads to the setting that names it."""
    await prepared(docker)
    docker.engine.on(CREATE, Reply(400, {"message": "unknown or invalid runtime name: kata"}))
    error = await failure(docker)
    assert error.code == "backend-unavailable"
    assert "unknown or invalid runtime name: kata" in error.message
    assert "CLOCHE_DOCKER_RUNTIME" in error.hint


async def test_image_is_gone_once(docker: Docker) -> None:
    """An image that was replaced since the daemon was asked is looked for again, and the new one is taken."""
    await prepared(docker)
    async with sandbox(docker) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"
        docker.engine.on(CREATE, NO_IMAGE, DEFAULT)
        docker.images[IMAGE] = {**docker.images[IMAGE], "Id": "sha256:2"}
        assert (await opened.run(SPEC)).stdout == "hi"
    assert [box.body["Image"] for box in docker.boxes()] == ["sha256:1", "sha256:2"]


async def test_image_is_gone_and_pulled(docker: Docker) -> None:
    """An image that was removed since the daemon was asked is pulled again, where pulling is allowed."""
    await prepared(docker)
    async with sandbox(docker, pull="missing") as opened:
        await opened.run(SPEC)
        docker.engine.on(CREATE, NO_IMAGE, DEFAULT)
        docker.pullable[IMAGE] = docker.images.pop(IMAGE)
        assert (await opened.run(SPEC)).stdout == "hi"
    assert len(docker.engine.asked("POST /images/create")) == 1


async def test_image_is_gone_for_good(docker: Docker) -> None:
    """A daemon that has an image and then has it not, twice, is image-unavailable, and may be tried again."""
    await prepared(docker)
    docker.engine.on(CREATE, NO_IMAGE)
    error = await failure(docker)
    assert (error.code, error.retryable) == ("image-unavailable", True)
    assert len(docker.engine.asked(CREATE)) == 2
    assert not docker.made


@pytest.mark.parametrize(
    "answer",
    [Raw(), Raw(b"HTTP/1.1 201 Created\r\n"), Reply(504, b"<html>"), Reply(201, b"{}")],
    ids=["cut", "head", "gateway", "no-id"],
)
async def test_answer_is_lost(docker: Docker, answer: Raw | Reply) -> None:
    """A container whose making was asked for, and not answered well, may be there all the same: it is removed by its name."""
    await prepared(docker)

    async def make(request: Request, peer: Peer) -> Raw | Reply:
        await docker.create(request, peer)
        return answer

    docker.engine.on(CREATE, make)
    error = await failure(docker)
    assert error.code == "backend-unavailable"
    assert len(docker.made) == 1


async def test_daemon_is_gone(docker: Docker) -> None:
    """A daemon that dies over making a container is backend-unavailable: nothing of the script ran, it may be repeated."""
    await prepared(docker)

    async def die(request: Request, peer: Peer) -> Raw:
        docker.engine.vanish()
        return Raw()

    docker.engine.on(CREATE, die)
    found = await ended(docker)
    assert found.error is not None
    assert (found.error.code, found.error.retryable) == ("backend-unavailable", True)


@pytest.mark.parametrize(
    "answer",
    [Reply(404, {"message": "No such container"}), Reply(200, b"what?"), Reply(500, b""), Raw()],
    ids=["gone", "no-upgrade", "error", "cut"],
)
async def test_not_attached(docker: Docker, answer: Reply | Raw) -> None:
    """A container that cannot be listened to is not started, and removed."""
    await prepared(docker)
    docker.engine.on("POST /containers/*/attach", answer)
    assert (await failure(docker)).code == "backend-unavailable"
    assert not docker.engine.asked(START)
    assert len(docker.removed) == 1


async def test_not_started(docker: Docker) -> None:
    """A container that the daemon cannot start is told in its words, and removed."""
    await prepared(docker)
    docker.engine.on(START, MISSING)
    error = await failure(docker)
    assert error.code == "backend-unavailable"
    assert "permission denied" in error.message
    assert len(docker.removed) == 1


async def test_not_started_and_not_removed(docker: Docker) -> None:
    """Where removal fails too, it is the first failure that is told."""
    await prepared(docker)
    docker.engine.on(START, MISSING)
    docker.engine.on("DELETE /containers/*", Reply(500, {"message": "device is busy"}))
    found = await ended(docker)
    assert found.error is not None
    assert "permission denied" in found.error.message


async def test_bound_not_set(docker: Docker) -> None:
    """A container whose bound of processes cannot be set is given no script."""
    await prepared(docker)
    docker.engine.on("POST /containers/*/update", Reply(500, {"message": "no pids controller"}))
    error = await failure(docker, pids=8)
    assert error.code == "backend-unavailable"
    assert "no pids controller" in error.message
    assert not docker.made[0].stdin


async def leave_at(docker: Docker, route: str) -> None:
    """Run, and go away while the daemon is at something."""
    async with sandbox(docker) as opened, anyio.create_task_group() as group:
        group.start_soon(opened.run, SPEC)
        await docker.engine.wait_for(route)
        group.cancel_scope.cancel()


@pytest.mark.parametrize("route", [CREATE, START, "POST /containers/*/attach"])
async def test_caller_leaves(docker: Docker, route: str) -> None:
    """A caller who goes away while the daemon makes, starts or attaches a container leaves none."""
    await prepared(docker)

    async def slowly(request: Request, peer: Peer) -> Raw | Reply:
        await anyio.sleep(0.2)
        if route == CREATE:
            return await docker.create(request, peer)
        return Raw(UPGRADED, 1.0) if "attach" in route else Reply(204)

    docker.engine.on(route, slowly)
    await leave_at(docker, route)
    assert len(docker.made) == len(docker.removed) == 1


async def test_killed_while_made(docker: Docker) -> None:
    """A run that is killed while its container is made is cancelled, and leaves none."""
    await prepared(docker)

    async def slowly(request: Request, peer: Peer) -> Reply:
        await anyio.sleep(0.2)
        return await docker.create(request, peer)

    docker.engine.on(CREATE, slowly)
    found: list[cloche.Result] = []

    async def one(opened: cloche.Sandbox) -> None:
        found.append(await opened.run(SPEC, run_id="r1"))

    async with sandbox(docker) as opened, anyio.create_task_group() as group:
        group.start_soon(one, opened)
        await docker.engine.wait_for(CREATE)
        assert opened.kill("r1")
    assert [result.outcome for result in found] == ["cancelled"]
    assert len(docker.made) == 1


async def test_too_slow(docker: Docker) -> None:
    """A container that does not start in time is start-timeout, and removed."""
    await prepared(docker)
    docker.engine.on(START, Raw(math.inf))
    error = await failure(docker, start_timeout=0.5)
    assert (error.code, error.retryable) == ("start-timeout", True)
    assert len(docker.removed) == 1


async def test_silent(docker: Docker) -> None:
    """So is one that starts and says nothing."""
    await prepared(docker)
    docker.play = says(60.0, HI)
    error = await failure(docker, start_timeout=0.5)
    assert error.code == "start-timeout"
    assert len(docker.removed) == 1
