"""Sandboxes that cannot be made, or of which nobody knows whether they were; and callers who leave meanwhile."""

from __future__ import annotations

import gc
import logging
import math
import time
from typing import Any

import anyio
import pytest
from tests.wire.engine import DEFAULT, Peer, Raw, Reply, Request
from tests.wire.opensandbox import CREATE, DELETE, LIST, SANDBOXES, OpenSandbox, is_left, no
from tests.wire.opensandbox_runs import failure, run, sandbox
from tests.wire.runs import SPEC

import cloche
from cloche.backends.opensandbox import backend, client

pytestmark = pytest.mark.anyio

TRY = "metadata=cloche-try%3D"


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried as often as ever, with shorter pauses between."""
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.02))
    monkeypatch.setattr(backend, "FIND_STEPS_S", (0.05,))


def made_and(service: OpenSandbox, answer: Raw | Reply, after_s: float = 0.0) -> Any:
    """A sandbox is made, and the answer is another one."""

    async def handler(request: Request, peer: Peer) -> Raw | Reply:
        await anyio.sleep(after_s)
        await service.create(request, peer)
        return answer

    return handler


def looked_for(service: OpenSandbox) -> list[Request]:
    """Questions for the sandbox of one try."""
    return [request for request in service.engine.asked(LIST) if TRY in request.target]


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code", "words", "retryable"),
    [
        (no(500, "DOCKER::SANDBOX_IMAGE_PULL_FAILED", "pull access denied"), "image-unavailable", "pull access denied", False),
        (no(500, "DOCKER::SANDBOX_START_FAILED", "port is taken"), "backend-unavailable", "port is taken", False),
        (no(400, "SANDBOX::INVALID_PARAMETER", "timeout above 60"), "backend-unavailable", "timeout above 60", False),
        (no(401, "INVALID_API_KEY", "The key is old"), "permission-denied", "The key is old", False),
        (no(403, "FORBIDDEN", "not you"), "permission-denied", "not you", False),
        (no(503, "DOCKER::SANDBOX_EXECD_START_FAILED", "no execd"), "backend-unavailable", "no execd", True),
        (no(504, "KUBERNETES::POD_READY_TIMEOUT", "the pod is not ready"), "start-timeout", "the pod is not ready", True),
        (Reply(422, {"detail": [{"loc": ["body", "timeout"], "msg": "is too short", "type": "x"}]}), "backend-unavailable",
         "timeout: is too short", False),
        (Reply(422, {"detail": [7, {}, {"loc": 7, "msg": 7}]}), "backend-unavailable", "422", False),
        (Reply(405, {"detail": "Method Not Allowed"}), "backend-unavailable", "Method Not Allowed", False),
        (Reply(409, {"detail": {"code": "X", "message": "in a detail"}}), "backend-unavailable", "in a detail", False),
        (Reply(418, b"<html>" + b"no " * 50_000), "backend-unavailable", "no no no", False),
        (Reply(418, b""), "backend-unavailable", "418", False),
        (Reply(418, b"[" * 100_000), "backend-unavailable", "418", False),
    ],
    ids=[
        *("pull", "start", "parameter", "key", "forbidden", "execd", "ready", "422", "422-odd", "405", "detail"),
        *("long", "empty", "deep"),
    ],
)  # fmt: skip
async def test_refused(service: OpenSandbox, answer: Reply, code: str, words: str, *, retryable: bool) -> None:
    """A sandbox that is refused is a typed error with the service's own words, in bounds; nothing was made, and nothing is
    looked for.
    """
    service.engine.on(CREATE, answer)
    started = time.monotonic()
    error = await failure(service)
    assert (error.code, error.retryable) == (code, retryable)
    assert words in error.message
    assert error.hint.endswith(".")
    assert len(error.message) < 1300
    assert len(service.engine.asked(CREATE)) == 1
    assert not looked_for(service)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("answer", "words", "retryable"),
    [
        (Reply(503, b"Service Unavailable"), "Service Unavailable", True),
        (Reply(502, b"<html>"), "<html>", True),
        (Reply(500, b"Internal Server Error"), "Internal Server Error", False),
        (no(500, "internal", "no such upstream"), "no such upstream", False),
        (Reply(307, b"", {"Location": "http://127.0.0.1:1/"}), "307", False),
    ],
    ids=["503", "502", "500", "500-json", "307"],
)
async def test_refused_by_whoever_stands_before(
    service: OpenSandbox, answer: Reply, words: str, monkeypatch: pytest.MonkeyPatch, *, retryable: bool
) -> None:
    """Where it is not the service itself that refuses, it may have made a sandbox all the same: that is looked for for a moment,
    and left to sweep.
    """
    monkeypatch.setattr(backend, "FIND_REFUSED_S", 0.1)
    service.engine.on(CREATE, answer)
    started = time.monotonic()
    async with cloche.Sandbox(service.settings()) as opened:
        with pytest.raises(cloche.BackendUnavailable) as caught:
            await opened.run(SPEC)
    assert caught.value.retryable is retryable
    assert words in caught.value.message
    assert len(service.engine.asked(CREATE)) == 1
    assert looked_for(service)
    assert await is_left(opened.owner)
    assert time.monotonic() - started < 1


async def test_request_is_named(service: OpenSandbox) -> None:
    """The service's name for the request stands in the error, as far as it is printable and short."""
    service.engine.on(CREATE, no(500, "DOCKER::X", "no", X_Request_ID="req-\x1b[31m" + "7" * 500))
    error = await failure(service)
    assert "request req-[31m777" in error.message
    assert "\x1b" not in error.message
    assert len(error.message) < 300


