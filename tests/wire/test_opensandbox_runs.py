"""Runs that go well: what is asked of the service and of execd, in which order, with what, and what is not."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import anyio
import pytest
from tests.wire.engine import DEFAULT, Peer, Raw, Reply, Request
from tests.wire.kubernetes import BEGIN, HI, chunk, frames
from tests.wire.opensandbox import (
    A_RUN,
    COMMAND,
    CREATE,
    DELETE,
    DONE,
    DOWNLOAD,
    ENDPOINT,
    INSIDE,
    INTERRUPT,
    KEY,
    LIST,
    PING,
    PONG,
    UPLOAD,
    Box,
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
from tests.wire.runs import SPEC, wait_until

import cloche
from cloche.backends.opensandbox import backend, manifest
from cloche.isolation import Isolation
from cloche.supervisor.frames import Data, File, FileData
from cloche.testing.fake import end, ended_by

pytestmark = pytest.mark.anyio

EVERYTHING = frames(
    *BEGIN,
    Data("stdout", 0, b"out"),
    Data("stderr", 0, b"err"),
    File("a/b.txt", 3, truncated=False),
    FileData(b"abc"),
    end(3, stdout=3, stderr=3),
)
CANCELLED = frames(*BEGIN, Data("stdout", 0, b"so far"), ended_by(15, "cancel", stdout=6))
SO_FAR = b"".join(CANCELLED.splitlines(keepends=True)[:-1])
GENERATIONS = pytest.mark.parametrize("old", [False, True], ids=["current", "old"])


@GENERATIONS
async def test_result(service: OpenSandbox, *, old: bool) -> None:
    """A run gives the result of the frames that its command prints, in whichever way execd sends lines, and leaves nothing."""
    service.old = old
    service.play = says(EVERYTHING, failed("3", "exit status 3"))
    result = await run(service)
    assert (result.outcome, result.exit_code, result.stdout, result.stderr) == ("exited", 3, "out", "err")
    assert [(a.path, a.data) for a in result.artifacts] == [("a/b.txt", b"abc")]
    assert (result.mode, result.isolation) == ("opensandbox", Isolation.CONTAINER)


@pytest.mark.parametrize("size", [1, 7, 500])
async def test_cut_anywhere(service: OpenSandbox, size: int) -> None:
    """However the stream is cut into chunks, the result is the same."""
    lines = [json.dumps(printed(line.decode())) for line in EVERYTHING.splitlines(keepends=True)]
    body = "\n\n".join([*lines, json.dumps(DONE), ""]).encode()
    service.play = says(*(Wire(chunk(body[at : at + size])) for at in range(0, len(body), size)))
    assert (await run(service)).stdout == "out"


@pytest.mark.parametrize("prefix", ["data: ", "data:", ": x\nevent: stdout\nid: 7\nretry: 5\ndata: "])
@pytest.mark.parametrize("ending", ["\n\n", "\r\n\r\n", "\n"])
async def test_server_sent_events(service: OpenSandbox, prefix: str, ending: str) -> None:
    """Events that come as those of a browser's event stream, or with other ends of lines, are the same events."""
    lines = [json.dumps(printed(line.decode())) for line in HI.splitlines(keepends=True)]
    body = "".join(f"{prefix}{line}{ending}" for line in [*lines, json.dumps(DONE)])
    service.play = says(Wire(chunk(body.encode())))
    assert (await run(service)).stdout == "hi"


async def test_other_events(service: OpenSandbox) -> None:
    """Events of kinds that nobody asked for, signs of life, and what the supervisor's own stderr says, are no output."""
    others: list[dict[str, Any]] = [
        {"type": "result", "results": {}},
        {"type": 7},
        {},
        {"type": "stdout2", "text": "x"},
    ]
    service.play = says(PONG, *others, printed("a remark\n", "stderr"), HI, PONG, DONE)
    result = await run(service)
    assert (result.stdout, result.stderr) == ("hi", "")


# --- what is asked ----------------------------------------------------------------------------------------------------


async def test_requests_of_a_run(service: OpenSandbox) -> None:
    """A healthy run makes eight requests, in this order: nothing is polled, and nobody asks for the sandbox's state."""
    async with sandbox(service) as opened:
        for _ in range(3):
            before = len(service.asked())
            await opened.run(SPEC, wait_cleanup=True)
            assert service.asked()[before:] == A_RUN


