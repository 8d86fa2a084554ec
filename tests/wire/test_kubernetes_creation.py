"""Jobs and ConfigMaps that cannot be made, or of which nobody knows whether they were; and callers who leave meanwhile."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from tests.wire.engine import DEFAULT, Peer, Raw, Reply, Request
from tests.wire.kubernetes import (
    BATCH,
    BEGIN,
    CREATE_JOB,
    CREATE_MAP,
    DELETE_JOB,
    LOG,
    Handler,
    Kubernetes,
    frames,
    quota,
    says,
    status,
)
from tests.wire.kubernetes_runs import check_nothing_left, failure, run, sandbox
from tests.wire.runs import SPEC, wait_until

import cloche
from cloche.backends.kubernetes import backend
from cloche.backends.kubernetes import client as clients
from cloche.backends.kubernetes.client import KubernetesClient, OtherContent, Refused

pytestmark = pytest.mark.anyio

LARGE = cloche.Spec(content="pass", name="main.py", stdin=bytes(2_500_000))
BODY: dict[str, Any] = {
    "metadata": {"name": "j", "labels": {"cloche.dev/run": "r1", "cloche.dev/owner": "me"}},
    "spec": {"template": {"metadata": {"labels": {}}, "spec": {"containers": []}}},
}


@asynccontextmanager
async def client_of(cluster: Kubernetes) -> AsyncIterator[KubernetesClient]:
    client = KubernetesClient(cluster.access(), "boxes")
    try:
        await client.look()
        yield client
    finally:
        await client.aclose()


def lost(answer: Raw | Reply, do: Handler) -> Handler:
    """Something is done, and its answer is another one."""

    async def handler(request: Request, peer: Peer) -> Raw | Reply:
        await do(request, peer)
        return answer

    return handler


LOST = pytest.mark.parametrize(
    "answer",
    [Raw(), Raw(b"HTTP/1.1 201 Created\r\nContent-Le"), Reply(504, b"<html>"), status(500, "InternalError", "timeout")],
    ids=["cut", "head", "gateway", "error"],
)


@LOST
async def test_answer_is_lost(cluster: Kubernetes, answer: Raw | Reply) -> None:
    """A Job that was made, and whose answer was lost, is found by its name when it is asked for again: one, and a good run."""
    cluster.engine.on(CREATE_JOB, lost(answer, cluster.create_job), DEFAULT)
    async with sandbox(cluster) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"
    assert len(cluster.made) == 1
    assert len(cluster.engine.asked(CREATE_JOB)) == 2
    assert cluster.made_maps[-1]["metadata"]["ownerReferences"][0]["uid"] == cluster.made[0]["metadata"]["uid"]


@LOST
async def test_answer_for_a_config_map_is_lost(cluster: Kubernetes, answer: Raw | Reply) -> None:
    """The same for a part of the bundle, and for the supervisor."""
    cluster.engine.on(CREATE_MAP, lost(answer, cluster.create_map), DEFAULT, lost(answer, cluster.create_map), DEFAULT)
    async with sandbox(cluster) as opened:
        await wait_until(lambda: len(cluster.engine.asked(CREATE_MAP)) == 2)
        assert (await opened.run(SPEC)).stdout == "hi"
    assert len(cluster.made_maps) == 2


@pytest.mark.parametrize("answer", [Reply(201, b"<html>"), Reply(201, b"{}"), Reply(201, b"[]"), Reply(201, b"7")])
async def test_answer_is_nonsense(cluster: Kubernetes, answer: Reply) -> None:
    """A Job whose making was answered with nonsense is an error of the engine, and is removed."""
    async with sandbox(cluster) as opened:
        cluster.engine.on(CREATE_JOB, lost(answer, cluster.create_job))
        with pytest.raises(cloche.BackendUnavailable):
            await opened.run(SPEC)
    assert cluster.made


async def test_name_is_taken(cluster: Kubernetes) -> None:
    """A Job of our name that is not ours is an error, and is nobody's to use."""
    async with client_of(cluster) as client:
        cluster.add_job("j", {"cloche.dev/run": "r1", "cloche.dev/owner": "other"}, {})
        with pytest.raises(Refused) as caught:
            await client.create_job(BODY)
    assert caught.value.code == 409


async def test_name_is_taken_by_somebody_else(cluster: Kubernetes) -> None:
    """A Job of our name that is somebody else's is not deleted: the run fails, and that is all."""

    async def taken(request: Request, peer: Peer) -> Reply:
        cluster.add_job(request.json()["metadata"]["name"], {"cloche.dev/run": "theirs"}, {})
        return await cluster.create_job(request, peer)

    cluster.engine.on(CREATE_JOB, taken)
    async with cloche.Sandbox(cluster.settings()) as opened:
        with pytest.raises(cloche.BackendUnavailable):
            await opened.run(SPEC)
    assert cluster.jobs
    assert not cluster.engine.asked(DELETE_JOB)


