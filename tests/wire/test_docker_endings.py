"""Runs whose stream ends before its time: what the daemon says of the container then decides."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from tests.wire.docker import BEGIN, HI, UPGRADED, Docker, frames, piece, says
from tests.wire.engine import Peer, Raw, Reply, Request
from tests.wire.runs import SPEC, ended, failure, run

import cloche
from cloche.supervisor.frames import Data, Fail, Hello
from cloche.testing.fake import end, ended_by

pytestmark = pytest.mark.anyio

SO_FAR = frames(*BEGIN, Data("stdout", 0, b"so far"))
EXITED = {"Running": False, "OOMKilled": False, "ExitCode": 137, "Error": ""}
RUNNING = {**EXITED, "Running": True}
OUT_OF_MEMORY = {**EXITED, "OOMKilled": True}
GONE = Reply(404, {"message": "No such container: x"})
CUTS = pytest.mark.parametrize(
    "cut", [SO_FAR, SO_FAR[:-3], SO_FAR + b"\1\0\0", SO_FAR[:20]], ids=["clean", "piece", "header", "early"]
)


@CUTS
@pytest.mark.parametrize(
    ("state", "said", "retryable"),
    [
        (EXITED, "ended with 137", False),
        ({**EXITED, "Error": "shim went away"}, "shim went away", False),
        (RUNNING, "still runs", True),
    ],
    ids=["exited", "error", "running"],
)
async def test_cut(docker: Docker, cut: bytes, state: dict[str, Any], said: str, *, retryable: bool) -> None:
    """A stream that ends too early is engine-lost, with the daemon's word; retryable if the box itself may be well."""
    docker.play = says(cut)
    docker.state = state
    error = await failure(docker)
    assert error.code == "engine-lost"
    assert said in error.message
    assert error.retryable is retryable


@CUTS
async def test_out_of_memory(docker: Docker, cut: bytes) -> None:
    """A container that ran out of memory is a result, with what came before."""
    docker.play = says(cut)
    docker.state = OUT_OF_MEMORY
    result = await run(docker)
    assert result.outcome == "out_of_memory"
    assert result.stdout in {"so far", ""}


async def test_removed_by_somebody(docker: Docker) -> None:
    """A container that somebody removed while it ran is engine-lost, and not to be repeated without a look."""
    docker.play = says(SO_FAR)
    docker.engine.on("POST /containers/*/wait", GONE)
    docker.engine.on("GET /containers/*/json", GONE)
    error = await failure(docker)
    assert (error.code, error.retryable) == ("engine-lost", False)
    assert "deleted" in error.message


@pytest.mark.parametrize("reply", [Reply(500, b"busy"), Reply(200, b"<html>"), Raw()], ids=["error", "html", "cut"])
async def test_daemon_cannot_tell(docker: Docker, reply: Reply | Raw) -> None:
    """A daemon that cannot say how the container is doing is engine-lost, and the run may be repeated."""
    docker.play = says(SO_FAR)
    docker.engine.on("GET /containers/*/json", reply)
    error = await failure(docker)
    assert (error.code, error.retryable) == ("engine-lost", True)


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"State": 7}', b'{"State": {"OOMKilled": "yes", "ExitCode": "x"}}'])
async def test_state_of_another_type(docker: Docker, body: bytes) -> None:
    """A state that cannot be read is that of a container that has ended, of which nothing is known."""
    docker.play = says(SO_FAR)
    docker.engine.on("GET /containers/*/json", Reply(body=body))
    assert (await failure(docker)).code == "engine-lost"


async def test_daemon_dies(docker: Docker) -> None:
    """A daemon that dies during a run is engine-lost, to be repeated, and the removal that failed is counted."""

    async def die(request: Request, peer: Peer) -> Raw:
        await peer.send(UPGRADED + SO_FAR)
        await anyio.sleep(0.1)
        docker.engine.vanish()
        return Raw()

    docker.engine.on("POST /containers/*/attach", die)
    found = await ended(docker)
    assert found.error is not None
    assert (found.error.code, found.error.retryable) == ("engine-lost", True)
    assert found.counters.removals_failed == 1


@pytest.mark.parametrize(
    "garbage",
    [b"\x07garbage", b"HTTP/1.1 500 oops\r\n\r\n", b"\1\1\0\0\0\0\0\1x", b"\0" * 100, b"\xff" * 100_000],
    ids=["bytes", "http", "header", "zeros", "ones"],
)
@pytest.mark.parametrize("before", [b"", SO_FAR], ids=["first", "later"])
async def test_no_stream_of_a_container(docker: Docker, before: bytes, garbage: bytes) -> None:
    """What is no stream of a container is a protocol-error, whatever came before it."""
    docker.play = says(before + garbage, 60.0)
    error = await failure(docker)
    assert error.code == "protocol-error"
    assert "stream of a container" in error.message


@pytest.mark.parametrize(
    "line",
    [b"hello\n", b"@c x\n", b"@c 7 start\n", b"@c 0 hello 99 1 0\n", b"a" * 9000, b"\n"],
    ids=["words", "no-frame", "number", "version", "long", "empty"],
)
async def test_foreign_bytes(docker: Docker, line: bytes) -> None:
    """What no supervisor of ours writes is a protocol-error."""
    docker.play = says(piece(1, line), 60.0)
    error = await failure(docker)
    assert (error.code, error.retryable) == ("protocol-error", False)


