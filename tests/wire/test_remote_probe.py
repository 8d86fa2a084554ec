"""What answers at the service's address, and what is said to a user for whom it does not work."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.wire.engine import Raw, Reply
from tests.wire.remote import OFFER, POSTURE, TOKEN, Remote, playing, problem
from tests.wire.runs import SPEC

import cloche
from cloche.isolation import Isolation, Posture
from cloche.runtime.remote import client
from cloche.runtime.remote.service import RemoteService

pytestmark = pytest.mark.anyio


@pytest.fixture
async def service(anyio_backend: object, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Remote]:
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.02))
    async with playing() as service:
        yield service


async def probe(settings: cloche.Settings) -> Posture:
    remote = RemoteService(settings, "o1")
    try:
        return await remote.probe()
    finally:
        await remote.aclose()


async def refusal(service: Remote, **settings: Any) -> Posture:
    """The posture of a service that cannot be used; it is an error for who opens a sandbox."""
    posture = await probe(service.settings(**settings))
    assert (posture.mode, posture.available, posture.isolation) == ("remote", False, Isolation.NONE)
    assert posture.hint
    assert TOKEN not in posture.reason + posture.hint
    with pytest.raises(cloche.BackendUnavailable) as caught:
        async with cloche.Sandbox(service.settings(**settings)):
            pass
    assert caught.value.hint == posture.hint
    return posture


async def test_good(service: Remote) -> None:
    """A service in good order gives what it says it gives; it is asked one thing, with the token."""
    async with cloche.Sandbox(service.settings()) as sandbox:
        posture = await sandbox.posture()
        assert (sandbox.mode, sandbox.runs, sandbox.fallback_from) == ("remote", True, None)
    assert (posture.mode, posture.available, posture.isolation) == ("remote", True, "namespace")
    assert posture.engine == "cloche service, local, bubblewrap 0.11"
    (request,) = service.engine.requests
    assert (str(request), request.headers["authorization"]) == (POSTURE, f"Bearer {TOKEN}")


async def test_asked_anew(service: Remote) -> None:
    """Who asks whether the service is still there is told how it is now."""
    async with cloche.Sandbox(service.settings()) as sandbox:
        assert (await sandbox.probe()).available
        service.engine.on(POSTURE, problem(503, "shutting-down", "The service is about to end."))
        found = await sandbox.probe()
        assert (found.available, found.reason) == (False, "The service is about to end.")
        assert (await sandbox.posture()).available


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
async def test_address(service: Remote, ending: str) -> None:
    """The address may end with a slash or with the version."""
    assert (await probe(service.settings(remote_url=service.base + ending))).available


async def test_address_with_a_path(service: Remote) -> None:
    """A service may be below a path of a server's."""
    service.engine.on("GET /cloche/v1/posture", service.posture)
    assert (await probe(service.settings(remote_url=f"{service.base}/cloche/"))).available


async def test_user_in_the_address(service: Remote) -> None:
    """Who stands before a service gets the name and password of the address, where there is no token."""
    base = service.base.replace("http://", "http://us%65r:pass@")
    await probe(service.settings(remote_url=base, remote_token=None))
    assert service.engine.requests[-1].headers["authorization"] == "Basic dXNlcjpwYXNz"
    assert "pass@" not in repr(service.settings(remote_url=base))


async def test_no_address(service: Remote) -> None:
    """Without an address there is nobody to ask."""
    posture = await refusal(service, remote_url=None)
    assert posture.reason == "No cloche service is configured."
    assert "CLOCHE_REMOTE_URL" in posture.hint
    assert not service.engine.requests


@pytest.mark.parametrize("token", ["another-token", None, "with\nnewline", "ü"])
async def test_token(service: Remote, token: str | None) -> None:
    """A token that the service does not take, or that cannot be sent, is told as that, and is not shown."""
    posture = await refusal(service, remote_token=token)
    assert "token" in posture.reason
    assert "CLOCHE_REMOTE_TOKEN" in posture.hint
    assert token is None or token not in posture.reason


