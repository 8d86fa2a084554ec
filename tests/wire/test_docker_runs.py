"""Runs that go well: what is asked of the daemon, in which order, and what is not."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace

import anyio
import pytest
from tests.wire.docker import BEGIN, HI, Container, Docker, frames, piece, says
from tests.wire.engine import Peer, Reply, Request, serving
from tests.wire.runs import SPEC, run, sandbox

import cloche
from cloche.isolation import Isolation
from cloche.supervisor.frames import Data, File, FileData
from cloche.testing.fake import end

pytestmark = pytest.mark.anyio

EVERYTHING = frames(
    *BEGIN,
    Data("stdout", 0, b"out"),
    Data("stderr", 0, b"err"),
    File("a/b.txt", 3, truncated=False),
    FileData(b"abc"),
    end(3, stdout=3, stderr=3),
)


async def test_result(docker: Docker) -> None:
    """A run gives the result of the frames that come out of its container, and leaves nothing on the daemon."""
    docker.play = says(EVERYTHING)
    result = await run(docker)
    assert (result.outcome, result.exit_code, result.stdout, result.stderr) == ("exited", 3, "out", "err")
    assert [(a.path, a.data) for a in result.artifacts] == [("a/b.txt", b"abc")]
    assert (result.mode, result.isolation) == ("docker", Isolation.CONTAINER)


async def test_cut_anywhere(docker: Docker) -> None:
    """However the daemon cuts the stream into packets, and a frame into pieces, the result is the same."""
    stdout = EVERYTHING[8:]
    pieces = b"".join(piece(1, stdout[at : at + 7]) for at in range(0, len(stdout), 7))
    steps: list[bytes | float] = []
    for at in range(0, len(pieces), 31):
        steps += [pieces[at : at + 31], 0.0]
    docker.play = says(*steps)
    assert (await run(docker)).stdout == "out"


async def test_order(docker: Docker) -> None:
    """A box is made, listened to, and only then started: not one of its first bytes can be lost."""
    await run(docker)
    (box,) = docker.boxes()
    about = [str(request).replace(box.name, "BOX") for request in docker.engine.requests if box.name in str(request)]
    assert about == [
        "POST /containers/BOX/attach",
        "POST /containers/BOX/start",
        "POST /containers/BOX/wait",
        "DELETE /containers/BOX",
    ]


async def test_bundle(docker: Docker) -> None:
    """The script goes in through stdin, whole; what whoever may list containers sees has nothing of it."""
    secret = "print('a secret')\n" * 5000
    await run(docker, cloche.Spec(content=secret, name="main.py", args=["another secret"], env={"TOKEN": "hush"}))
    (box,) = docker.boxes()
    assert secret.encode()[:60_000] in box.stdin
    assert b"another secret" in box.stdin
    assert b"TOKEN=hush" in box.stdin
    assert "secret" not in repr(box.body)
    assert "hush" not in repr(box.body)


async def test_large_bundle(docker: Docker) -> None:
    """A bundle that is larger than every buffer on the way arrives whole."""
    stdin = bytes(range(256)) * 4096 * 8
    result = await run(docker, cloche.Spec(content="pass", name="main.py", stdin=stdin))
    assert result.stdout == "hi"
    assert len(docker.boxes()[0].stdin) > len(stdin)


async def test_stderr_of_the_supervisor_beside_its_frames(docker: Docker) -> None:
    """What the supervisor itself writes to its stderr is not the script's output."""
    docker.play = says(piece(2, b"a remark\n"), HI, piece(2, b"another\n"))
    result = await run(docker)
    assert (result.stdout, result.stderr) == ("hi", "")


async def test_words_after_the_last_frame(docker: Docker) -> None:
    """Once the last frame is in, nothing that comes after it changes the result."""
    docker.play = says(HI, b"\x07garbage", 5.0)
    started = time.monotonic()
    assert (await run(docker)).stdout == "hi"
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("offset_s", [0.0, 86400.0, -86400.0], ids=["same", "ahead", "behind"])
async def test_labels(docker: Docker, offset_s: float) -> None:
    """A container says whose it is, and until when it may be there by the clock of the daemon, however wrong that is."""
    docker.engine.clock_offset_s = offset_s
    async with sandbox(docker) as opened:
        await opened.run(SPEC, run_id="r-one")
    (box,) = docker.boxes()
    labels = box.body["Labels"]
    assert labels["cloche.run"] == "r-one"
    assert labels["cloche.owner"] == opened.owner
    assert 30 < int(labels["cloche.expires"]) - (time.time() + offset_s) < 600


