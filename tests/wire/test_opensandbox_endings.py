"""Runs whose stream ends before its time, or brings what it should not: what the service says of the sandbox then decides."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import anyio
import pytest
from tests.wire.engine import Peer, Raw, Reply, Request
from tests.wire.kubernetes import BEGIN, FINISHED, HI, SO_FAR, chunk, frames
from tests.wire.opensandbox import (
    COMMAND,
    CUT,
    DONE,
    DOWNLOAD,
    EVENTS,
    LOOK,
    PING,
    PONG,
    PROXY,
    SANDBOXES,
    UPLOAD,
    Box,
    CutError,
    OpenSandbox,
    Step,
    Wire,
    event,
    failed,
    no,
    printed,
    says,
)
from tests.wire.opensandbox_runs import failure, run, sandbox
from tests.wire.runs import SPEC

import cloche
from cloche.backends.opensandbox import box as boxes
from cloche.backends.opensandbox import client, execd
from cloche.backends.opensandbox.events import MAX_LINE_BYTES
from cloche.supervisor.frames import Fail, Hello
from cloche.testing.fake import end, ended_by

pytestmark = pytest.mark.anyio

EVENTS_URL = f"GET {SANDBOXES}/*/diagnostics/events"


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried as often as ever, with shorter pauses between."""
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.02))
    monkeypatch.setattr(boxes, "SETTLE_S", 0.1)
    monkeypatch.setattr(boxes, "SETTLE_STEP_S", 0.02)


PART_OF_AN_EVENT = event(printed(HI.decode()))[:-30]
CUTS: dict[str, tuple[Step | CutError, ...]] = {
    "clean": (),
    "cut": (CUT,),
    "event": (Wire(PART_OF_AN_EVENT), CUT),
    "event-clean": (Wire(chunk(b'{"type":"stdout","te')),),
    "chunk": (Wire(b"ff\r\n" + b'{"type":"execution_complete"'), CUT),
    "size": (Wire(b"f"), CUT),
    "between": (Wire(event(PONG)), Wire(chunk(b"\n")), CUT),
}
CUTTING = pytest.mark.parametrize("cut", CUTS)


@CUTTING
@pytest.mark.parametrize("before", [b"", SO_FAR, HI[: HI.rindex(b"@c")]], ids=["nothing", "begun", "all-but-the-last"])
async def test_ends_too_early(service: OpenSandbox, cut: str, before: bytes) -> None:
    """A stream that ends without a last frame and without a terminal event, wherever it is cut, is engine-lost and may be
    repeated; it is never a result.
    """
    service.play = says(before, *CUTS[cut])
    error = await failure(service)
    assert (error.code, error.retryable) == ("engine-lost", True)
    assert service.made[0].id in error.message
    assert "Running" in error.message
    assert len(service.execd.asked(COMMAND)) == 1


@CUTTING
@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda box: box.ends("Failed", "exited with 137: OOM killed"), "has ended: exited with 137: OOM killed"),
        (lambda box: box.ends("Terminated", ""), "has ended: Terminated"),
        (lambda box: None, "is gone"),
    ],
    ids=["failed", "terminated", "gone"],
)
async def test_sandbox_has_ended(service: OpenSandbox, cut: str, state: Callable[[Box], object], words: str) -> None:
    """Where the sandbox itself has ended, or is not there any more, the error says so in the service's words."""

    async def play(box: Box) -> AsyncIterator[Step]:
        async for step in says(SO_FAR, *CUTS[cut])(box):
            if words == "is gone":
                service.boxes.pop(box.id, None)
            else:
                box.state, box.message = "Failed", ""
                box.streams.clear()
                state(box)
            yield step

    service.play = play
    error = await failure(service)
    assert (error.code, error.retryable) == ("engine-lost", False)
    assert words in error.message