async def test_nobody_listens(service: Remote) -> None:
    """Where nobody listens, that is said with the address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    posture = await refusal(service, remote_url=f"http://127.0.0.1:{port}")
    assert f"No cloche service can be reached at http://127.0.0.1:{port}: " in posture.reason
    assert "cloche serve" in posture.hint


async def test_tls(service: Remote) -> None:
    """A service without TLS whose address does not say so."""
    posture = await refusal(service, remote_url=service.base.removeprefix("http://"))
    assert "could not agree on TLS" in posture.reason
    assert "http://" in posture.hint


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (Reply(body={"status": "ok"}), "is no cloche service"),
        (Reply(body=b"<html>Welcome</html>"), "is no cloche service"),
        (Reply(body=b"[" * 100_000), "is no cloche service"),
        (Reply(body={**OFFER, "isolation": "total"}), "is no cloche service"),
        (Reply(body=b"x" * (client.MAX_ANSWER_BYTES + 1)), "it says too much"),
        (Reply(404, b"not here"), "is no cloche service"),
        (Reply(302, b"", {"Location": "http://elsewhere.example/"}), "sends us elsewhere"),
        (Reply(403, b"<html>"), "does not take the token"),
        (Reply(502, b"<html>"), "is away"),
        (Reply(500, b"oops"), "failed"),
        (Raw(), "was lost"),
        (Raw(b"HTTP/1.1 200 OK\r\nContent-Le"), "was lost"),
        (Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"), "was lost"),
        (Raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "was lost"),
    ],
)
async def test_what_is_no_service(service: Remote, word: Reply | Raw, said: str) -> None:
    """Whatever answers in its place, the user is told what to look at; no redirect is followed."""
    service.engine.on(POSTURE, word)
    posture = await refusal(service)
    assert said in posture.reason
    assert {str(request) for request in service.engine.requests} == {POSTURE}


async def test_silence(service: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that does not answer, or that drips, is not waited for."""
    monkeypatch.setattr(client, "QUICK_S", 0.1)
    drops: list[bytes | float] = [b"{", 0.05]
    for word in (Raw(math.inf), Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *drops * 100)):
        service.engine.on(POSTURE, word)
        assert "in time" in (await refusal(service)).reason


async def test_unavailable_there(service: Remote) -> None:
    """A service whose own engine is away is unavailable, in its own words."""
    service.offer = {**OFFER, "available": False, "isolation": "none", "reason": "no daemon", "hint": "Start it."}
    posture = await refusal(service)
    assert (posture.reason, posture.hint) == ("the service says: no daemon", "Start it.")


async def test_disabled_there(service: Remote) -> None:
    """Where the service has script execution switched off, every run is refused as that, and none is asked for."""
    service.offer = {**OFFER, "mode": "disabled", "available": False, "isolation": "none", "runs": False}
    async with cloche.Sandbox(service.settings()) as sandbox:
        assert not sandbox.runs
        with pytest.raises(cloche.SandboxDisabled):
            await sandbox.run(SPEC)
    assert [str(request) for request in service.engine.requests] == [POSTURE]


async def test_fallback_there(service: Remote) -> None:
    """Where the service itself has fallen back, that is said."""
    service.offer = {**OFFER, "fallback_from": "kubernetes"}
    async with cloche.Sandbox(service.settings()) as sandbox:
        assert (sandbox.mode, sandbox.fallback_from) == ("remote", "kubernetes")
        assert sandbox.fold("r1").failed(cloche.EngineLost("x")).fallback_from == "kubernetes"


async def test_fallback_here(service: Remote, caplog: pytest.LogCaptureFixture) -> None:
    """A service that is away may be replaced by local, with one warning; results say so."""
    service.engine.on(POSTURE, Reply(503, b""))
    try:
        with caplog.at_level(logging.WARNING, "cloche"):
            async with cloche.Sandbox(service.settings(fallback=True)) as sandbox:
                assert (sandbox.mode, sandbox.fallback_from) == ("local", "remote")
    except cloche.BackendUnavailable as error:
        if "The fallback, local, is unavailable too" not in error.message:
            raise
        pytest.skip(error.message)
    (record,) = caplog.records
    assert "is away" in record.getMessage()


async def test_floor(service: Remote) -> None:
    """A service that gives less than is asked for is not asked for a run."""
    async with cloche.Sandbox(service.settings(min_isolation="container")) as sandbox:
        with pytest.raises(cloche.IsolationUnavailable, match="remote gives the isolation namespace"):
            await sandbox.run(SPEC)
    assert [str(request) for request in service.engine.requests] == [POSTURE]