@pytest.mark.parametrize("answer", [Reply(200, b"[]"), Reply(200, b"7"), Reply(200, {"metadata": 7})], ids=repr)
async def test_name_is_taken_by_nonsense(cluster: Kubernetes, answer: Reply) -> None:
    """What is there instead may be anything."""
    async with client_of(cluster) as client:
        cluster.engine.on(CREATE_JOB, status(409, "AlreadyExists", "taken"))
        cluster.engine.on(f"GET {BATCH}/jobs/*", answer)
        with pytest.raises(Refused):
            await client.create_job(BODY)


@pytest.mark.parametrize(
    "answer",
    [
        Reply(200, b"[]"),
        Reply(200, b"7"),
        Reply(200, {"binaryData": 7}),
        Reply(200, {"binaryData": {"a": "AA=="}, "data": {"b": "c"}}),
    ],
    ids=["list", "number", "odd", "more"],
)
async def test_config_map_is_nonsense(cluster: Kubernetes, answer: Reply) -> None:
    """The same for a ConfigMap: it is another one, whatever it is."""
    async with client_of(cluster) as client:
        cluster.engine.on(CREATE_MAP, status(409, "AlreadyExists", "taken"))
        cluster.engine.on("GET */configmaps/*", answer)
        with pytest.raises(OtherContent):
            await client.create_config_map({"metadata": {"name": "m", "labels": {}}, "binaryData": {"a": "AA=="}})


async def test_somebody_came_between(cluster: Kubernetes) -> None:
    """A conflict over a quota that is being counted made nothing, and is tried again; the Job is there once."""
    said = 'Operation cannot be fulfilled on resourcequotas "q": the object has been modified'
    cluster.engine.on(CREATE_JOB, status(409, "Conflict", said), DEFAULT)
    assert (await run(cluster)).stdout == "hi"
    assert len(cluster.made) == 1


async def test_there_and_not_there(cluster: Kubernetes) -> None:
    """A ConfigMap that is there when it is to be made, and not when it is looked for, is asked for with pauses."""
    async with client_of(cluster) as client:
        cluster.engine.on(CREATE_MAP, status(409, "AlreadyExists", "taken"))
        with anyio.move_on_after(1):
            await client.create_config_map({"metadata": {"name": "m", "labels": {}}, "binaryData": {"a": "AA=="}})
    assert len(cluster.engine.asked(CREATE_MAP)) < 12


async def test_busy(cluster: Kubernetes) -> None:
    """A server that has too much to do is asked again when it says, by header or body."""
    busy = Reply(429, b"slow down", {"Retry-After": "1"})
    said = status(429, "TooManyRequests", "slow down", details={"retryAfterSeconds": 1})
    cluster.engine.on(CREATE_JOB, busy, said, DEFAULT)
    started = time.monotonic()
    assert (await run(cluster)).stdout == "hi"
    assert 2.0 <= time.monotonic() - started < 4
    assert len(cluster.made) == 1