QUOTA = [
    no(403, "KUBERNETES::QUOTA_EXCEEDED", "exceeded quota: pods"),
    no(429, "KUBERNETES::POOL_EXHAUSTED", "the pool is empty"),
    Reply(429, b"slow down"),
]


async def test_quota_waits(service: OpenSandbox) -> None:
    """A sandbox that a quota forbids is asked for again until there is room, in whichever way the service says so."""
    service.engine.on(CREATE, *QUOTA, DEFAULT)
    started = time.monotonic()
    assert (await run(service)).stdout == "hi"
    assert time.monotonic() - started < 3
    assert len(service.engine.asked(CREATE)) == 4
    assert len(service.made) == 1


async def test_quota_for_good(service: OpenSandbox) -> None:
    """A sandbox that a quota forbids until the start is overdue is quota-exceeded, to be repeated, with the service's words."""
    service.engine.on(CREATE, QUOTA[0])
    started = time.monotonic()
    error = await failure(service, start_timeout=2.2)
    assert (error.code, error.retryable) == ("quota-exceeded", True)
    assert "exceeded quota: pods" in error.message
    assert 0.5 < time.monotonic() - started < 2.2
    assert 3 <= len(service.engine.asked(CREATE)) <= 5


async def test_quota_with_a_time(service: OpenSandbox) -> None:
    """Where the service says when to come again, nobody comes earlier; a time that is too late is not waited for."""
    service.engine.on(CREATE, no(429, "X", "full", Retry_After="1"), DEFAULT, no(429, "X", "full", Retry_After="3600"))
    async with sandbox(service, start_timeout=10) as opened:
        started = time.monotonic()
        await opened.run(SPEC)
        assert 1.0 < time.monotonic() - started < 2
        with pytest.raises(cloche.QuotaExceeded):
            await opened.run(SPEC)
        assert time.monotonic() - started < 2.5


async def test_leaves_while_a_quota_holds(service: OpenSandbox) -> None:
    """Who waits for a quota can leave at once."""
    service.engine.on(CREATE, QUOTA[0])
    async with sandbox(service) as opened:
        started = time.monotonic()
        with anyio.move_on_after(0.3):
            await opened.run(SPEC)
        assert time.monotonic() - started < 1


# --- the answer is lost -----------------------------------------------------------------------------------------------


