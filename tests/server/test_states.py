"""States of the service that take an engine which plays: full queues, engines that fail, clients that are slow."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import httpx2
import pytest
from anyio.abc import SocketStream
from tests.server.serving import (
    ALICE,
    BOB,
    Here,
    events_of,
    form,
    raw_request,
    raw_run,
    serving_here,
    spec,
    tar_of,
    wait_until,
)

from cloche import errors
from cloche.backends.contract import Capabilities
from cloche.errors import ClocheError
from cloche.isolation import Isolation, Posture
from cloche.result import error_class
from cloche.server import connections, stream
from cloche.server.auth import Caller
from cloche.server.problems import STATUS
from cloche.supervisor.frames import Data, Fail, File, FileData
from cloche.testing.fake import FakeBackend, Play, Step, begin, end, ended_by

LIVE = {"Accept": "text/event-stream"}
LATER = {"Prefer": "respond-async"}
NEVER = Play([*begin(), math.inf], when_stopped=[ended_by(15, "cancel")])
CHATTY = Play([*begin(), *(Data("stdout", at * 5000, b"x" * 5000) for at in range(3000)), end(stdout=15_000_000)])
"""More than the system's own buffers take of a connection that nobody reads."""
HI: Sequence[Step] = [*begin(), Data("stdout", 0, b"hi"), end(stdout=2)]


async def post(here: Here, run_id: str | None = None, **headers: str) -> httpx2.Response:
    params = {} if run_id is None else {"run_id": run_id}
    return await here.client.post("/v1/runs", params=params, json=spec("true", timeout=60), headers=headers)


