"""The log of a pod: refused for a while, broken off, begun anew; and an API server that goes away over it."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import AsyncIterator, Callable

import anyio
import pytest
from tests.wire.engine import DEFAULT, Engine, Peer, Raw, Reply, Request, Word
from tests.wire.kubernetes import (
    BEGIN,
    CREATING,
    FINISHED,
    HI,
    LOG,
    SO_FAR,
    STREAM,
    UNREACHABLE,
    Kubernetes,
    Play,
    Pod,
    chunk,
    frames,
    says,
    status,
)
from tests.wire.kubernetes_runs import ended, failure, run, sandbox
from tests.wire.runs import SPEC, wait_until

import cloche
from cloche.backends.kubernetes import box, client
from cloche.runtime import reading
from cloche.supervisor.frames import Data
from cloche.testing.fake import end

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried as often as ever, with shorter pauses between."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.01, 0.05, 0.1, 0.2))
    monkeypatch.setattr(client, "PAUSES_S", (0.02, 0.05, 0.1, 0.2, 0.2))
    monkeypatch.setattr(box, "NO_LOG_S", 0.2)


LONG = frames(*BEGIN, *[Data("stdout", 100 * at, b"x" * 100) for at in range(50)], end(7, stdout=5000))
LOST = b"unable to retrieve container logs for containerd://0123456789abcdef"


def then(*plays: Play) -> Play:
    """One play for each time that the log is read, the last one from then on."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        async for data in plays[min(pod.reads, len(plays)) - 1](pod):
            yield data

    return play


def breaks(data: bytes) -> Play:
    """A log of which some bytes come before the connection breaks."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        yield data
        await anyio.sleep(0.02)
        raise ConnectionResetError

    return play


@pytest.mark.parametrize(
    "words",
    [
        [CREATING],
        [CREATING] * 6,
        [UNREACHABLE],
        [status(502, "", "bad gateway"), UNREACHABLE],
        [Reply(502, b"<html>Bad Gateway</html>")],
        [Reply(503, b"")],
        [status(429, "TooManyRequests", "slow down", details={"retryAfterSeconds": 1})],
        [status(504, "Timeout", "timed out")],
        [Raw()],
        [Raw(b"HTTP/1.1 200 OK\r\nTransfer-Enc")],
        [Raw(b"what is this\r\n\r\n")],
        [Raw(STREAM)],
        [Raw(STREAM, b"zzz\r\n")],
        [Raw(STREAM, FINISHED)],
        [status(404, "NotFound", "pods not found")],
        [status(401, "Unauthorized", "Unauthorized")],
    ],
    ids=[
        "creating",
        "creating-long",
        "node",
        "two",
        "gateway",
        "unavailable",
        "busy",
        "timeout",
        "cut",
        "head",
        "no-http",
        "nothing",
        "no-chunk",
        "empty",
        "not-there",
        "token",
    ],
)
async def test_not_yet(cluster: Kubernetes, words: list[Word]) -> None:
    """A log that cannot be read at first, for whatever reason may pass, is read when it can be, and the result is whole."""
    cluster.engine.on(LOG, *words, DEFAULT)
    started = time.monotonic()
    assert (await run(cluster)).stdout == "hi"
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("code", [400, 403])
async def test_refused_for_good(cluster: Kubernetes, code: int) -> None:
    """A log that cannot be read until the start is overdue is an error then, and no sooner."""
    cluster.engine.on(LOG, status(code, "", "not for you"))
    started = time.monotonic()
    error = await failure(cluster, start_timeout=0.8)
    assert error.code == "start-timeout"
    assert 0.7 < time.monotonic() - started < 4


@pytest.mark.parametrize("at", [1, 20, 27, 100, len(LONG) // 2, len(LONG) - 3])
@pytest.mark.parametrize("how", [breaks, says], ids=["broken", "ended"])
async def test_cut_in_the_middle(cluster: Kubernetes, at: int, how: Callable[[bytes], Play]) -> None:
    """A log that breaks off anywhere, also within a frame, is read again from its start, and no frame is lost or given twice."""
    cluster.play = then(how(LONG[:at]), says(LONG))
    result = await run(cluster)
    assert (result.exit_code, result.stdout) == (7, "x" * 5000)


async def test_broken_again_and_again(cluster: Kubernetes) -> None:
    """A log that breaks off more often than anybody tries, a little later each time, is read to its end."""
    size = len(LONG) // 12
    cluster.play = then(*[breaks(LONG[: size * (number + 1)]) for number in range(12)], says(LONG))
    result = await run(cluster)
    assert (result.exit_code, result.stdout) == (7, "x" * 5000)


async def test_events_once(cluster: Kubernetes) -> None:
    """Who listens to the events hears each byte once, however often the log is read."""
    cluster.play = then(breaks(LONG[:1500]), breaks(LONG[:1000]), says(LONG))
    async with sandbox(cluster) as opened:
        events = [event async for event in opened.stream(SPEC) if isinstance(event, cloche.Output)]
    assert [event.offset for event in events] == sorted({event.offset for event in events})
    assert b"".join(event.data for event in events) == b"x" * 5000


@pytest.mark.parametrize(
    "pieces",
    [
        [LOST],
        [LOST + b"\n"],
        [LOST[:1], LOST[1:9], LOST[9:]],
    ],
    ids=["line", "ended", "pieces"],
)
async def test_no_log_with_200(cluster: Kubernetes, pieces: list[bytes]) -> None:
    """What a kubelet says in place of a log that it does not have is no output of the box; it is asked again."""
    steps: list[bytes | float] = [step for piece in pieces for step in (piece, 0.03)]
    cluster.play = then(says(*steps), says(*steps), says(HI))
    assert (await run(cluster)).stdout == "hi"


async def test_no_log_for_good(cluster: Kubernetes) -> None:
    """A kubelet that has lost the log of a container that has ended leaves how the script ended unknown."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        pod.ends()
        yield LOST

    cluster.play = play
    error = await failure(cluster)
    assert error.code == "engine-lost"
    assert "ended with 0" in error.message


