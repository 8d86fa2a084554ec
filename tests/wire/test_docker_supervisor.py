"""The volume that holds the supervisor: filled once, looked into when there is a reason, filled by one at a time."""

from __future__ import annotations

import time
from typing import Any

import anyio
import pytest
from tests.wire.docker import HI, IMAGE, Docker, piece, says
from tests.wire.engine import DEFAULT, Peer, Raw, Reply, Request
from tests.wire.runs import SPEC, failure, prepared, run, sandbox

import cloche
from cloche.backends import shape
from cloche.supervisor.binary import supervisor_path

pytestmark = pytest.mark.anyio

SIZE = supervisor_path().stat().st_size
CREATE = "POST /containers/create"
PUT = "PUT /containers/cloche-fill-*/archive"
STAT = "HEAD /containers/cloche-fill-*/archive"


def volume(docker: Docker) -> str:
    """Its name."""
    (name,) = docker.volumes
    return name


def fillers(docker: Docker) -> list[dict[str, Any]]:
    return [made.body for made in docker.made if made.name.startswith("cloche-fill-")]


async def test_filled_once(docker: Docker) -> None:
    """The first run of all puts the supervisor into its volume; boxes get that volume, where nobody can write to it."""
    async with sandbox(docker) as opened:
        for _ in range(2):
            await opened.run(SPEC)
    assert docker.program_bytes == SIZE
    (put,) = docker.engine.asked(PUT)
    assert put.query == {"path": shape.SUPERVISOR_FOLDER}
    assert put.headers["content-type"] == "application/x-tar"
    (filler,) = fillers(docker)
    assert filler["HostConfig"]["NetworkMode"] == "none"
    mounts = [made.body["HostConfig"]["Mounts"] for made in docker.made]
    assert {(mount["Source"], mount["Target"]) for (mount,) in mounts} == {(volume(docker), shape.SUPERVISOR_FOLDER)}
    assert [mount["ReadOnly"] for (mount,) in mounts] == [False, True, True]
    assert not docker.engine.asked("POST /containers/cloche-fill-*/start")


async def test_young(docker: Docker) -> None:
    """A volume that was made lately is looked into: who made it may have died before it was full."""
    await run(docker)
    docker.program_bytes = 10
    await run(docker)
    assert docker.program_bytes == SIZE
    await run(docker)
    assert len(docker.engine.asked(PUT)) == 2


async def test_old(docker: Docker) -> None:
    """A volume that was made long ago is trusted, and no container is made to look into it."""
    await prepared(docker)
    await run(docker)
    assert fillers(docker) == []


async def test_made_by_the_daemon(docker: Docker) -> None:
    """A volume without cloche's labels was made by the daemon, and is empty."""
    await prepared(docker)
    docker.program_bytes = None
    docker.volumes[volume(docker)] = {}
    await run(docker)
    assert docker.program_bytes == SIZE


async def test_missing(docker: Docker) -> None:
    """Where a box cannot be started since the supervisor is missing, it is put there again, and the run succeeds.

    As the daemon does it, the streams of a container that could not be started end.
    """
    await prepared(docker)
    docker.program_bytes = None

    async def refuse(request: Request, peer: Peer) -> Reply:
        docker.containers[request.path.split("/")[2]].streams.cancel()
        return Reply(400, {"message": f'runc create failed: exec: "{shape.SUPERVISOR}": no such file or directory'})

    docker.engine.on("POST /containers/*/start", refuse, DEFAULT)
    assert (await run(docker)).stdout == "hi"
    assert docker.program_bytes == SIZE


async def test_missing_for_good(docker: Docker) -> None:
    """Where that does not help, the run is refused in the daemon's words."""
    message = f'exec: "{shape.SUPERVISOR}": permission denied'
    docker.engine.on("POST /containers/*/start", Reply(400, {"message": message}))
    error = await failure(docker)
    assert error.code == "backend-unavailable"
    assert message in error.message
    assert len(docker.engine.asked("POST /containers/*/start")) == 2