async def test_few_processes(docker: Docker) -> None:
    """A bound of processes that is too low for the engine's own start is set once the box has started."""
    await run(docker, pids=8)
    (box,) = docker.boxes()
    (update,) = docker.engine.asked(f"POST /containers/{box.name}/update")
    assert update.json() == {"PidsLimit": 8}
    order = [str(request) for request in docker.engine.requests]
    assert order.index(f"POST /containers/{box.name}/start") < order.index(str(update))


async def test_many_at_a_time(docker: Docker) -> None:
    """Runs side by side have a box each, and each gets what came out of its own."""

    async def play(container: Container) -> AsyncIterator[bytes]:
        await container.fed.wait()
        name = container.body["Labels"]["cloche.run"].encode()
        yield frames(*BEGIN, Data("stdout", 0, name), replace(end(0), stdout_bytes=len(name)))

    docker.play = play
    got: dict[str, str] = {}

    async def one(opened: cloche.Sandbox, run_id: str) -> None:
        got[run_id] = (await opened.run(SPEC, run_id=run_id)).stdout

    async with sandbox(docker, max_concurrent=20) as opened, anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(one, opened, f"r{number:02}")
    assert got == {name: name for name in got}
    assert len(got) == 20


async def test_asked_to_stop(docker: Docker) -> None:
    """A run that is cancelled is ended by its supervisor, which the daemon sends SIGTERM, and keeps what was collected."""

    async def play(container: Container) -> AsyncIterator[bytes]:
        await container.fed.wait()
        yield frames(*BEGIN, Data("stdout", 0, b"so far"))
        await container.signalled.wait()
        whole = frames(
            *BEGIN, Data("stdout", 0, b"so far"), replace(end(stdout=6), exit_code=None, signal=15, cause="cancel")
        )
        yield piece(1, whole[8:].splitlines(keepends=True)[-1])

    docker.play = play
    async with sandbox(docker) as opened, anyio.create_task_group() as group:
        events = opened.stream(SPEC, run_id="r1")
        fold = opened.fold("r1")
        async for event in events:
            fold.add(event)
            if isinstance(event, cloche.Output):
                group.start_soon(opened.cancel, "r1")
    result = fold.result()
    assert (result.outcome, result.stdout) == ("cancelled", "so far")
    (kill,) = docker.engine.asked("POST /containers/*/kill")
    assert kill.query == {"signal": "SIGTERM"}


async def test_stop_that_is_refused(docker: Docker) -> None:
    """A run whose supervisor cannot be asked is killed, and is cancelled all the same."""
    docker.engine.on("POST /containers/*/kill", Reply(500, {"message": "no"}))
    docker.play = says(frames(*BEGIN, Data("stdout", 0, b"so far")), 60.0)
    async with sandbox(docker) as opened, anyio.create_task_group() as group:
        fold = opened.fold("r1")
        async for event in opened.stream(SPEC, run_id="r1"):
            fold.add(event)
            if isinstance(event, cloche.Output):
                group.start_soon(opened.cancel, "r1")
    assert fold.result().outcome == "cancelled"


async def test_over_tcp() -> None:
    """A daemon at a port does as well as one at a socket."""
    async with serving(tcp=True) as engine:
        docker = Docker(engine)
        assert (await run(docker)).stdout == "hi"


async def test_restarted_between_two_runs(docker: Docker) -> None:
    """A daemon that was started anew between two runs is spoken to again."""
    async with sandbox(docker) as opened:
        for _ in range(2):
            assert (await opened.run(SPEC, wait_cleanup=True)).stdout == "hi"
            docker.engine.cut()
            await anyio.sleep(0.05)


async def test_result_before_removal(docker: Docker) -> None:
    """The result is handed out while the daemon still removes the container; leaving the sandbox waits for that."""
    may_go = anyio.Event()
    remove = docker.remove

    async def slowly(request: Request, peer: Peer) -> Reply:
        await may_go.wait()
        return await remove(request, peer)

    docker.engine.on("DELETE /containers/cloche-r*", slowly)
    async with sandbox(docker) as opened:
        result = await opened.run(SPEC)
        assert (result.stdout, result.timings_ms["cleanup"]) == ("hi", None)
        assert docker.containers
        may_go.set()
    assert not docker.containers