async def test_sandbox_ends_a_little_later(service: OpenSandbox) -> None:
    """A service that sees a moment later than we that a sandbox has ended is given that moment."""

    async def play(box: Box) -> AsyncIterator[Step]:
        yield SO_FAR
        service.engine.on(
            LOOK, Reply(200, box.shown()), Reply(200, {**box.shown(), "status": {"state": "Failed", "reason": "X"}})
        )
        raise CutError

    service.play = play
    error = await failure(service)
    assert "has ended: X" in error.message


async def test_killed_by_somebody(service: OpenSandbox) -> None:
    """A sandbox that somebody deletes while its script runs is engine-lost at once, and not to be repeated without a look."""

    async def play(box: Box) -> AsyncIterator[Step]:
        yield SO_FAR
        del service.boxes[box.id]
        box.cut()
        await anyio.sleep(math.inf)

    service.play = play
    started = time.monotonic()
    error = await failure(service)
    assert (error.code, error.retryable) == ("engine-lost", False)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "word", [Raw(), Raw(b"HTTP/1.1 2"), Reply(200, b"something else")], ids=["cut", "head", "other"]
)
async def test_memory_ran_out(service: OpenSandbox, word: Reply | Raw) -> None:
    """A stream that broke with its execd, where something was killed for want of memory, is a result, with what came before."""

    async def play(_: Box) -> AsyncIterator[Step]:
        yield SO_FAR
        service.execd.on(PING, word)
        raise CutError

    service.engine.on(EVENTS_URL, Reply(body={"content": "Reason: OOMKilled"}))
    service.play = play
    result = await run(service)
    assert (result.outcome, result.stdout) == ("out_of_memory", "so far")


async def test_memory_ran_out_for_the_whole_sandbox(service: OpenSandbox) -> None:
    """The same where the sandbox itself was killed."""

    async def play(box: Box) -> AsyncIterator[Step]:
        yield SO_FAR
        box.state, box.message = "Failed", "Container exited with code 137"
        raise CutError

    service.engine.on(EVENTS_URL, Reply(body={"content": "Reason: OOMKilled"}))
    service.play = play
    assert (await run(service)).outcome == "out_of_memory"


async def test_memory_ran_out_for_somebody(service: OpenSandbox) -> None:
    """A stream that broke while execd lives did not break for want of memory, whoever lacked it: that is engine-lost."""
    service.engine.on(EVENTS_URL, Reply(body={"content": "Reason: OOMKilled"}))
    service.play = says(SO_FAR, CUT)
    error = await failure(service)
    assert (error.code, error.retryable) == ("engine-lost", True)


@pytest.mark.parametrize(
    "word",
    [Reply(200, b"[]"), Reply(200, b"<html>"), Reply(200, {"content": 7}), no(404, "X", "x"), no(500, "X", "x"), Raw()],
    ids=["list", "html", "number", "404", "500", "cut"],
)
async def test_service_does_not_know_of_memory(service: OpenSandbox, word: Reply | Raw) -> None:
    """A service that cannot say that leaves the run lost."""
    service.engine.on(EVENTS_URL, word)
    service.play = says(SO_FAR, failed("-1"))
    assert (await failure(service)).code == "engine-lost"


@pytest.mark.parametrize(
    "word", [no(500, "X", "no daemon"), no(503, "X", "busy"), Raw(), Reply(200, b"<html>")], ids=repr
)
async def test_service_cannot_tell(service: OpenSandbox, word: Reply | Raw) -> None:
    """A service that cannot say how the sandbox is doing is engine-lost, and the run may be repeated."""
    service.engine.on(LOOK, word)
    service.play = says(SO_FAR, CUT)
    error = await failure(service)
    assert (error.code, error.retryable) == ("engine-lost", True)
    assert "cannot tell why" in error.message


@pytest.mark.parametrize(
    "body", [{}, [], 7, {"id": "../x"}, {"id": "sb-other", "status": 7}, {"status": {"state": 7}}], ids=repr
)
async def test_state_of_another_form(service: OpenSandbox, body: object) -> None:
    """A sandbox that is shown as nonsense is engine-lost."""
    service.engine.on(LOOK, Reply(200, body))
    service.play = says(SO_FAR, CUT)
    assert (await failure(service)).code == "engine-lost"