LOST: dict[str, Raw | Reply] = {
    "cut": Raw(),
    "head": Raw(b"HTTP/1.1 202 Accepted\r\nContent-Le"),
    "body": Raw(b'HTTP/1.1 202 Accepted\r\nContent-Length: 900\r\n\r\n{"id": "sb-'),
    "ssh": Raw(b"SSH-2.0-x\r\n"),
    "html": Reply(202, b"<html>"),
    "empty": Reply(202, b""),
    "object": Reply(202, b"{}"),
    "list": Reply(202, b"[]"),
    "number": Reply(202, b'{"id": 7}'),
    "huge": Raw(b"HTTP/1.1 202 Accepted\r\nContent-Length: 99999999\r\n\r\n", *[bytes(2**20)] * 9, math.inf),
    "bad-gateway": Reply(502, b"<html>Bad Gateway</html>"),
    "gateway-timeout": Reply(504, b"<html>Gateway Timeout</html>"),
    "broken": Reply(500, b"Internal Server Error"),
    "proxy-json": no(504, "", "upstream request timeout"),
}


@pytest.mark.parametrize("how", LOST)
async def test_answer_is_lost(service: OpenSandbox, how: str) -> None:
    """A sandbox that was made, and whose answer was lost on the way, is found by what only this try has, and deleted; it is
    not asked for a second time.
    """
    service.engine.on(CREATE, made_and(service, LOST[how]))
    service.add("sb-other", {"cloche-kind": "box", "cloche-try": "another"})
    async with cloche.Sandbox(service.settings()) as opened:
        with pytest.raises(cloche.BackendUnavailable):
            await opened.run(SPEC)
    assert list(service.boxes) == ["sb-other"]
    assert not await is_left(opened.owner)
    assert len(service.engine.asked(CREATE)) == len(service.made) == 1
    (look,) = looked_for(service)
    assert look.target.partition("?")[2].startswith(f"{TRY}{service.made[0].metadata['cloche-try']}&")
    assert len(service.engine.asked(DELETE)) == 1


async def test_made_a_little_later(service: OpenSandbox) -> None:
    """A sandbox that the service makes only after the connection broke is found all the same."""

    async def later(request: Request, peer: Peer) -> Reply:
        if len(looked_for(service)) == 3:
            await service.create(service.engine.asked(CREATE)[0], peer)
        return await service.list(request, peer)

    service.engine.on(CREATE, Raw())
    async with sandbox(service) as opened:
        service.engine.on(LIST, later)
        with pytest.raises(cloche.BackendUnavailable) as caught:
            await opened.run(SPEC)
    assert caught.value.retryable
    assert len(service.made) == 1