async def test_requests_of_a_sandbox(service: OpenSandbox) -> None:
    """Opening a sandbox asks whether the service is well, whether it takes the key, what it is, and for leftovers."""
    async with sandbox(service):
        before = len(service.asked())
        await anyio.sleep(0.3)
        assert len(service.asked()) == before
    health, key, version, leftovers = service.asked()
    assert (health, version, leftovers) == ("GET /health", "GET /version", LIST)
    assert key.startswith("GET /v1/sandboxes/none-")


@pytest.mark.parametrize("offset_s", [0.0, 86400.0, -86400.0], ids=["same", "ahead", "behind"])
async def test_body(service: OpenSandbox, offset_s: float, place: str) -> None:
    """A sandbox is asked for with its limits as strings, a lifetime, whose it is, and until when by the service's clock."""
    service.engine.clock_offset_s = offset_s
    async with sandbox(service, image="box:1", memory="100Mi", cpus=0.5, timeout=30, start_timeout=40) as opened:
        await opened.run(SPEC.model_copy(update={"timeout": None}), run_id="r-one")
    (box,) = service.made
    body, metadata = box.body, box.metadata
    assert body["image"] == {"uri": "box:1"}
    assert body["entrypoint"] == ["tail", "-f", "/dev/null"]
    assert body["timeout"] == pytest.approx(30 + 40 + 60, abs=3)
    assert isinstance(body["timeout"], int)
    assert body["resourceLimits"]["cpu"] == "500m"
    assert 100 * 1024 < int(body["resourceLimits"]["memory"].removesuffix("Ki")) < 200 * 1024
    assert list(body["env"]) == ["EXECD_ACCESS_TOKEN", "TMPDIR"]
    assert (metadata["cloche-kind"], metadata["cloche-run"]) == ("box", "r-one")
    assert (metadata["cloche-owner"], metadata["cloche-place"]) == (opened.owner, place)
    assert int(metadata["cloche-expires"]) - (time.time() + offset_s) == pytest.approx(30 + 40 + 60, abs=5)
    assert len(metadata["cloche-try"]) == 32
    assert set(body) == {"image", "entrypoint", "timeout", "resourceLimits", "env", "metadata"}


async def test_least_lifetime(service: OpenSandbox) -> None:
    """However short a run is, its sandbox has the shortest lifetime that the service takes."""
    assert manifest.LEAST_TIMEOUT_S == 60
    await run(service, SPEC.model_copy(update={"timeout": 0.1}), start_timeout=1.5)
    assert 60 <= service.made[0].body["timeout"] <= 70


async def test_tokens(service: OpenSandbox) -> None:
    """Each sandbox has a token of its own, of 256 bits, which each request to its execd carries, but for one that asks whether
    it is wanted, and none to the service.
    """
    async with sandbox(service) as opened:
        for _ in range(2):
            await opened.run(SPEC, wait_cleanup=True)
    tokens = [box.token for box in service.made]
    assert len(set(tokens)) == 2
    assert all(len(bytes.fromhex(token)) == 32 for token in tokens)
    shown = service.tokens()
    for number, token in enumerate(tokens):  # the other request wants to be refused
        assert sorted(shown[5 * number : 5 * number + 5]) == sorted(["", *[token] * 4])
    for box in service.made:  # a part of one would be seen by all who may list sandboxes
        metadata = json.dumps(box.metadata)
        assert not any(box.token[at : at + 8] in metadata for at in range(len(box.token) - 7))
    for request in service.to_service():
        assert "x-execd-access-token" not in request.headers
        assert str(request) == CREATE or not any(token.encode() in request.body for token in tokens)


async def test_key(service: OpenSandbox) -> None:
    """The key goes with each request to the service, and with none to execd, nor into the sandbox."""
    await run(service)
    assert {request.headers.get("open-sandbox-api-key") for request in service.to_service()} == {KEY}
    for request in service.to_execd():
        assert KEY not in str(request.headers)
        assert KEY.encode() not in request.body
    assert KEY not in json.dumps(service.made[0].body)