async def test_supervisor_cannot_start_the_script(docker: Docker) -> None:
    """The supervisor's own reason is the error that it names."""
    docker.play = says(frames(Hello(1, 1, 0), Fail("interpreter-missing", "There is no python3 in the box")))
    error = await failure(docker)
    assert (error.code, error.message) == ("interpreter-missing", "There is no python3 in the box.")


async def test_words_instead_of_frames(docker: Docker) -> None:
    """A container that says something on stderr and never gives a frame could not be made: its words say why."""
    docker.play = says(piece(2, b"exec /run/cloche/supervisor: "), piece(2, b"exec format error\n"))
    docker.state = {**EXITED, "ExitCode": 255}
    error = await failure(docker)
    assert error.code == "backend-unavailable"
    assert "exec /run/cloche/supervisor: exec format error" in error.message


async def test_many_words_instead_of_frames(docker: Docker) -> None:
    """Of words without an end only the beginning is kept."""
    docker.play = says(piece(2, b"no " * 100_000))
    error = await failure(docker)
    assert error.code == "backend-unavailable"
    assert len(error.message) < 5000


async def test_no_word_at_all(docker: Docker) -> None:
    """A container that ends without a word is told by its status."""
    docker.play = says()
    docker.state = {**EXITED, "ExitCode": 127}
    error = await failure(docker)
    assert error.code == "backend-unavailable"
    assert "127" in error.message


@pytest.mark.parametrize("state", [EXITED, OUT_OF_MEMORY], ids=["exited", "out-of-memory"])
async def test_died_over_its_bundle(docker: Docker, state: dict[str, Any]) -> None:
    """A container that dies before it has read its bundle resets the connection: the daemon's word decides then too."""

    async def die(request: Request, peer: Peer) -> Raw:
        peer.stop_reading()
        await peer.send(UPGRADED + piece(2, b"cannot unpack"))
        await anyio.sleep(0.1)
        return Raw()

    docker.engine.on("POST /containers/*/attach", die)
    docker.state = state
    found = await ended(docker)
    if state["OOMKilled"]:
        assert found.result is not None
        assert found.result.outcome == "out_of_memory"
    else:
        assert found.error is not None
        assert found.error.code == "backend-unavailable"
        assert "cannot unpack" in found.error.message


async def test_killed_after_a_child_was_out_of_memory(docker: Docker) -> None:
    """A container that somebody had killed is engine-lost, also when one of its processes had been out of memory before."""
    docker.play = says(SO_FAR)
    docker.state = OUT_OF_MEMORY
    docker.engine.on("GET /events", Reply(body=b'{"Type":"container","Action":"kill","id":"x"}\n'))
    assert (await failure(docker)).code == "engine-lost"


async def test_ended_by_somebody(docker: Docker) -> None:
    """A supervisor that was told to end the run, and not by us, is engine-lost: nobody here has cancelled it."""
    docker.play = says(frames(*BEGIN, ended_by(9, cause="cancel")))
    error = await failure(docker)
    assert (error.code, error.retryable) == ("engine-lost", False)


async def test_slow_word(docker: Docker) -> None:
    """The script's own end is not forgotten while the daemon takes its time to say whether memory was short."""

    async def slowly(request: Request, peer: Peer) -> Reply:
        await anyio.sleep(3)
        return Reply(body={"StatusCode": 0})

    docker.play = says(frames(*BEGIN, end(3)))
    docker.engine.on("POST /containers/*/wait", slowly)
    result = await run(docker, timeout=0.5)
    assert (result.outcome, result.exit_code) == ("exited", 3)


@pytest.mark.parametrize("killed", [False, True])
async def test_killed_for_a_reason_unseen(docker: Docker, *, killed: bool) -> None:
    """A script that SIGKILL ended, where the supervisor cannot see why, was out of memory if the daemon says so."""
    docker.play = says(frames(*BEGIN, ended_by(9)))
    docker.state = {**EXITED, "OOMKilled": killed}
    result = await run(docker)
    assert (result.outcome, result.signal) == (("out_of_memory", None) if killed else ("signaled", "SIGKILL"))


async def test_failed_script(docker: Docker) -> None:
    """A script that failed keeps its exit code, whatever becomes of the question whether it was out of memory."""
    docker.play = says(frames(*BEGIN, end(3)))
    docker.engine.on("POST /containers/*/wait", Raw())
    result = await run(docker)
    assert (result.outcome, result.exit_code) == ("exited", 3)


async def test_one_lost_run_does_not_spoil_the_next(docker: Docker) -> None:
    """After a run that was lost the same sandbox gives the next one its result."""
    async with cloche.Sandbox(docker.settings()) as sandbox:
        docker.play = says(SO_FAR)
        with pytest.raises(cloche.EngineLost):
            await sandbox.run(SPEC)
        docker.play = says(HI)
        assert (await sandbox.run(SPEC)).stdout == "hi"
    assert not docker.containers