async def test_foreign_line(cluster: Kubernetes) -> None:
    """A line that no supervisor wrote is taken for the connection's fault once, and is a protocol-error the second time."""
    cluster.play = then(says(frames(*BEGIN), b"failed to watch file\n"), says(HI))
    assert (await run(cluster)).stdout == "hi"
    cluster.play = says(frames(*BEGIN), b"failed to watch file\n", 5.0)
    assert (await failure(cluster)).code == "protocol-error"


async def test_without_end(cluster: Kubernetes) -> None:
    """A log that is one line without an end is given up, and not read into memory."""
    cluster.play = says(SO_FAR, *[b"x" * 65536] * 100, math.inf)
    assert (await failure(cluster)).code == "protocol-error"


@pytest.mark.parametrize("body", [b"x" * 10_000_000, b"[" * 100_000], ids=["long", "deep"])
async def test_long_refusal(cluster: Kubernetes, body: bytes) -> None:
    """A refusal of any length is told in a bounded message."""
    cluster.engine.on(LOG, Reply(403, body))
    assert len((await failure(cluster, start_timeout=0.5)).message) < 1200


# --- an API server that goes away ------------------------------------------------------------------------------------


async def restart(engine: Engine, group: anyio.abc.TaskGroup, away_s: float) -> None:
    """Take the server away for a while, and have it listen at the same port again."""
    host, _, port = engine.address.removeprefix("tcp://").rpartition(":")
    engine.vanish()
    await anyio.sleep(away_s)
    await engine.listen(group, socket.create_server((host, int(port))))