async def test_headers_of_the_endpoint(service: OpenSandbox) -> None:
    """Headers that the service wants on the way to a sandbox go with each request to its execd, and with no other."""
    headers = {"OpenSandbox-Ingress-To": "sb-1-44772", "OpenSandbox-Secure-Access": 'a b;c="d"'}
    service.engine.on(ENDPOINT, Reply(body={"endpoint": service.execd_address, "headers": headers}))
    await run(service)
    assert len(service.to_execd()) == len(INSIDE)
    for request in service.to_execd():
        assert headers.items() <= {name: request.headers.get(name.lower()) for name in headers}.items()
    assert not any("opensandbox-ingress-to" in request.headers for request in service.to_service())


async def test_bundle(service: OpenSandbox) -> None:
    """Script, arguments, variables and stdin are uploaded, whole, where only root can read; nothing else says them."""
    secret = "print('a secret')\n" * 3000
    stdin = bytes(range(256)) * 4096
    await run(
        service, cloche.Spec(content=secret, name="main.py", args=["another secret"], env={"T": "hush"}, stdin=stdin)
    )
    (box,) = service.made
    assert {path: mode for path, (mode, _) in box.files.items()} == {
        "/opt/cloche/supervisor": 700,
        "/opt/cloche/bundle": 600,
    }
    whole = b"".join(box.bundle.split(b"C\0\0\1\0"))  # records have 64 KiB each
    for part in (secret.encode()[:60_000], b"another secret", b"T=hush", stdin[:60_000]):
        assert part in whole
    for request in service.requests:
        if str(request) != UPLOAD:
            assert b"secret" not in request.body
            assert b"hush" not in request.body
        assert "secret" not in request.line


async def test_command(service: OpenSandbox) -> None:
    """The supervisor is the command, with a bound of files and of processes, and a uid that no other run has."""
    async with sandbox(service, pids=77) as opened:
        for _ in range(6):
            await opened.run(SPEC)
    commands = [box.commands[0]["argv"] for box in service.made]
    assert all(argv[:4] == ["/opt/cloche/supervisor", "run", "--bundle", "/opt/cloche/bundle"] for argv in commands)
    options = [dict(zip(argv[2::2], argv[3::2], strict=True)) for argv in commands]
    assert all((o["--nproc"], o["--sockets"], o["--fsize"]) == ("77", "unix", "67108864") for o in options)
    uids = {int(o["--script-uid"]) for o in options}
    assert len(uids) > 4
    assert all(20_000 <= uid < 60_000 for uid in uids)
    assert all(o["--script-uid"] == o["--script-gid"] for o in options)


async def test_open_network(service: OpenSandbox) -> None:
    """A run with the network open has no bound of sockets."""
    await run(service, SPEC.model_copy(update={"network": cloche.Network.OPEN}))
    assert "--sockets" not in service.made[0].commands[0]["argv"]


# --- old and new execd ------------------------------------------------------------------------------------------------


async def test_old_execd_is_remembered(service: OpenSandbox) -> None:
    """An execd that takes no list of arguments gets a shell's text that says the same, and the next run's gets it at once."""
    service.old = True
    async with sandbox(service) as opened:
        for asked in (2, 3):
            assert (await opened.run(SPEC, wait_cleanup=True)).stdout == "hi"
            assert len(service.execd.asked(COMMAND)) == asked
    refused, first, second = (request.json() for request in service.execd.asked(COMMAND))
    assert list(refused) == ["argv"]
    assert list(first) == list(second) == ["command"]
    assert first["command"] == "exec " + " ".join(refused["argv"])
    assert not any("timeout" in body for body in (refused, first, second))


async def test_refused_twice(service: OpenSandbox) -> None:
    """An execd that takes neither is backend-unavailable, with its words, after two tries."""
    service.execd.on(COMMAND, no(400, "INVALID_REQUEST_BODY", "not with me"))
    error = await failure(service)
    assert error.code == "backend-unavailable"
    assert "not with me" in error.message
    assert len(service.execd.asked(COMMAND)) == 2


@pytest.mark.parametrize("status", [401, 404, 500, 502, 302])
async def test_command_is_refused(service: OpenSandbox, status: int) -> None:
    """A command that execd does not start is an error with its words, and is not asked for again: it may have run."""
    service.execd.on(COMMAND, no(status, "RUNTIME_ERROR", "no forks left", Location="http://127.0.0.1:1/"))
    error = await failure(service)
    assert error.code == "backend-unavailable"
    assert "no forks left" in error.message
    assert len(service.execd.asked(COMMAND)) == 1


