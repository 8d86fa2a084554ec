"""Sandboxes that cannot be deleted at once, and what the caller is told of it."""

from __future__ import annotations

import logging
import time

import anyio
import pytest
from tests.wire.engine import DEFAULT, Peer, Raw, Reply, Request, Word
from tests.wire.opensandbox import COMMAND, DELETE, GONE, OpenSandbox, is_left, no
from tests.wire.opensandbox_runs import hurry, sandbox
from tests.wire.runs import SPEC, ended

import cloche
from cloche.backends.opensandbox import backend, client

pytestmark = pytest.mark.anyio

BAD: dict[str, Word] = {
    "cut": Raw(),
    "head": Raw(b"HTTP/1.1 204"),
    "500": no(500, "DOCKER::SANDBOX_DELETE_FAILED", "device is busy"),
    "503": Reply(503, b"Service Unavailable"),
    "502": Reply(502, b"<html>"),
    "429": no(429, "X", "slow down"),
    "404": Reply(404, {"detail": "Not Found"}),  # of whoever stands before the service
    "401": no(401, "INVALID_API_KEY", "not yet"),
    "409": no(409, "X", "in progress"),
    "302": Reply(302, b"", {"Location": "http://127.0.0.1:1/"}),
}


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried as often as ever, with shorter pauses between."""
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.02))
    monkeypatch.setattr(backend, "REMOVE_PAUSE_S", 0.02)


@pytest.mark.parametrize("how", BAD)
async def test_fails_at_first(service: OpenSandbox, how: str) -> None:
    """A deletion that fails for a while is asked for again, and the run has its result long before."""
    service.engine.on(DELETE, *[BAD[how]] * 6, DEFAULT)
    async with sandbox(service) as opened:
        started = time.monotonic()
        assert (await opened.run(SPEC)).stdout == "hi"
        assert time.monotonic() - started < 0.4
    assert opened.counters.removals_failed == 0
    assert len(service.engine.asked(DELETE)) == 7


async def test_nobody_listens_for_a_while(service: OpenSandbox) -> None:
    """A service that restarts just then is waited for."""
    async with anyio.create_task_group() as group:
        async with sandbox(service) as opened:

            async def vanish(request: Request, peer: Peer) -> Raw:
                service.engine.vanish()
                return Raw()

            async def later() -> None:
                import socket

                await service.engine.wait_for(DELETE)
                await anyio.sleep(0.3)
                host, port = service.base.removeprefix("http://").split(":")
                await service.engine.listen(group, socket.create_server((host, int(port))))

            service.engine.on(DELETE, vanish, DEFAULT)
            group.start_soon(later)
            assert (await opened.run(SPEC)).stdout == "hi"
        assert opened.counters.removals_failed == 0
        service.engine.vanish()


@pytest.mark.parametrize("twice", [False, True], ids=["gone", "gone-by-us"])
async def test_gone_already(service: OpenSandbox, *, twice: bool) -> None:
    """A sandbox that is not there any more is deleted, which is all that was wanted."""

    async def gone(request: Request, peer: Peer) -> Reply | Raw:
        await service.delete(request, peer)
        return Raw() if twice else GONE

    service.engine.on(DELETE, gone, DEFAULT)
    async with sandbox(service) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"
    assert opened.counters.removals_failed == 0
    assert len(service.engine.asked(DELETE)) == 1 + twice


@pytest.mark.parametrize("wait_cleanup", [False, True])
async def test_fails_for_good(
    service: OpenSandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, wait_cleanup: bool
) -> None:
    """A deletion that fails for good is counted and logged, is left to sweep, and takes nothing from the result."""
    monkeypatch.setattr(backend, "REMOVE_S", 0.4)
    service.engine.on(DELETE, BAD["500"])
    with caplog.at_level(logging.ERROR):
        async with cloche.Sandbox(service.settings()) as opened:
            assert (await opened.run(SPEC, wait_cleanup=wait_cleanup)).stdout == "hi"
    assert opened.counters.removals_failed == 1
    assert "device is busy" in caplog.text
    assert await is_left(opened.owner)


@pytest.mark.parametrize("status", [400, 405, 422])
async def test_hopeless(service: OpenSandbox, status: int) -> None:
    """A deletion that no repetition makes a better one is asked for once, and counted."""
    service.engine.on(DELETE, no(status, "X", "no such request"))
    started = time.monotonic()
    found = await ended(service)
    assert found.result is not None
    assert found.counters.removals_failed == 1
    assert len(service.engine.asked(DELETE)) == 1
    assert time.monotonic() - started < 2


async def test_hangs(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion that is never answered is given up after its time, and counted."""
    monkeypatch.setattr(backend, "REMOVE_S", 0.5)
    service.engine.on(DELETE, Raw(60.0))
    started = time.monotonic()
    found = await ended(service)
    assert found.result is not None
    assert found.counters.removals_failed == 1
    assert 0.5 < time.monotonic() - started < 2


async def test_drips(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion whose answer comes ever so slowly is asked for again."""
    hurry(monkeypatch, 0.3)

    async def drip(request: Request, peer: Peer) -> Raw:
        await service.delete(request, peer)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
        return Raw(head, *[step for _ in range(100) for step in (b" ", 0.05)])

    service.engine.on(DELETE, drip, DEFAULT)
    async with sandbox(service) as opened:
        await opened.run(SPEC)
    assert opened.counters.removals_failed == 0
    assert len(service.engine.asked(DELETE)) == 2


async def test_fails_after_an_error(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the run failed and the removal fails too, it is the first failure that is told."""
    monkeypatch.setattr(backend, "REMOVE_S", 0.2)
    service.execd.on(COMMAND, no(500, "RUNTIME_ERROR", "no forks left"))
    service.engine.on(DELETE, BAD["500"])
    found = await ended(service)
    assert found.error is not None
    assert "no forks left" in found.error.message
    assert found.counters.removals_failed == 1


async def test_left_to_the_next_sandbox(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be deleted is deleted by the next sandbox, once its owner is gone."""
    monkeypatch.setattr(backend, "REMOVE_S", 0.1)
    service.engine.on(DELETE, BAD["500"])
    async with cloche.Sandbox(service.settings()) as opened:
        await opened.run(SPEC)
    (left,) = service.boxes.values()
    service.engine.on(DELETE, DEFAULT, service.delete)
    service.engine.on(DELETE, service.delete)
    async with sandbox(service) as opened:
        await service.engine.wait_for(f"{DELETE[:-1]}{left.id}", 2)
    assert opened.counters.swept == 1


async def test_result_before_removal(service: OpenSandbox) -> None:
    """The result is handed out while the sandbox is still being deleted; leaving the sandbox waits for that."""
    may_go = anyio.Event()

    async def slowly(request: Request, peer: Peer) -> Reply:
        await may_go.wait()
        return await service.delete(request, peer)

    service.engine.on(DELETE, slowly)
    async with sandbox(service, max_concurrent=3) as opened:
        for _ in range(3):
            result = await opened.run(SPEC)
            assert (result.stdout, result.timings_ms["cleanup"]) == ("hi", None)
        assert len(service.boxes) == 3
        may_go.set()