# --- the command ends without a last frame ----------------------------------------------------------------------------


@pytest.mark.parametrize("before", [b"", SO_FAR], ids=["nothing", "begun"])
@pytest.mark.parametrize(
    ("last", "code", "words"),
    [
        (failed("-1", "signal: killed"), "engine-lost", "ended with -1: signal: killed"),
        (failed("3", "exit status 3"), "engine-lost", "ended with 3: exit status 3"),
        (DONE, "engine-lost", "ended with 0"),
        (failed("fork/exec /opt/cloche/supervisor: exec format error"), "backend-unavailable", "exec format error"),
        (failed("126", "exit status 126"), "backend-unavailable", "exit status 126"),
        (failed("127", "exit status 127"), "backend-unavailable", "exit status 127"),
        ({"type": "error"}, "backend-unavailable", "cannot be started"),
        ({"type": "error", "error": {"evalue": 7, "traceback": 7}}, "engine-lost", "ended with 7: 7"),
        (failed("9" * 100_000), "backend-unavailable", "9999"),
        ({"code": "RUNTIME_ERROR", "message": "no pipe"}, "backend-unavailable", "RUNTIME_ERROR: no pipe"),
    ],
    ids=["killed", "exited", "well", "prose", "126", "127", "nothing", "odd", "huge", "in-place"],
)
async def test_without_a_last_frame(
    service: OpenSandbox, before: bytes, last: Mapping[str, Any], code: str, words: str
) -> None:
    """A command that ends without a last frame is an error: of the supervisor that could not be started, or of one that went
    away; whatever its exit status, it is never a result.
    """
    service.play = says(before, last, 30.0)
    started = time.monotonic()
    error = await failure(service)
    # One that has written something was started.
    assert error.code == ("engine-lost" if before else code)
    assert (words if words != "cannot be started" or not before else "it gives no reason") in error.message
    assert ": ." not in error.message
    assert len(error.message) < 3000
    assert time.monotonic() - started < 2


async def test_words_of_the_shell(service: OpenSandbox) -> None:
    """What a shell said of a supervisor that it could not start is told, in bounds."""
    said = "bash: line 1: /opt/cloche/supervisor: Permission denied"
    service.play = says(
        printed(f"{said}\n", "stderr"), *[printed("no " * 1000, "stderr")] * 20, failed("126", "exit status 126")
    )
    error = await failure(service)
    assert error.code == "backend-unavailable"
    assert said in error.message
    assert len(error.message) < 3000


async def test_supervisor_cannot_start_the_script(service: OpenSandbox) -> None:
    """The supervisor's own reason is the error that it names."""
    service.play = says(
        frames(Hello(1, 1, 0), Fail("interpreter-missing", "There is no python3 in the box")), failed("1")
    )
    error = await failure(service)
    assert (error.code, error.message) == ("interpreter-missing", "There is no python3 in the box.")


async def test_ended_by_somebody(service: OpenSandbox) -> None:
    """A supervisor that was told to end the run, and not by us, is engine-lost: nobody here has cancelled it."""
    service.play = says(frames(*BEGIN, ended_by(15, cause="cancel")), failed("143"))
    error = await failure(service)
    assert (error.code, error.retryable) == ("engine-lost", False)


@pytest.mark.parametrize("killed", [False, True])
async def test_killed_for_a_reason_unseen(service: OpenSandbox, *, killed: bool) -> None:
    """A script that SIGKILL ended, where the supervisor cannot see why, was out of memory if the service says so."""
    service.engine.on(EVENTS_URL, Reply(body={"content": "OOMKilled" if killed else ""}))
    service.play = says(frames(*BEGIN, ended_by(9)))
    result = await run(service)
    assert (result.outcome, result.signal) == (("out_of_memory", None) if killed else ("signaled", "SIGKILL"))