@GENERATIONS
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
async def test_result_at_the_end(service: OpenSandbox, *, old: bool, before: bool) -> None:
    """The result is there with the last frame: neither the last event nor the stream's end is waited for."""
    service.old = old
    service.linger_s = 0.0 if before else 5.0
    service.play = says(HI, 5.0, DONE) if before else says(HI, DONE)
    started = time.monotonic()
    async with sandbox(service) as opened:
        assert (await opened.run(SPEC, wait_cleanup=True)).stdout == "hi"
        assert time.monotonic() - started < 2
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\x7fELF\2\1\1" + bytes(11) + (243).to_bytes(2, "little") + bytes(44), "ELF f300"),
        (b"\x7fELF\2\2\1" + bytes(11) + (22).to_bytes(2, "big") + bytes(44), "ELF 0016"),
    ],
    ids=["riscv", "s390x"],
)
async def test_other_machines(service: OpenSandbox, head: bytes, words: str) -> None:
    """A sandbox on a machine for which there is no supervisor is backend-unavailable, and says which."""

    def foreign(box: Box) -> None:
        box.machine = head

    service.places = foreign
    error = await failure(service)
    assert error.code == "backend-unavailable"
    assert words in error.message
    assert not service.execd.asked(UPLOAD)


@pytest.mark.parametrize(
    "word",
    [no(404, "FILE_NOT_FOUND", "no such file"), no(500, "RUNTIME_ERROR", "x"), Reply(200, b"#!/bin/sh"), Reply(206)],
    ids=["404", "500", "text", "empty"],
)
async def test_unknown_machine(service: OpenSandbox, word: Reply) -> None:
    """Where it cannot be told of what kind the machine is, it is taken to be of ours."""
    service.program_is(word)
    assert (await run(service)).stdout == "hi"


@pytest.mark.parametrize(
    "word", [Reply(206, b"\x7fELF" + bytes(60)), Reply(404), Reply(200), Reply(500)], ids=["206", "404", "200", "500"]
)
async def test_execd_that_wants_no_token(service: OpenSandbox, word: Reply) -> None:
    """An execd that answers who shows no token is another's, or open to all: it is given nothing."""

    async def open_to_all(request: Request, peer: Peer) -> Reply:
        return await service.download(request, peer) if "x-execd-access-token" in request.headers else word

    service.execd.on(DOWNLOAD, open_to_all)
    error = await failure(service)
    assert error.code == "permission-denied"
    assert not service.execd.asked(UPLOAD)
    assert not service.execd.asked(COMMAND)


async def test_endless_program(service: OpenSandbox) -> None:
    """Of a program that has no end only its beginning is read."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n"
    service.program_is(Raw(head + b"\x7fELF" + bytes(60), *[bytes(100_000)] * 3, 20.0))
    started = time.monotonic()
    error = await failure(service)
    assert error.code == "backend-unavailable"
    assert time.monotonic() - started < 3


# --- side by side -----------------------------------------------------------------------------------------------------


async def test_side_by_side(service: OpenSandbox) -> None:
    """Runs side by side have sandboxes of their own, and each gets what came out of its own."""

    async def play(box: Box) -> AsyncIterator[Step]:
        name = box.metadata["cloche-run"].encode()
        yield frames(*BEGIN, Data("stdout", 0, name), replace(end(0), stdout_bytes=len(name)))
        yield DONE

    service.play = play
    got: dict[str, str] = {}

    async def one(opened: cloche.Sandbox, run_id: str) -> None:
        got[run_id] = (await opened.run(SPEC, run_id=run_id)).stdout

    async with sandbox(service, max_concurrent=20) as opened, anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(one, opened, f"r{number:02}")
    assert got == {name: name for name in got}
    assert len(service.made) == 20


async def test_connections_break_between_runs(service: OpenSandbox) -> None:
    """A service whose connections all broke between two runs is spoken to again."""
    async with sandbox(service) as opened:
        for _ in range(3):
            assert (await opened.run(SPEC, wait_cleanup=True)).stdout == "hi"
            service.engine.cut()
            service.execd.cut()
            await anyio.sleep(0.05)


# --- told to stop -----------------------------------------------------------------------------------------------------


async def cancelled_at_output(opened: cloche.Sandbox) -> cloche.Result:
    """What becomes of a run that is cancelled at its first output."""
    async with anyio.create_task_group() as group:
        fold = opened.fold("r1")
        async for happened in opened.stream(SPEC, run_id="r1"):
            fold.add(happened)
            if isinstance(happened, cloche.Output):
                group.start_soon(opened.cancel, "r1")
    return fold.result()


@GENERATIONS
async def test_asked_to_stop(service: OpenSandbox, *, old: bool) -> None:
    """A run that is cancelled is ended by its supervisor, which execd is asked to tell, and keeps what was collected."""
    service.old = old

    async def play(box: Box) -> AsyncIterator[Step]:
        yield SO_FAR
        await box.interrupted.wait()
        yield CANCELLED[len(SO_FAR) :]
        yield failed("143", "exit status 143")

    service.play = play
    ids = [f"{number:032x}" for number in (1, 2)]
    service.command_id = ids[1 if old else 0].format
    async with sandbox(service) as opened:
        result = await cancelled_at_output(opened)
    assert (result.outcome, result.stdout) == ("cancelled", "so far")
    (request,) = service.execd.asked(INTERRUPT)
    assert request.query == {"id": ids[1 if old else 0]}


async def test_deaf(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose supervisor does not heed its end is cancelled all the same, with what came."""
    monkeypatch.setattr(backend, "STOP_S", 0.2)
    service.play = says(SO_FAR, 30.0)
    started = time.monotonic()
    async with sandbox(service) as opened:
        result = await cancelled_at_output(opened)
    assert (result.outcome, result.stdout) == ("cancelled", "so far")
    assert time.monotonic() - started < 4