async def test_busy_for_long(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is busy for longer than a Job may take to be made is backend-unavailable, to be repeated, with its words."""
    monkeypatch.setattr(clients, "PAUSES_S", (0.01, 0.02, 0.04, 0.08, 0.16))
    cluster.engine.on(CREATE_JOB, status(503, "ServiceUnavailable", "the server is currently unable"))
    error = await failure(cluster)
    assert (error.code, error.retryable) == ("backend-unavailable", True)
    assert "currently unable" in error.message
    assert len(cluster.engine.asked(CREATE_JOB)) == 6


NO_RIGHT = status(
    403, "Forbidden", 'jobs.batch is forbidden: User "u" cannot create resource "jobs" in API group "batch"'
)


async def test_a_new_server_knows_nobody(cluster: Kubernetes) -> None:
    """A server that has just been started, and so refuses everybody for a moment, is asked again; one that goes on is not."""
    cluster.engine.on(CREATE_JOB, NO_RIGHT, NO_RIGHT, DEFAULT)
    assert (await run(cluster)).stdout == "hi"
    cluster.engine.on(CREATE_JOB, NO_RIGHT)
    started = time.monotonic()
    error = await failure(cluster)
    assert (error.code, error.retryable) == ("permission-denied", False)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("answer", "code", "words", "hint"),
    [
        (status(403, "", 'User "u" cannot create resource "jobs"'), "permission-denied", "cannot create", "Role"),
        (status(422, "", "ValidatingAdmissionPolicy 'c' denied request: image x"), "permission-denied", "image x", "policy"),
        (status(400, "", 'admission webhook "w" denied the request'), "backend-unavailable", "denied the request", ""),
        (status(404, "NotFound", 'namespaces "boxes" not found'), "backend-unavailable", "not found", "CLOCHE_KUBE_NAMESPACE"),
        (status(401, "Unauthorized", "Unauthorized"), "permission-denied", "Unauthorized", "credentials"),
        (status(413, "RequestEntityTooLarge", "limit is 3145728"), "backend-unavailable", "3145728", ""),
        (Reply(403, b"<html>" + b"no " * 100_000), "permission-denied", "no no no", ""),
        (Reply(418, b""), "backend-unavailable", "418", ""),
    ],
    ids=["rights", "policy", "webhook", "namespace", "who", "large", "html", "teapot"],
)  # fmt: skip
async def test_refused(cluster: Kubernetes, answer: Reply, code: str, words: str, hint: str) -> None:
    """A Job that is refused is a typed error with the server's own words, in bounds, and a hint that fits."""
    cluster.engine.on(CREATE_JOB, answer)
    error = await failure(cluster)
    assert error.code == code
    assert words in error.message
    assert hint in error.hint
    assert len(error.message) < 1300
    assert not cluster.made


async def test_quota_waits(cluster: Kubernetes) -> None:
    """A Job that a quota forbids is asked for again until there is room."""
    cluster.engine.on(CREATE_JOB, quota(), quota(), DEFAULT)
    started = time.monotonic()
    assert (await run(cluster)).stdout == "hi"
    assert time.monotonic() - started < 2
    assert len(cluster.engine.asked(CREATE_JOB)) == 3


async def test_quota_for_good(cluster: Kubernetes) -> None:
    """A Job that a quota forbids until the start is overdue is quota-exceeded, to be repeated, with the server's words."""
    cluster.engine.on(CREATE_JOB, quota())
    started = time.monotonic()
    error = await failure(cluster, start_timeout=2.5)
    assert (error.code, error.retryable) == ("quota-exceeded", True)
    assert "used: count/jobs=5" in error.message
    assert 0.5 < time.monotonic() - started < 3
    assert 3 <= len(cluster.engine.asked(CREATE_JOB)) <= 6


async def test_quota_of_config_maps_waits(cluster: Kubernetes) -> None:
    """A part of the bundle that a quota forbids is asked for again until there is room."""
    async with sandbox(cluster) as opened:
        cluster.engine.on(CREATE_MAP, quota("configmaps"), quota("configmaps"), DEFAULT)
        assert (await opened.run(SPEC)).stdout == "hi"


async def test_quota_of_config_maps_for_good(cluster: Kubernetes) -> None:
    """A part of the bundle that a quota forbids until the start is overdue is quota-exceeded, with the server's words."""

    async def full(request: Request, peer: Peer) -> Reply:
        known = request.json()["metadata"]["name"] in cluster.config_maps
        return await cluster.create_map(request, peer) if known else quota("configmaps")

    async with sandbox(cluster, start_timeout=1.5) as opened:
        cluster.engine.on(CREATE_MAP, full)
        with pytest.raises(cloche.QuotaExceeded, match="used: count/configmaps=5"):
            await opened.run(SPEC)


async def test_supervisor_is_there_and_the_quota_is_full(cluster: Kubernetes) -> None:
    """A full quota of ConfigMaps refuses also those that are there already: a supervisor that is there is found all the same."""
    await run(cluster)

    async def full_at_first(request: Request, peer: Peer) -> Reply:
        if request.json()["metadata"]["name"] in cluster.config_maps:
            return quota("configmaps")
        return await cluster.create_map(request, peer)

    cluster.engine.on(CREATE_MAP, full_at_first)
    assert (await run(cluster)).stdout == "hi"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (status(422, "Invalid", "no such thing"), "permission-denied"),
        (status(413, "RequestEntityTooLarge", "too large"), "backend-unavailable"),
        (status(403, "Forbidden", "cannot create resource"), "permission-denied"),
        (status(409, "AlreadyExists", "taken"), "backend-unavailable"),
    ],
    ids=["422", "413", "403", "409"],
)
@pytest.mark.parametrize("spec", [SPEC, LARGE], ids=["small", "large"])
async def test_bundle_is_refused(cluster: Kubernetes, answer: Reply, code: str, spec: cloche.Spec) -> None:
    """A bundle that is refused, in whole or in part, ends the run at once with the server's words, and nothing is left."""
    async with sandbox(cluster) as opened:
        cluster.engine.on("GET */configmaps/*", Reply(200, {"binaryData": {}}))
        cluster.engine.on(CREATE_MAP, answer)
        started = time.monotonic()
        with pytest.raises(cloche.ClocheError) as caught:
            await opened.run(spec)
        assert time.monotonic() - started < 3
    assert caught.value.code == code
    said = json.loads(answer.encode("GET", None).partition(b"\r\n\r\n")[2])["message"]
    assert ("Somebody else made the ConfigMap" if answer.status == 409 else said) in caught.value.message


