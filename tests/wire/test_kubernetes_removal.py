"""Jobs that cannot be deleted at once, and what the caller is told of it."""

from __future__ import annotations

import time

import anyio
import pytest
from tests.wire.engine import DEFAULT, Peer, Raw, Reply, Request, Word
from tests.wire.kubernetes import DELETE_JOB, Kubernetes, status
from tests.wire.kubernetes_runs import check_nothing_left, ended, sandbox
from tests.wire.runs import SPEC

from cloche.backends.kubernetes import backend, client

pytestmark = pytest.mark.anyio

BAD = [
    Raw(),
    Raw(b"HTTP/1.1 200"),
    status(500, "InternalError", "etcd is away"),
    status(503, "ServiceUnavailable", "not now"),
    Reply(502, b"<html>"),
    status(429, "TooManyRequests", "slow down"),
]
IDS = ["cut", "head", "500", "503", "502", "429"]


@pytest.mark.parametrize("word", BAD, ids=IDS)
async def test_fails_at_first(cluster: Kubernetes, word: Word, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion that fails is asked for again, and the run has its result long before."""
    monkeypatch.setattr(client, "PAUSES_S", (0.02, 0.02, 0.02))
    monkeypatch.setattr(backend, "REMOVE_PAUSE_S", 0.05)
    cluster.engine.on(DELETE_JOB, word, word, DEFAULT)
    async with sandbox(cluster) as opened:
        started = time.monotonic()
        assert (await opened.run(SPEC)).stdout == "hi"
        assert time.monotonic() - started < 0.3
    assert opened.counters.removals_failed == 0
    assert len(cluster.engine.asked(DELETE_JOB)) == 3


@pytest.mark.parametrize("word", BAD[:3], ids=IDS[:3])
async def test_fails_for_long(cluster: Kubernetes, word: Word, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion that fails for longer than one request is tried is asked for until its own time is over."""
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(backend, "REMOVE_PAUSE_S", 0.05)
    cluster.engine.on(DELETE_JOB, *[word] * 7, DEFAULT)
    async with sandbox(cluster) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"
    assert opened.counters.removals_failed == 0


async def test_gone_already(cluster: Kubernetes) -> None:
    """A Job that somebody else has deleted is gone, which is all that was wanted."""

    async def gone(request: Request, peer: Peer) -> Reply:
        await cluster.delete_job(request, peer)
        return await cluster.delete_job(request, peer)

    cluster.engine.on(DELETE_JOB, gone)
    async with sandbox(cluster) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"
    assert opened.counters.removals_failed == 0


async def test_answer_is_lost(cluster: Kubernetes) -> None:
    """A deletion whose answer was lost is asked for again, and then the Job is not there."""

    async def lost(request: Request, peer: Peer) -> Raw:
        await cluster.delete_job(request, peer)
        return Raw()

    cluster.engine.on(DELETE_JOB, lost, DEFAULT)
    async with sandbox(cluster) as opened:
        await opened.run(SPEC)
    assert opened.counters.removals_failed == 0


async def test_refused(cluster: Kubernetes) -> None:
    """A deletion that is refused is counted, and takes nothing from the result."""
    cluster.engine.on(DELETE_JOB, status(422, "Invalid", "no"))
    found = await ended(cluster)
    assert found.result is not None
    assert found.result.stdout == "hi"
    assert found.counters.removals_failed == 1
    assert len(cluster.engine.asked(DELETE_JOB)) == 1


@pytest.mark.parametrize("code", [401, 403, 409])
async def test_refused_for_now(cluster: Kubernetes, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has just begun may know neither us nor our rights: it is asked again."""
    monkeypatch.setattr(backend, "REMOVE_PAUSE_S", 0.05)
    cluster.engine.on(DELETE_JOB, status(code, "", "not yet"), status(code, "", "not yet"), DEFAULT)
    async with sandbox(cluster) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"
    assert opened.counters.removals_failed == 0


async def test_refused_for_good(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not delete is told so in the count, after a while."""
    monkeypatch.setattr(backend, "REMOVE_S", 0.4)
    monkeypatch.setattr(backend, "REMOVE_PAUSE_S", 0.05)
    cluster.engine.on(DELETE_JOB, status(403, "Forbidden", "no"))
    found = await ended(cluster)
    assert found.result is not None
    assert found.counters.removals_failed == 1


async def test_hangs(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion that is never answered is given up after its time, and counted."""
    monkeypatch.setattr(backend, "REMOVE_S", 0.5)

    async def hang(request: Request, peer: Peer) -> Reply:
        await anyio.sleep_forever()
        raise AssertionError

    cluster.engine.on(DELETE_JOB, hang)
    started = time.monotonic()
    found = await ended(cluster)
    assert found.result is not None
    assert found.counters.removals_failed == 1
    assert 0.5 < time.monotonic() - started < 2


async def test_drips(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion whose answer comes ever so slowly is asked for again."""
    monkeypatch.setattr(client, "QUICK_S", 0.3)

    async def drip(request: Request, peer: Peer) -> Raw:
        await cluster.delete_job(request, peer)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
        return Raw(head, *[step for _ in range(100) for step in (b" ", 0.05)])

    cluster.engine.on(DELETE_JOB, drip, DEFAULT)
    async with sandbox(cluster) as opened:
        await opened.run(SPEC)
    assert opened.counters.removals_failed == 0
    assert len(cluster.engine.asked(DELETE_JOB)) == 2


async def test_does_not_stop_others(cluster: Kubernetes) -> None:
    """While one run's Job is not deleted yet another run has a place and its result."""
    may_go = anyio.Event()

    async def slowly(request: Request, peer: Peer) -> Reply:
        await may_go.wait()
        return await cluster.delete_job(request, peer)

    cluster.engine.on(DELETE_JOB, slowly, DEFAULT)
    async with sandbox(cluster, max_concurrent=2) as opened:
        for _ in range(3):
            assert (await opened.run(SPEC)).stdout == "hi"
        assert len(cluster.jobs) >= 1
        may_go.set()
    check_nothing_left(cluster)