async def result_of(here: Here, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with anyio.fail_after(10):
        while found.get("state") != "finished":
            found = (await here.client.get(f"/v1/runs/{run_id}")).json()
            await anyio.sleep(0.005)
    return dict(found["result"])


# --- the queue ---------------------------------------------------------------------------------------------------------


async def test_full() -> None:
    """When as many wait as may, the next one is refused with a time after which to ask again; a free place is taken in turn."""
    backend = FakeBackend([NEVER])
    async with serving_here(backend, max_concurrent=1, serve_max_queue=2) as here:
        for number in range(3):
            assert (await post(here, f"run-{number}", **LATER)).status_code == 202
        refused = await post(here)
        assert refused.status_code == 429
        assert refused.json()["code"] == "too-many-runs"
        assert refused.json()["retryable"] is True
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        await wait_until(lambda: len(backend.boxes) == 1)
        for number in range(3):
            assert backend.boxes[-1].profile.run_id == f"run-{number}"
            await here.client.delete(f"/v1/runs/run-{number}")
            await result_of(here, f"run-{number}")
            await wait_until(partial(_begun, backend, min(3, number + 2)))
        assert (await post(here, **LATER)).status_code == 202
    assert backend.alive == 0


def _begun(backend: FakeBackend, boxes: int) -> bool:
    return len(backend.boxes) == boxes


async def test_no_queue() -> None:
    """With a queue of none the places alone are there."""
    async with serving_here(FakeBackend([NEVER]), max_concurrent=1, serve_max_queue=0) as here:
        assert (await post(here, **LATER)).status_code == 202
        assert (await post(here)).status_code == 429


async def test_waited_too_long() -> None:
    """A run that waits too long is told so, before and after its answer has begun, and holds no place."""
    async with serving_here(FakeBackend([NEVER]), max_concurrent=1, queue_timeout=0.1, serve_max_queue=1) as here:
        await post(here, **LATER)
        answer = await post(here)
        assert (answer.status_code, answer.json()["code"]) == (503, "queue-timeout")
        assert answer.headers["Retry-After"] == "1"
        events = events_of((await post(here, **LIVE)).text)
        assert [(name, data["code"]) for name, data in events] == [("error", "queue-timeout")]


async def test_place_is_free_after_a_refusal() -> None:
    """What was refused while it was read gives its place back."""
    async with serving_here(FakeBackend(), max_concurrent=1, serve_max_queue=0) as here:
        for _ in range(3):
            bad = await here.client.post("/v1/runs", content=b"{", headers={"Content-Type": "application/json"})
            assert bad.status_code == 422
        assert (await post(here)).status_code == 200


# --- engines -----------------------------------------------------------------------------------------------------------

LEAVES = [error for error in STATUS if error.__module__ == errors.__name__]


def test_every_error_has_a_status() -> None:
    """Every error of the tree that can be raised has its own status."""
    leaves: list[type[ClocheError]] = []
    todo: list[type[ClocheError]] = [ClocheError]
    while todo:
        kind = todo.pop()
        below = [one for one in kind.__subclasses__() if one.__module__ == errors.__name__]
        todo += below
        leaves += [] if below else [kind]
    assert set(leaves) <= set(STATUS)


@pytest.mark.parametrize("kind", LEAVES)
async def test_engine_that_fails(kind: type[ClocheError]) -> None:
    """Whatever an engine does, the caller gets its code, its status, and the hint; the result is kept as a failed one."""
    error = kind("It is like this.", hint="Do that.")
    async with serving_here(FakeBackend([Play(open_error=error)])) as here:
        answer = await post(here, "run-1")
        problem = answer.json()
        assert answer.status_code == problem["status"] == STATUS[kind]
        assert (problem["code"], problem["detail"], problem["hint"]) == (kind.code, "It is like this.", "Do that.")
        assert (problem["retryable"], problem["run_id"]) == (error.retryable, "run-1")
        assert ("Retry-After" in answer.headers) is (error.retryable and STATUS[kind] in {429, 503})
        kept = await result_of(here, "run-1")
        assert (kept["outcome"], kept["error"]["code"]) == ("failed", kind.code)
        assert error_class(kept["error"]["code"]) is kind


async def test_partial_output_is_kept() -> None:
    """What a script printed before its run failed is in the result that is kept."""
    play = Play([*begin(), Data("stdout", 0, b"hi"), Fail("protocol-error", "it broke")])
    async with serving_here(FakeBackend([play])) as here:
        await post(here, "run-1")
        assert (await result_of(here, "run-1"))["stdout"] == "hi"


async def test_failure_of_ours() -> None:
    """An error that nobody raised on purpose is a 500 without its words, and ends no other run."""
    async with serving_here(FakeBackend([Play(open_error=RuntimeError("the marker")), Play(HI)])) as here:
        answer = await post(here)
        assert (answer.status_code, answer.json()["code"]) == (500, "internal-error")
        assert "the marker" not in answer.text
        assert [line["event"] for line in here.log if line["log_level"] == "error"]
        assert answer.headers["X-Request-ID"] in answer.json()["hint"]
        assert events_of((await post(here, **LIVE)).text)[-1][0] in {"error", "finished"}


async def test_failure_outside_of_a_run() -> None:
    """So is one in a request that is no run's, and it says its id and that it is for no cache."""

    class Broken(FakeBackend):
        async def probe(self) -> Posture:
            self.probes += 1
            return Posture("local", available=True, isolation=Isolation.NAMESPACE, reason=object())  # type: ignore[arg-type]

    async with serving_here(Broken()) as here:
        answer = await here.client.get("/v1/posture", headers={"X-Request-ID": "mine"})
        assert (answer.status_code, answer.json()["code"]) == (500, "internal-error")
        assert answer.headers["X-Request-ID"] == answer.json()["request_id"] == "mine"
        assert answer.headers["Cache-Control"] == "no-store"


async def test_disabled() -> None:
    """Where scripts are switched off a run is 403, and the service is ready: it is as it should be."""
    off = FakeBackend(
        posture=Posture("local", available=False, isolation=Isolation.NONE),
        capabilities=Capabilities(mode="local", runs=False),
    )
    async with serving_here(off) as here:
        answer = await post(here)
        assert (answer.status_code, answer.json()["code"]) == (403, "sandbox-disabled")
        assert (await here.client.get("/readyz")).status_code == 200
        assert (await here.client.get("/v1/posture")).json()["runs"] is False


class Fickle(FakeBackend):
    """An engine that comes and goes."""

    posture = Posture("local", available=True, isolation=Isolation.NAMESPACE)

    async def probe(self) -> Posture:
        self.probes += 1
        return self.posture


async def test_readiness() -> None:
    """The service is ready while its engine can be reached and gives enough isolation; it asks it now and then only."""
    backend = Fickle()
    async with serving_here(backend) as here:
        for _ in range(5):
            assert (await here.client.get("/readyz")).status_code == 200
        assert backend.probes == 2  # one on entering, one now
        for posture, code in (
            (
                Posture("local", available=False, isolation=Isolation.NONE, reason="It is away.", hint="Start it."),
                "backend-unavailable",
            ),
            (Posture("local", available=True, isolation=Isolation.PROCESS), "isolation-unavailable"),
        ):
            backend.posture = posture
            _forget(here)
            answer = await here.client.get("/readyz")
            assert (answer.status_code, answer.json()["code"]) == (503, code)
            assert answer.headers["Retry-After"] == "10"
            assert (await here.client.get("/healthz")).status_code == 200
        backend.posture = Fickle.posture
        _forget(here)
        assert (await here.client.get("/readyz")).status_code == 200


async def test_the_floor_is_the_operators() -> None:
    """A request that asks for less isolation than the service's floor gets no less."""
    weak = FakeBackend(posture=Posture("local", available=True, isolation=Isolation.PROCESS))
    async with serving_here(weak) as here:
        for level in ("none", "process", "namespace"):
            answer = await here.client.post("/v1/runs", json=spec("true", min_isolation=level))
            assert (answer.status_code, answer.json()["code"]) == (422, "isolation-unavailable")
    async with serving_here(FakeBackend()) as here:
        assert (await here.client.post("/v1/runs", json=spec("true", min_isolation="none"))).status_code == 200
    assert weak.boxes == []


def _forget(here: Here) -> None:
    """As if the time between two questions were over."""
    here.readiness._asked_at = -math.inf


async def test_readiness_of_an_engine_that_is_silent() -> None:
    """An engine that gives no answer is not waited for longer than who asks would wait."""

    class Silent(FakeBackend):
        async def probe(self) -> Posture:
            self.probes += 1
            if self.probes > 1:
                await anyio.sleep(math.inf)
            return await super().probe()

    async with serving_here(Silent()) as here:
        with anyio.fail_after(8):
            answer = await here.client.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "backend-unavailable")