async def test_supervisor_is_refused_once(cluster: Kubernetes) -> None:
    """A supervisor that could not be put there when the sandbox was opened is put there by the first run."""
    cluster.engine.on(CREATE_MAP, status(403, "Forbidden", "not yet"), DEFAULT)
    async with cloche.Sandbox(cluster.settings()) as opened:
        await wait_until(lambda: cluster.engine.asked(CREATE_MAP))
        assert (await opened.run(SPEC)).stdout == "hi"
    check_nothing_left(cluster)


async def test_supervisor_is_there(cluster: Kubernetes) -> None:
    """A supervisor that somebody has put there before is compared, and taken."""
    for _ in range(2):
        assert (await run(cluster)).stdout == "hi"
    assert len(cluster.supervisors) == 1
    (name,) = (body["metadata"]["name"] for body in cluster.supervisors)
    assert len(cluster.engine.asked(f"GET */configmaps/{name}")) == 2
    assert len([body for body in cluster.made_maps if body["metadata"]["name"] == name]) == 1


async def test_many_first_runs(cluster: Kubernetes) -> None:
    """Runs that begin at once ask for the supervisor once."""
    async with cloche.Sandbox(cluster.settings(max_concurrent=10)) as opened, anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(opened.run, SPEC)
    asked = [request for request in cluster.engine.asked(CREATE_MAP) if b"supervisor" in request.body[:300]]
    assert len([body for body in asked if "cloche.dev/supervisor" in body.json()["metadata"]["labels"]]) == 1


# --- who leaves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [CREATE_JOB, CREATE_MAP, LOG])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("how", ["cancel", "kill", "close"])
async def test_caller_leaves(cluster: Kubernetes, route: str, how: str, *, done: bool) -> None:
    """Whoever gives up over any request of a run, be it before or after the server has done it, leaves nothing there and no
    open connection.
    """
    at = anyio.Event()
    known: Handler = {CREATE_JOB: cluster.create_job, CREATE_MAP: cluster.create_map, LOG: cluster.log}[route]
    cluster.play = says(frames(*BEGIN), 30.0)

    async def slowly(request: Request, peer: Peer) -> Reply | Raw:
        if done and route != LOG:
            reply = await known(request, peer)
            at.set()
            await anyio.sleep(0.1)
            return reply
        at.set()
        await anyio.sleep(0.1)
        return await known(request, peer)

    async with sandbox(cluster) as opened:
        cluster.engine.on(route, slowly)
        async with anyio.create_task_group() as group:

            async def one() -> None:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    await opened.run(LARGE, run_id="r1")

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
    gc.collect()


async def test_caller_leaves_at_any_moment(cluster: Kubernetes) -> None:
    """Whoever leaves at any moment of a run leaves nothing."""
    cluster.play = says(frames(*BEGIN), 30.0)
    async with sandbox(cluster, max_concurrent=40) as opened, anyio.create_task_group() as group:

        async def one(number: int) -> None:
            with anyio.move_on_after(number * 0.004):
                await opened.run(SPEC)

        for number in range(40):
            group.start_soon(one, number)
    gc.collect()


async def test_caller_leaves_while_a_quota_holds(cluster: Kubernetes) -> None:
    """Who waits for a quota can leave at once."""
    cluster.engine.on(CREATE_JOB, quota())
    async with sandbox(cluster) as opened:
        started = time.monotonic()
        with anyio.move_on_after(0.3):
            await opened.run(SPEC)
        assert time.monotonic() - started < 1.5


async def test_server_hangs(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer over making a Job is waited for no longer than is said, and the Job is removed."""

    async def hang(request: Request, peer: Peer) -> Reply:
        await cluster.create_job(request, peer)
        await anyio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(backend, "CREATE_S", 0.5)
    cluster.engine.on(CREATE_JOB, hang)
    async with sandbox(cluster) as opened:
        started = time.monotonic()
        with pytest.raises(cloche.BackendUnavailable, match=r"0\.5 s") as caught:
            await opened.run(SPEC)
        assert time.monotonic() - started < 2
    assert caught.value.retryable
