"""Removing a container, whatever the daemon says to it."""

from __future__ import annotations

import pytest
from tests.wire.docker import Docker
from tests.wire.engine import DEFAULT, Raw, Reply
from tests.wire.runs import SPEC, ended, run, sandbox

import cloche
from cloche.backends.docker.backend import REMOVE_AGAIN_S

pytestmark = pytest.mark.anyio

DELETE = "DELETE /containers/cloche-r*"
UNDER_WAY = Reply(409, {"message": "removal of container cloche-r1 is already in progress"})
GONE = Reply(404, {"message": "No such container: cloche-r1"})


async def test_asked_for(docker: Docker) -> None:
    """A container is removed by the name that it was made with, killed if it runs, and its anonymous volumes with it."""
    await run(docker)
    (request,) = docker.engine.asked(DELETE)
    assert request.path == f"/containers/{docker.boxes()[0].name}"
    assert request.query == {"force": "true", "v": "true"}


@pytest.mark.parametrize("at_last", [GONE, DEFAULT], ids=["gone", "removed"])
async def test_under_way(docker: Docker, at_last: Reply) -> None:
    """A removal that is under way already is waited for."""
    docker.engine.on(DELETE, UNDER_WAY, UNDER_WAY, at_last)
    found = await ended(docker)
    assert found.result is not None
    assert found.counters.removals_failed == 0
    assert len(docker.engine.asked(DELETE)) == 3


async def test_gone(docker: Docker) -> None:
    """That a container is gone already is fine."""
    docker.engine.on(DELETE, GONE)
    assert (await ended(docker)).counters.removals_failed == 0


@pytest.mark.parametrize(
    "answer",
    [Reply(500, {"message": "device is busy"}), Reply(409, {"message": "no"}), Raw()],
    ids=["busy", "conflict", "cut"],
)
@pytest.mark.parametrize("wait_cleanup", [False, True])
async def test_fails(docker: Docker, answer: Reply | Raw, *, wait_cleanup: bool) -> None:
    """A removal that fails does not take the result away; it is counted."""
    docker.engine.on(DELETE, answer)
    async with cloche.Sandbox(docker.settings()) as opened:
        result = await opened.run(SPEC, wait_cleanup=wait_cleanup)
    assert result.stdout == "hi"
    assert opened.counters.removals_failed == 1


async def test_left_to_the_next_sandbox(docker: Docker) -> None:
    """What could not be removed is removed by the next sandbox, once its owner is gone."""
    asked = 1 + len(REMOVE_AGAIN_S)
    docker.engine.on(DELETE, *[Reply(500, {"message": "device is busy"})] * asked, DEFAULT)
    assert (await ended(docker)).counters.removals_failed == 1
    (left,) = docker.containers.values()
    async with sandbox(docker) as opened:
        await opened.run(SPEC)
        await docker.engine.wait_for(f"DELETE /containers/{left.name}")
    assert opened.counters.swept == 1