@pytest.mark.parametrize(
    "word",
    [None, no(500, "X", "x"), Raw(), Reply(200, b"<html>"), Reply(200, {"items": 7}), Reply(200, [])],
    ids=["none", "500", "cut", "html", "number", "list"],
)
async def test_never_found(
    service: OpenSandbox, word: Reply | Raw | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sandbox that may have been made, and is not found, is left to sweep, with a warning."""
    monkeypatch.setattr(backend, "FIND_S", 0.2)
    service.engine.on(CREATE, Raw())
    async with cloche.Sandbox(service.settings()) as opened:
        if word is not None:
            service.engine.on(LIST, word)
        with caplog.at_level(logging.WARNING, "cloche.opensandbox"), pytest.raises(cloche.BackendUnavailable):
            await opened.run(SPEC)
    assert "left to sweep" in caplog.text
    assert await is_left(opened.owner)
    assert not service.engine.asked(DELETE)


async def test_found_and_not_deleted(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is found and cannot be deleted is left to sweep, and it is the first failure that is told."""
    monkeypatch.setattr(backend, "REMOVE_S", 0.3)
    monkeypatch.setattr(backend, "REMOVE_PAUSE_S", 0.05)
    service.engine.on(CREATE, made_and(service, Raw()))
    service.engine.on(DELETE, no(500, "DOCKER::SANDBOX_DELETE_FAILED", "device is busy"))
    async with cloche.Sandbox(service.settings()) as opened:
        with pytest.raises(cloche.BackendUnavailable) as caught:
            await opened.run(SPEC)
    assert "busy" not in caught.value.message
    assert await is_left(opened.owner)


async def test_nobody_listens(service: OpenSandbox) -> None:
    """A service that is gone made nothing: nothing is looked for, and the run may be repeated."""
    async with sandbox(service) as opened:
        service.engine.vanish()
        started = time.monotonic()
        with pytest.raises(cloche.BackendUnavailable, match="can be reached") as caught:
            await opened.run(SPEC)
        assert time.monotonic() - started < 1
    assert caught.value.retryable
    assert not service.made


NAMES = [
    "../x",
    "a/b",
    "",
    "a" * 300,
    "sb-1\n",
    "sb 1",
    "..",
    ".",
    "%2e%2e",
    "sb?x=1",
    "sb#1",
    "-x",
    "\u0661",
    "sb\0",
    "\r\nX: y",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
async def test_hostile_name(service: OpenSandbox, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox with a name that none can have is an error, and its name enters no path, whoever shows it."""
    monkeypatch.setattr(backend, "FIND_S", 0.06)
    service.new_id = lambda: name
    async with cloche.Sandbox(service.settings()) as opened:
        with pytest.raises(cloche.BackendUnavailable, match="names no sandbox"):
            await opened.run(SPEC)
    assert looked_for(service)
    assert await is_left(opened.owner)
    for request in service.requests:
        path = request.target.partition("?")[0]
        assert path in {"/health", "/version", SANDBOXES} or path.startswith(f"{SANDBOXES}/none-")


# --- who leaves -------------------------------------------------------------------------------------------------------


async def leave(service: OpenSandbox, how: str, settings: dict[str, Any]) -> cloche.Sandbox:
    """Run, and leave while the service is making a sandbox."""
    async with cloche.Sandbox(service.settings(**settings)) as opened, anyio.create_task_group() as group:
        scopes: list[anyio.CancelScope] = []

        async def one() -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await opened.run(SPEC, run_id="r1")

        group.start_soon(one)
        await service.engine.wait_for(CREATE)
        await anyio.sleep(0.05)
        started = time.monotonic()
        if how == "cancel":
            scopes[0].cancel()
        elif how == "kill":
            opened.kill("r1")
        else:
            await opened.close()
    assert time.monotonic() - started < 4
    gc.collect()
    return opened


HOW = pytest.mark.parametrize("how", ["cancel", "kill", "close"])


@HOW
async def test_leaves_while_it_is_made(service: OpenSandbox, how: str) -> None:
    """Whoever leaves while the service makes a sandbox leaves none: the answer is waited for, and the sandbox deleted."""

    async def slowly(request: Request, peer: Peer) -> Reply:
        await anyio.sleep(1.0 if how == "cancel" else 0.3)
        return await service.create(request, peer)

    service.engine.on(CREATE, slowly)
    opened = await leave(service, how, {})
    assert (len(service.made), len(service.boxes)) == (1, 0)
    assert not looked_for(service)
    assert not await is_left(opened.owner)


@HOW
async def test_leaves_and_the_answer_never_comes(
    service: OpenSandbox, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever leaves while a service makes a sandbox of which it never tells leaves none: it is found and deleted."""
    monkeypatch.setattr(backend, "PATIENCE_S", 0.3)
    service.engine.on(CREATE, made_and(service, Raw(math.inf)))
    opened = await leave(service, how, {})
    assert (len(service.made), len(service.boxes)) == (1, 0)
    assert len(looked_for(service)) == 1
    assert not await is_left(opened.owner)


async def test_leaves_and_it_is_never_found(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not found either, it is left to sweep."""
    monkeypatch.setattr(backend, "PATIENCE_S", 0.1)
    monkeypatch.setattr(backend, "FIND_S", 0.3)
    service.engine.on(CREATE, Raw(math.inf))
    opened = await leave(service, "cancel", {})
    assert await is_left(opened.owner)


async def test_leaves_and_it_is_refused(service: OpenSandbox) -> None:
    """Whoever leaves while a service is about to refuse has nothing to look for."""

    async def slowly(request: Request, peer: Peer) -> Reply:
        await anyio.sleep(0.3)
        return no(500, "DOCKER::SANDBOX_IMAGE_PULL_FAILED", "x")

    service.engine.on(CREATE, slowly)
    opened = await leave(service, "cancel", {})
    assert not looked_for(service)
    assert not await is_left(opened.owner)


async def test_start_is_overdue(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that takes longer than the start may take is start-timeout, and what it made is deleted."""
    monkeypatch.setattr(backend, "PATIENCE_S", 0.2)
    service.engine.on(CREATE, made_and(service, Raw(math.inf)))
    error = await failure(service, start_timeout=0.5)
    assert (error.code, error.retryable) == ("start-timeout", True)
    assert len(service.made) == 1