def goes_away(cluster: Kubernetes, away_s: float, after: Play) -> Play:
    """A log over which the API server goes away; ``after`` is the log when it is back."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        if pod.reads == 1:
            yield SO_FAR
            await anyio.sleep(0.05)
            cluster.group.start_soon(restart, cluster.engine, cluster.group, away_s)
            await anyio.sleep(math.inf)
        async for data in after(pod):
            yield data

    return play


FINE = frames(*BEGIN, Data("stdout", 0, b"so far"), end(stdout=6))


@pytest.mark.parametrize("away_s", [0.3, 1.5])
async def test_restarted(cluster: Kubernetes, away_s: float) -> None:
    """An API server that is started anew over a run costs it nothing: the log, and the watch, go on."""
    cluster.play = goes_away(cluster, away_s, says(0.2, FINE))
    async with sandbox(cluster) as opened:
        assert (await opened.run(SPEC)).stdout == "so far"
        await wait_until(lambda: cluster.watching)


async def test_died_while_away(cluster: Kubernetes) -> None:
    """A box that ran out of memory while the API server was away is a result soon after it is back, not at the deadline."""

    async def after(pod: Pod) -> AsyncIterator[bytes]:
        pod.ends(137, "OOMKilled")
        yield SO_FAR

    cluster.play = goes_away(cluster, 1.0, after)
    started = time.monotonic()
    async with sandbox(cluster) as opened:
        result = await opened.run(cloche.Spec(content="pass", name="main.py", timeout=2))
    assert result.outcome == "out_of_memory"
    assert time.monotonic() - started < 3


async def test_away_until_the_end(cluster: Kubernetes) -> None:
    """An API server that is away when the run's time is over is engine-lost and may be repeated: nobody saw a timeout."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        yield SO_FAR
        await anyio.sleep(0.05)
        cluster.engine.vanish()

    cluster.play = play
    async with anyio.create_task_group() as group:
        group.start_soon(restart_later, cluster, group, 3.0)
        found = await ended(cluster, cloche.Spec(content="pass", name="main.py", timeout=0.5))
        group.cancel_scope.cancel()
    assert found.result is None
    assert found.error is not None
    assert (found.error.code, found.error.retryable) == ("engine-lost", True)
    assert "time was over" in found.error.message


async def restart_later(cluster: Kubernetes, group: anyio.abc.TaskGroup, in_s: float) -> None:
    """So that removal, which is waited for, comes to an end."""
    await wait_until(lambda: cluster.all_pods and cluster.all_pods[0].reads)
    await anyio.sleep(in_s)
    host, _, port = cluster.engine.address.removeprefix("tcp://").rpartition(":")
    await cluster.engine.listen(cluster.group, socket.create_server((host, int(port))))


async def test_away_before_the_start(cluster: Kubernetes) -> None:
    """An API server that goes away before the script has started is waited for as long as a start may take."""

    async def vanish(request: Request, peer: Peer) -> Raw:
        cluster.group.start_soon(restart, cluster.engine, cluster.group, 0.7)
        await anyio.sleep(math.inf)
        raise asyncio.CancelledError

    cluster.engine.on(LOG, vanish, DEFAULT)
    assert (await run(cluster)).stdout == "hi"


async def test_node_that_stays_away(cluster: Kubernetes) -> None:
    """A node that cannot be reached until the run's time is over is engine-lost with a word on it, not a timeout."""
    cluster.play = then(breaks(SO_FAR))

    async def refuse(request: Request, peer: Peer) -> Reply | Raw:
        return UNREACHABLE if cluster.all_pods[0].reads else await cluster.log(request, peer)

    cluster.engine.on(LOG, refuse)
    error = await failure(cluster, cloche.Spec(content="pass", name="main.py", timeout=0.5))
    assert (error.code, error.retryable) == ("engine-lost", True)


async def test_slow_log(cluster: Kubernetes) -> None:
    """A log that comes byte by byte is read as it comes."""
    steps: list[bytes | float] = []
    for at in range(len(HI)):
        steps += [HI[at : at + 1], 0.001]
    cluster.play = says(*steps)
    assert (await run(cluster)).stdout == "hi"


async def test_truncated_body(cluster: Kubernetes) -> None:
    """A log with a length that it does not keep is a connection that was lost."""
    short = b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + SO_FAR
    cluster.engine.on(LOG, Raw(short), Raw(STREAM, chunk(SO_FAR[:-9])), DEFAULT)
    cluster.play = says(FINE)
    assert (await run(cluster)).stdout == "so far"