async def test_failed_script_is_not_kept_waiting(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that failed has its result at once, also where its supervisor cannot see whether it lacked memory."""
    monkeypatch.setattr(boxes, "SETTLE_S", 5.0)
    service.play = says(frames(*BEGIN, end(3)), 30.0)
    started = time.monotonic()
    result = await run(service)
    assert (result.outcome, result.exit_code) == ("exited", 3)
    assert time.monotonic() - started < 2


async def test_one_lost_run_does_not_spoil_the_next(service: OpenSandbox) -> None:
    """After a run that was lost the same sandbox gives the next one its result."""
    async with sandbox(service) as opened:
        service.play = says(SO_FAR, CUT)
        with pytest.raises(cloche.EngineLost):
            await opened.run(SPEC)
        service.play = says(HI, DONE)
        assert (await opened.run(SPEC)).stdout == "hi"


# --- what is no stream of events --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [b"hello\n", b"<html>\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n", b'{"type":"stdout"\n', b"data: x\n", b"\0\n"],
    ids=["words", "html", "deep", "bytes", "half", "data", "zero"],
)
@pytest.mark.parametrize("before", [b"", SO_FAR], ids=["first", "later"])
async def test_no_event(service: OpenSandbox, line: bytes, before: bytes) -> None:
    """A line that is no JSON is a protocol-error at once, whatever came before it."""
    service.play = says(before, Wire(chunk(line)), 30.0)
    started = time.monotonic()
    error = await failure(service)
    assert (error.code, error.retryable) == ("protocol-error", False)
    assert "no stream of events" in error.message
    assert len(error.message) < 500
    assert time.monotonic() - started < 2


async def test_endless_line(service: OpenSandbox) -> None:
    """A line without an end is a protocol-error as soon as it is longer than any event."""
    sent = 0

    async def play(_: Box) -> AsyncIterator[Step]:
        nonlocal sent
        yield Wire(chunk(b'{"type":"stdout","text":"'))
        while True:
            yield Wire(chunk(bytes(65536).replace(b"\0", b"x")))
            sent += 65536

    service.play = play
    error = await failure(service)
    assert error.code == "protocol-error"
    assert sent < MAX_LINE_BYTES + 2**24  # what sockets hold


@pytest.mark.parametrize(
    "line",
    ["hello\n", "@c x\n", "@c 7 start\n", "@c 0 hello 99 1 0\n", "a" * 9000, "\n", "\u2028\ud83d\ude00", "\ud800"],
    ids=["words", "no-frame", "number", "version", "long", "empty", "other", "half"],
)
async def test_foreign_lines(service: OpenSandbox, line: str) -> None:
    """What no supervisor of ours writes is a protocol-error."""
    service.play = says(printed(line), 30.0)
    error = await failure(service)
    assert (error.code, error.retryable) == ("protocol-error", False)


@pytest.mark.parametrize("text", [7, None, ["x"], {}], ids=repr)
async def test_text_of_another_type(service: OpenSandbox, text: object) -> None:
    """A line of output that is no text is an empty one, which no supervisor writes."""
    service.play = says(SO_FAR, {"type": "stdout", "text": text}, 30.0)
    assert (await failure(service)).code == "protocol-error"


@pytest.mark.parametrize(
    "raw",
    [
        Raw(),
        Raw(b"SSH-2.0-x\r\n"),
        Raw(b"HTTP/1.1 200 OK\r\n"),
        Raw(EVENTS, b"zz\r\n"),
        Raw(EVENTS, FINISHED),
        Raw(EVENTS),
    ],
    ids=["cut", "ssh", "head", "chunk", "empty", "nothing"],
)
async def test_no_stream(service: OpenSandbox, raw: Raw) -> None:
    """A command whose answer never becomes a stream is engine-lost: it may have run."""
    service.execd.on(COMMAND, raw)
    error = await failure(service)
    assert (error.code, error.retryable) == ("engine-lost", True)
    assert len(service.execd.asked(COMMAND)) == 1


# --- time -------------------------------------------------------------------------------------------------------------


def test_dead_stream_is_found_in_time() -> None:
    """A stream that brings nothing is dead after less than 15 s, and not before several signs of life were due."""
    assert 3 * 3 < execd.DEAD_S < 15


@pytest.mark.parametrize("said", [b"", SO_FAR], ids=["nothing", "begun"])
async def test_silent(service: OpenSandbox, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """An execd that sends nothing any more, not even signs of life, is engine-lost soon."""
    monkeypatch.setattr(execd, "DEAD_S", 0.5)
    service.play = says(said, math.inf)
    started = time.monotonic()
    error = await failure(service)
    assert (error.code, error.retryable) == ("engine-lost", True)
    assert 0.4 < time.monotonic() - started < 3


async def pinging(_: Box) -> AsyncIterator[Step]:
    yield SO_FAR
    while True:
        yield PONG
        await anyio.sleep(0.05)


async def test_signs_of_life(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that says nothing for long is not lost as long as execd sends signs of life; at its limit it is timed out."""
    monkeypatch.setattr(execd, "DEAD_S", 0.5)
    service.play = pinging
    started = time.monotonic()
    result = await run(service, SPEC.model_copy(update={"timeout": 1.0}))
    assert (result.outcome, result.stdout) == ("timed_out", "so far")
    assert 1.0 < time.monotonic() - started < 5


async def test_flood_of_signs_of_life(service: OpenSandbox) -> None:
    """Signs of life without a pause do not keep a run from its limit, nor other runs from theirs."""

    async def flood(box: Box) -> AsyncIterator[Step]:
        if box.metadata["cloche-run"] == "r2":
            yield HI
            return
        yield SO_FAR
        while True:
            yield Wire(event(PONG) * 200)

    service.play = flood
    results: dict[str, cloche.Result] = {}

    async def one(run_id: str, limit_s: float) -> None:
        results[run_id] = await opened.run(SPEC.model_copy(update={"timeout": limit_s}), run_id=run_id)

    started = time.monotonic()
    async with sandbox(service) as opened, anyio.create_task_group() as group:
        group.start_soon(one, "r1", 0.5)
        group.start_soon(one, "r2", 10.0)
    assert (results["r1"].outcome, results["r2"].stdout) == ("timed_out", "hi")
    assert time.monotonic() - started < 6


async def test_signs_of_life_and_no_start(service: OpenSandbox) -> None:
    """A supervisor that never says that the script has started is start-timeout, however lively its stream is."""

    async def lively(box: Box) -> AsyncIterator[Step]:
        async for step in pinging(box):
            if step is PONG:
                yield step

    service.play = lively
    started = time.monotonic()
    error = await failure(service, start_timeout=0.7)
    assert (error.code, error.retryable) == ("start-timeout", True)
    assert time.monotonic() - started < 3


async def test_service_hangs_when_time_is_over(service: OpenSandbox) -> None:
    """A run whose time is over is timed out also where the service says nothing any more."""

    async def play(_: Box) -> AsyncIterator[Step]:
        yield SO_FAR
        service.engine.on(LOOK, Raw(math.inf))
        await anyio.sleep(math.inf)

    service.play = play
    result = await run(service, SPEC.model_copy(update={"timeout": 0.3}))
    assert (result.outcome, result.stdout) == ("timed_out", "so far")


# --- feeding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "code", "words"),
    [
        (no(500, "RUNTIME_ERROR", "write: no space left on device"), "backend-unavailable", "no space left"),
        (Reply(413, b"<html>Request Entity Too Large</html>"), "backend-unavailable", "Too Large"),
        (no(400, "INVALID_FILE_METADATA", "metadata file is missing"), "backend-unavailable", "metadata file"),
        (Reply(401, {"error": "Unauthorized"}), "permission-denied", "does not know its token"),
        (Reply(302, b"", {"Location": "http://127.0.0.1:1/"}), "backend-unavailable", "302"),
    ],
    ids=["500", "413", "400", "401", "302"],
)
async def test_upload_is_refused(service: OpenSandbox, word: Reply, code: str, words: str) -> None:
    """An execd that does not take the supervisor is an error with its words; no command is asked for but who execd runs as."""
    service.execd.on(UPLOAD, word)
    error = await failure(service)
    assert error.code == code
    assert words in error.message
    assert all(request.json().get("command") == "id -u" for request in service.execd.asked(COMMAND))