async def test_execd_does_not_interrupt(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is cancelled in time also where execd does not end its command."""
    monkeypatch.setattr(backend, "STOP_S", 0.2)
    service.execd.on(INTERRUPT, Raw(20.0))
    service.play = says(SO_FAR, 30.0)
    started = time.monotonic()
    async with sandbox(service) as opened:
        assert (await cancelled_at_output(opened)).outcome == "cancelled"
    assert time.monotonic() - started < 4


async def test_hostile_name_of_a_command(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with a name that none can have is not asked for by it; its run is cancelled all the same."""
    monkeypatch.setattr(backend, "STOP_S", 0.1)
    names = ["", "../../v1", "a&id=b", "x\n", "a" * 300, "a b"]
    service.command_id = names.copy().pop
    service.play = says(SO_FAR, 30.0)
    outcomes: list[str] = []

    async def one(run_id: str) -> None:
        async for happened in opened.stream(SPEC, run_id=run_id):
            if isinstance(happened, cloche.Output):
                await opened.cancel(run_id)
            elif isinstance(happened, cloche.Finished):
                outcomes.append(happened.outcome)

    async with sandbox(service, max_concurrent=len(names)) as opened, anyio.create_task_group() as group:
        for number in range(len(names)):
            group.start_soon(one, f"r{number}")
    assert outcomes == ["cancelled"] * len(names)
    assert not service.execd.asked(INTERRUPT)


@pytest.mark.parametrize("route", [PING, DOWNLOAD, UPLOAD])
async def test_stopped_before_the_command(service: OpenSandbox, route: str) -> None:
    """A run that is cancelled before its command has begun starts nothing."""
    at, may_go = anyio.Event(), anyio.Event()
    known = {PING: service.ping, DOWNLOAD: service.download, UPLOAD: service.upload}[route]

    async def slowly(request: Request, peer: Peer) -> Reply:
        at.set()
        await may_go.wait()
        return await known(request, peer)

    service.execd.on(route, slowly)
    found: list[cloche.Result] = []

    async def one() -> None:
        found.append(await opened.run(SPEC, run_id="r1"))

    async with sandbox(service) as opened, anyio.create_task_group() as group:
        group.start_soon(one)
        await at.wait()
        started = time.monotonic()
        assert await opened.cancel("r1")
        may_go.set()
        await wait_until(lambda: found)
        assert time.monotonic() - started < 1
    assert found[0].outcome == "cancelled"
    assert not service.execd.asked(COMMAND)


@pytest.mark.parametrize("refused", [False, True], ids=["slow", "refused"])
async def test_stopped_at_the_command(service: OpenSandbox, *, refused: bool) -> None:
    """A run that is cancelled while its command is being asked for is ended as soon as the command has a name; one that was
    refused meanwhile is not asked for again.
    """
    at, may_go = anyio.Event(), anyio.Event()

    async def slowly(request: Request, peer: Peer) -> Reply | Raw:
        at.set()
        await may_go.wait()
        return no(400, "INVALID_REQUEST_BODY", "x") if refused else await service.command(request, peer)

    async def play(box: Box) -> AsyncIterator[Step]:
        await box.interrupted.wait()
        yield CANCELLED
        yield failed("143")

    service.play = play
    service.execd.on(COMMAND, slowly)
    found: list[cloche.Result] = []

    async def one() -> None:
        found.append(await opened.run(SPEC, run_id="r1"))

    async with sandbox(service) as opened, anyio.create_task_group() as group:
        group.start_soon(one)
        await at.wait()
        assert await opened.cancel("r1")
        may_go.set()
        await wait_until(lambda: found)
    assert found[0].outcome == "cancelled"
    assert len(service.execd.asked(COMMAND)) == 1
    assert len(service.execd.asked(INTERRUPT)) == (not refused)


# --- who leaves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [CREATE, ENDPOINT, PING, DOWNLOAD, UPLOAD, COMMAND, DELETE])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("how", ["cancel", "kill", "close"])
async def test_caller_leaves(service: OpenSandbox, route: str, how: str, *, done: bool) -> None:
    """Whoever gives up over any request of a run, be it before or after it was done, leaves nothing there and no open
    connection.
    """
    at = anyio.Event()
    known = {
        CREATE: service.create,
        ENDPOINT: service.endpoint,
        PING: service.ping,
        DOWNLOAD: service.download,
        UPLOAD: service.upload,
        COMMAND: service.command,
        DELETE: service.delete,
    }[route]
    if route != DELETE:
        service.play = says(frames(*BEGIN), 30.0)

    async def slowly(request: Request, peer: Peer) -> Reply | Raw:
        reply: Reply | Raw | None = await known(request, peer) if done and route != COMMAND else None
        at.set()
        await anyio.sleep(0.05)
        return reply or await known(request, peer)

    async with sandbox(service) as opened:
        (service.engine if route in {CREATE, ENDPOINT, DELETE} else service.execd).on(route, slowly, DEFAULT)
        async with anyio.create_task_group() as group:

            async def one() -> None:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    await opened.run(SPEC, run_id="r1", wait_cleanup=True)

            scopes: list[anyio.CancelScope] = []
            group.start_soon(one)
            await at.wait()
            match how:
                case "cancel":
                    scopes[0].cancel()
                case "kill":
                    opened.kill("r1")
                case _:
                    await opened.close()
    assert len(service.made) == 1
    gc.collect()


async def test_caller_leaves_at_any_moment(service: OpenSandbox) -> None:
    """Whoever leaves at any moment of a run leaves nothing."""
    service.play = says(frames(*BEGIN), 30.0)
    async with sandbox(service, max_concurrent=50) as opened, anyio.create_task_group() as group:

        async def one(number: int) -> None:
            with anyio.move_on_after(number * 0.004):
                await opened.run(SPEC)

        for number in range(50):
            group.start_soon(one, number)
    gc.collect()


async def test_one_after_the_other_leaves(service: OpenSandbox) -> None:
    """The same with a run alone, whose steps come closer together."""
    service.play = says(frames(*BEGIN), 30.0)
    async with sandbox(service) as opened:
        for number in range(60):
            with anyio.move_on_after(number * 0.0005):
                await opened.run(SPEC)
    gc.collect()


async def test_closed_twice(service: OpenSandbox) -> None:
    """A sandbox may be closed twice; each of its runs is ended by it."""
    service.play = says(frames(*BEGIN), 30.0)
    async with sandbox(service) as opened, anyio.create_task_group() as group:

        async def lost() -> None:
            assert (await opened.run(SPEC)).outcome == "cancelled"

        group.start_soon(lost)
        await wait_until(lambda: service.execd.asked(COMMAND))
        await opened.close()
        await opened.close()
    assert len(service.engine.asked(DELETE)) == 1


async def test_events_are_what_execd_sends() -> None:
    """The played execd frames its events as the real one does: a line of JSON, and an empty one."""
    assert event({"type": "ping"}).endswith(b"}\n\n\r\n")