async def test_cut_short(docker: Docker) -> None:
    """A box that ends without a word is a reason to look into the volume before the next one, however old it is."""
    await prepared(docker, program_bytes=10)
    docker.play = says(piece(2, b"exec /run/cloche/supervisor: exec format error"))
    async with sandbox(docker) as opened:
        with pytest.raises(cloche.BackendUnavailable, match="exec format error"):
            await opened.run(SPEC)
        docker.play = says(HI)
        assert (await opened.run(SPEC)).stdout == "hi"
    assert docker.program_bytes == SIZE


async def test_does_not_stay(docker: Docker) -> None:
    """A daemon that takes the supervisor and then has it not is said to do so."""
    docker.engine.on(PUT, Reply())
    error = await failure(docker)
    assert error.code == "backend-unavailable"
    assert str(SIZE) in error.message
    assert "disk" in error.hint


async def test_not_taken(docker: Docker) -> None:
    """A daemon that has no room for the supervisor is quoted."""
    docker.engine.on(PUT, Reply(500, {"message": "no space left on device"}))
    error = await failure(docker)
    assert error.code == "backend-unavailable"
    assert "no space left on device" in error.message


async def test_somebody_else_fills(docker: Docker) -> None:
    """While another process fills the volume, it is waited for, and not done again."""
    await run(docker)
    (name,) = {made.name for made in docker.made if made.name.startswith("cloche-fill-")}
    labels = {"cloche_supervisor": volume(docker), "cloche_expires": str(int(time.time()) + 30)}
    docker.add(name, **labels)
    before = len(docker.engine.asked(CREATE))
    async with cloche.Sandbox(docker.settings()) as opened, anyio.create_task_group() as group:
        group.start_soon(opened.run, SPEC)
        await docker.engine.wait_for(CREATE, before + 3)
        assert name in docker.containers
        del docker.containers[name]
    assert not docker.containers
    assert len(docker.boxes()) == 2
    assert len(docker.engine.asked(PUT)) == 1


async def test_somebody_died_over_it(docker: Docker) -> None:
    """What a filler that died has left is removed, and the volume is filled."""
    await run(docker)
    (name,) = {made.name for made in docker.made if made.name.startswith("cloche-fill-")}
    docker.program_bytes = 10
    docker.add(name, cloche_supervisor=volume(docker), cloche_expires=str(int(time.time()) - 1))
    assert (await run(docker)).stdout == "hi"
    assert docker.program_bytes == SIZE


async def test_caller_leaves(docker: Docker) -> None:
    """A caller who goes away while the volume is filled leaves no filler."""

    async def slowly(request: Request, peer: Peer) -> Reply:
        await anyio.sleep(0.2)
        return await docker.create(request, peer)

    docker.engine.on(CREATE, slowly)
    async with sandbox(docker) as opened, anyio.create_task_group() as group:
        group.start_soon(opened.run, SPEC)
        await docker.engine.wait_for(CREATE)
        group.cancel_scope.cancel()


async def test_filler_stays(docker: Docker) -> None:
    """That the container through which the volume was filled cannot be removed keeps nobody from running."""
    docker.engine.on("DELETE /containers/cloche-fill-*", Reply(500, {"message": "device is busy"}))
    async with cloche.Sandbox(docker.settings()) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"


async def test_prepared(docker: Docker) -> None:
    """An open sandbox has image and supervisor ready before the first run asks for them."""
    async with sandbox(docker):
        await docker.engine.wait_for("DELETE /containers/cloche-fill-*")
    assert docker.program_bytes == SIZE
    assert docker.engine.asked(f"GET /images/{IMAGE}/json")


async def test_preparation_fails(docker: Docker, caplog: pytest.LogCaptureFixture) -> None:
    """That preparation fails is no error of anybody's who never runs anything."""
    docker.engine.on("GET /volumes/*", Raw())
    caplog.set_level("INFO", logger="cloche.runtime")
    async with sandbox(docker):
        await docker.engine.wait_for("GET /volumes/*")
        await anyio.sleep(0.05)
    assert "The Docker daemon was lost" in caplog.text
    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]