async def test_draining() -> None:
    """A service that is about to end takes no more runs and says that it is not ready; those that go on may finish."""
    play = Play([*begin(), 0.3, Data("stdout", 0, b"hi"), end(stdout=2)])
    async with serving_here(FakeBackend([play])) as here, anyio.create_task_group() as tasks:
        answers: list[httpx2.Response] = []

        async def run() -> None:
            answers.append(await post(here))

        # One more whose request is not whole when the end begins.
        late = await here.connect()
        request = raw_run(spec("true"), Connection="close")
        await late.send(request[:-5])
        tasks.start_soon(run)
        await wait_until(lambda: here.sandbox.load.taken == 1)
        tasks.start_soon(here.runs.drain, 10)
        await wait_until(lambda: here.runs.draining)
        assert (await here.client.get("/readyz")).json()["code"] == "shutting-down"
        refused = await post(here)
        assert (refused.status_code, refused.json()["code"]) == (503, "shutting-down")
        assert "Retry-After" in refused.headers
        unread = await here.connect()
        await unread.send(raw_request("POST", "/v1/runs", Content_Length="1000", Content_Type="application/json"))
        assert b"shutting-down" in await unread.receive()
        await late.send(request[-5:])
        assert b"shutting-down" in await _all(late)
        await wait_until(lambda: answers)
        assert answers[0].json()["stdout"] == "hi"


async def _all(connection: SocketStream) -> bytes:
    got = b""
    async with connection:
        async for piece in connection:
            got += piece
    return got


# --- what is kept ------------------------------------------------------------------------------------------------------


async def test_kept_results() -> None:
    """Of ended runs so many bytes are kept, artifacts too; the oldest go first, and what is forgotten is not found."""
    data = b"x" * 30_000
    parts = [FileData(data[at : at + 5000]) for at in range(0, len(data), 5000)]
    play = Play([*begin(), File("f", len(data), truncated=False), *parts, end()])
    async with serving_here(FakeBackend([play]), serve_keep_bytes=110_000) as here:
        for number in range(5):
            assert (await post(here, f"run-{number}")).status_code == 200
        found = [(await here.client.get(f"/v1/runs/run-{number}")).status_code for number in range(5)]
        assert found == [404, 404, 200, 200, 200]
        assert (await here.client.get("/v1/runs/run-4/artifacts/f")).content == data
        assert (await here.client.delete("/v1/runs/run-2")).status_code == 204
        assert (await post(here, "run-5")).status_code == 200
        found = [(await here.client.get(f"/v1/runs/run-{number}")).status_code for number in range(2, 6)]
        assert found == [404, 200, 200, 200]


async def test_nothing_is_kept() -> None:
    """With room for nothing nothing is kept, and all else works."""
    async with serving_here(FakeBackend([Play(HI)]), serve_keep_bytes=0) as here:
        assert (await post(here, "run-1")).json()["stdout"] == "hi"
        assert (await here.client.get("/v1/runs/run-1")).status_code == 404
        assert events_of((await post(here, **LIVE)).text)[-1][0] == "finished"