async def test_image_with_a_user(service: OpenSandbox) -> None:
    """An image that starts as somebody else than root is isolation-unavailable, and the hint speaks of the image."""

    def users(box: Box) -> None:
        box.uid = 1000

    service.places = users
    error = await failure(service)
    assert error.code == "isolation-unavailable"
    assert "uid 1000" in error.message
    assert "USER" in error.hint
    assert [request.json() for request in service.execd.asked(COMMAND)] == [{"command": "id -u", "timeout": 5000}]


@pytest.mark.parametrize(
    "answer",
    [
        says(b"0\n", DONE),
        says(b"who?\n", DONE),
        says(CUT),
        says(Wire(chunk(b"<html>\n"))),
        says(b"9" * 5000 + b"\n", DONE),
    ],
    ids=["root", "words", "cut", "html", "long"],
)
async def test_who_is_not_told(service: OpenSandbox, answer: Callable[[Box], AsyncIterator[Step]]) -> None:
    """Where execd is root, or does not say who it is, its words about the upload are the error."""

    async def command(request: Request, peer: Peer) -> Raw:
        await peer.send(EVENTS)
        try:
            async for step in answer(service.made[0]):
                data = step if isinstance(step, bytes) else b""
                await peer.send(
                    step.data if isinstance(step, Wire) else event(printed(data.decode()) if data else DONE)
                )
            await peer.send(FINISHED)
        except CutError:
            pass
        return Raw()

    service.execd.on(UPLOAD, no(500, "RUNTIME_ERROR", "no space left"))
    service.execd.on(COMMAND, command)
    error = await failure(service)
    assert error.code == "backend-unavailable"
    assert "no space left" in error.message


@pytest.mark.parametrize("route", [DOWNLOAD, UPLOAD])
@pytest.mark.parametrize("raw", [Raw(), Raw(b"HTTP/1.1 200 OK\r\nContent-Le")], ids=["cut", "head"])
async def test_lost_over_feeding(service: OpenSandbox, route: str, raw: Raw) -> None:
    """A connection that breaks while a sandbox is fed is backend-unavailable, to be repeated: nothing of the script ran."""
    service.execd.on(route, raw)
    error = await failure(service)
    assert (error.code, error.retryable) == ("backend-unavailable", True)
    assert not service.execd.asked(COMMAND)


@pytest.mark.parametrize("how", ["failed", "gone"])
async def test_dies_over_feeding(service: OpenSandbox, how: str) -> None:
    """A sandbox that dies while it is fed is an error that says so, and no command is asked for."""

    async def die(request: Request, peer: Peer) -> Raw:
        (box,) = service.made
        if how == "gone":
            del service.boxes[box.id]
        else:
            box.ends("Failed", "killed by its node")
        return Raw()

    service.execd.on(UPLOAD, die)
    error = await failure(service)
    assert error.code == "engine-lost"
    assert ("killed by its node" if how == "failed" else "is gone") in error.message
    assert not service.execd.asked(COMMAND)


async def test_upload_that_nobody_takes(service: OpenSandbox) -> None:
    """An execd that does not answer an upload is start-timeout when the start is overdue."""
    service.execd.on(UPLOAD, Raw(math.inf))
    started = time.monotonic()
    error = await failure(service, start_timeout=0.7)
    assert (error.code, error.retryable) == ("start-timeout", True)
    assert time.monotonic() - started < 2


async def test_token_is_not_the_one(service: OpenSandbox) -> None:
    """An execd that does not know the sandbox's token is another sandbox's: it is given nothing, and the hint says why."""
    for path in ("", PROXY):
        service.execd.on(f"GET {path}/ping", Reply(401, {"error": "Unauthorized"}))
    error = await failure(service)
    assert error.code == "permission-denied"
    assert "bridge" in error.hint
    assert [str(request) for request in service.to_execd()] == [PING, f"GET {PROXY}/ping"]