async def test_an_id_that_is_used_again() -> None:
    """Who still holds on to a run that is forgotten cannot end another's of the same id."""
    backend = FakeBackend([CHATTY, NEVER])
    callers = ((ALICE, Caller("alice")), (BOB, Caller("bob")))
    async with serving_here(backend, *callers, max_output_bytes="16Mi", serve_keep_bytes="64Mi") as here:
        holding = await here.connect()
        await holding.send(raw_run(spec("true"), token=BOB, path="/v1/runs?run_id=shared", **LIVE))
        await wait_until(lambda: "shared" in here.runs._ended and not here.sandbox.load.taken)
        assert here.runs._admitted["bob"] == 1
        forgotten = await here.client.delete("/v1/runs/shared", headers={"Authorization": f"Bearer {BOB}"})
        assert forgotten.status_code == 204
        assert (await post(here, "shared", **LATER)).status_code == 202
        await wait_until(lambda: len(backend.boxes) == 2)
        await holding.aclose()
        await anyio.sleep(0.2)
        assert backend.alive == 1
        assert (await here.client.get("/v1/runs/shared")).json()["state"] == "running"


# --- slow clients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["Content_Length", "Transfer_Encoding"])
async def test_slow_request(head: str) -> None:
    """A request that does not come to its end in time is told so, and gives its place back."""
    async with serving_here(FakeBackend(), body_s=0.2, max_concurrent=1, serve_max_queue=0) as here:
        length = "1000" if head == "Content_Length" else "chunked"
        for kind in ("application/json", "multipart/form-data; boundary=b"):
            slow = await here.connect()
            await slow.send(raw_request("POST", "/v1/runs", b"", **{head: length, "Content_Type": kind}))
            answer = await slow.receive()
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"request-timeout" in answer
            await slow.aclose()
        assert (await post(here)).status_code == 200


async def test_client_that_does_not_read() -> None:
    """Events that nobody reads keep their run's place: a caller has no more of them in memory than runs."""
    async with serving_here(FakeBackend([CHATTY]), (BOB, Caller("bob", 2)), max_output_bytes="16Mi") as here:
        silent = [await here.connect() for _ in range(2)]
        for number, connection in enumerate(silent):
            await connection.send(raw_run(spec("true"), token=BOB, path=f"/v1/runs?run_id=run-{number}", **LIVE))
            await result_of(here, f"run-{number}")
        assert (await post(here)).status_code == 429
        for connection in silent:
            await connection.aclose()
        await wait_until(lambda: not here.runs._admitted.total())
        assert (await post(here)).status_code == 200


async def test_answer_that_nobody_reads() -> None:
    """A large answer is handed on piece by piece: who asks for it and does not read it costs little."""
    parts = [FileData(b"x" * 5000) for _ in range(3000)]
    play = Play([*begin(), File("f", 15_000_000, truncated=False), *parts, end()])
    async with serving_here(FakeBackend([play]), max_artifact_bytes="16Mi") as here:
        assert (await post(here, "run-1")).status_code == 200
        silent = await here.connect()
        await silent.send(raw_request("GET", "/v1/runs/run-1/artifacts/f"))
        await anyio.sleep(0.5)
        buffers = [connection.transport.get_write_buffer_size() for connection in here.server.server_state.connections]
        assert 0 < max(buffers) < 2**18


async def test_connection_that_nobody_reads_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client who reads nothing for a while is given up; one who reads slowly is not."""
    monkeypatch.setattr(connections, "LOOK_S", 0.3)
    async with serving_here(FakeBackend([CHATTY]), max_output_bytes="16Mi") as here:
        silent, slow = await here.connect(), await here.connect()
        for connection in (silent, slow):
            await connection.send(raw_run(spec("true"), **LIVE))
        got = 0
        with anyio.fail_after(60):
            async for piece in slow:
                got += len(piece)
                await anyio.sleep(0.01)
                if b"event: finished" in piece:
                    break
        assert got > 10_000_000
        await wait_until(lambda: not here.runs._admitted.total())
        await silent.aclose()
        await slow.aclose()


async def test_connection_without_a_request_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection on which no request comes to its head's end is cut, whatever trickles in; one with a run is not."""
    monkeypatch.setattr(connections, "LOOK_S", 0.1)
    monkeypatch.setattr(connections, "IDLE_S", 0.3)
    play = Play([*begin(), 2.0, Data("stdout", 0, b"hi"), end(stdout=2)])
    async with serving_here(FakeBackend([play])) as here:
        trickling, unread = await here.connect(), await here.connect()
        await unread.send(raw_request("GET", "/healthz", Content_Length="100000"))

        async def trickle(connection: SocketStream) -> None:
            with anyio.fail_after(5):
                while True:
                    try:
                        await connection.send(b"x")
                    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                        return
                    await anyio.sleep(0.02)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(trickle, trickling)
            tasks.start_soon(trickle, unread)
            assert (await post(here)).json()["stdout"] == "hi"
        await trickling.aclose()
        await unread.aclose()


async def test_too_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no more connections than descriptors can be spared for them; when some have gone others may come."""
    monkeypatch.setattr(connections, "most_connections", lambda: 5)
    async with serving_here(FakeBackend()) as here:
        held = [await here.connect() for _ in range(5)]
        with pytest.raises(httpx2.TransportError):
            await here.client.get("/healthz")
        for connection in held:
            await connection.aclose()
        await anyio.sleep(0.1)
        assert (await here.client.get("/healthz")).status_code == 200


async def test_keep_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream on which nothing happens has a sign of life now and then, so that nobody in between takes it for dead."""
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", 0.1)
    play = Play([*begin(), 0.55, end()])
    async with serving_here(FakeBackend([play])) as here:
        text = (await post(here, **LIVE)).text
        assert 4 <= text.count(": still there\n\n") <= 7
        assert [name for name, _ in events_of(text)] == ["started", "finished"]


async def test_large_uploads_do_not_block() -> None:
    """While a large upload is read and unpacked others are answered."""
    async with serving_here(FakeBackend([Play(HI)])) as here:
        workspace = tar_of({"a.sh": "true", "b": bytes(30 * 2**20)})
        text = json.dumps(spec("true", stdin="QUFB" * 2_500_000)).encode()
        slowest = 0.0
        done = False

        async def ask() -> None:
            nonlocal slowest
            while not done:
                begun = anyio.current_time()
                await anyio.sleep(0.002)
                slowest = max(slowest, anyio.current_time() - begun)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            answers = [
                await here.client.post("/v1/runs", files=form({"script": "a.sh"}, workspace)),
                await here.client.post("/v1/runs", content=text, headers={"Content-Type": "application/json"}),
            ]
            done = True
        assert [answer.status_code for answer in answers] == [200, 200]
        assert slowest < 1.0


async def test_threads_that_are_taken() -> None:
    """Who only asks is answered also while all threads are at work for others."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    async with serving_here(FakeBackend(), (ALICE, Caller("alice"))) as here:
        holders = [object() for _ in range(int(limiter.total_tokens))]
        for holder in holders:
            limiter.acquire_on_behalf_of_nowait(holder)
        try:
            with anyio.fail_after(5):
                for path in ("/healthz", "/readyz", "/metrics", "/v1/posture", "/v1/runs/none", "/docs"):
                    assert (await here.client.get(path)).status_code in {200, 404}
                assert (await post(here)).status_code == 200
        finally:
            for holder in holders:
                limiter.release_on_behalf_of(holder)


async def test_room() -> None:
    """What runs that wait have brought is bounded in all; it is room again when they are over, or were refused."""
    small: dict[str, Any] = {"max_workspace_bytes": "64Ki", "max_concurrent": 1, "serve_max_queue": 1000}
    async with serving_here(FakeBackend([NEVER]), **small) as here:
        room = here.room
        whole = room._left
        body = json.dumps(spec("true", args=["x" * 100_000] * 50)).encode()
        sent = {"Content-Type": "application/json"}
        for _ in range(whole // len(body)):
            taken = await here.client.post("/v1/runs", content=body, headers={**sent, **LATER})
            assert taken.status_code == 202
        refused = await here.client.post("/v1/runs", content=body, headers=sent)
        assert (refused.status_code, refused.json()["code"]) == (429, "too-many-runs")
        assert "Retry-After" in refused.headers
        here.runs.kill_all()
        await wait_until(lambda: room._left == whole)
        for bad in (b"{" * 1000, b"x" * 100_000):
            assert (await here.client.post("/v1/runs", content=bad, headers=sent)).status_code == 422
        bomb = form({"script": "a.sh"}, gzip.compress(tar_of({"a.sh": "true", "b": bytes(60_000)})))
        assert (await here.client.post("/v1/runs", files=bomb, headers=LATER)).status_code == 202
        await wait_until(lambda: room._left < whole - 60_000)  # what it brought is held unpacked
        here.runs.kill_all()
        await wait_until(lambda: room._left == whole)
        gone = await here.connect()
        await gone.send(
            raw_request("POST", "/v1/runs", body[:-1], Content_Length=str(len(body)), Content_Type="application/json")
        )
        await wait_until(lambda: room._left < whole)
        await gone.aclose()
        await wait_until(lambda: room._left == whole)
