"""What answers at the service's address, and what is said to a user for whom it does not work."""

from __future__ import annotations

import logging
import math
import secrets
import shutil
import socket
import ssl
import time
from typing import Any

import pytest
from tests.engines.docker import certificates
from tests.engines.docker.certificates import Certificates
from tests.wire.engine import DEFAULT, Raw, Reply, serving
from tests.wire.opensandbox import GONE, KEY, OpenSandbox, no
from tests.wire.opensandbox_runs import hurry
from tests.wire.runs import SPEC

import cloche
from cloche.backends.opensandbox import client
from cloche.backends.opensandbox.backend import OpenSandboxBackend
from cloche.isolation import Isolation, Posture

pytestmark = pytest.mark.anyio

HEALTH, VERSION, LOOK = "GET /health", "GET /version", "GET /v1/sandboxes/none-*"


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried as often as ever, with shorter pauses between."""
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.02))


async def probe(settings: cloche.Settings) -> Posture:
    backend = OpenSandboxBackend(settings, f"o{secrets.token_hex(8)}")
    try:
        return await backend.probe()
    finally:
        await backend.aclose()


async def refusal(service: OpenSandbox, **settings: Any) -> Posture:
    """The posture of a service that cannot be used; it is an error for who opens a sandbox."""
    posture = await probe(service.settings(**settings))
    assert (posture.available, posture.isolation) == (False, Isolation.NONE)
    assert posture.reason.endswith(".")
    assert posture.hint.endswith(".")
    assert KEY not in posture.reason + posture.hint
    with pytest.raises(cloche.BackendUnavailable) as caught:
        async with cloche.Sandbox(service.settings(**settings)):
            pass
    assert (caught.value.code, caught.value.hint) == ("backend-unavailable", posture.hint)
    return posture


async def test_good(service: OpenSandbox) -> None:
    """A service in good order is a container's isolation; it is asked three things, each with the key."""
    posture = await probe(service.settings())
    assert posture.available
    assert (posture.isolation, posture.engine, posture.reason) == (Isolation.CONTAINER, "OpenSandbox 1.1.1", "")
    health, look, version = service.requests
    assert (str(health), str(version)) == (HEALTH, VERSION)
    assert look.target.startswith("/v1/sandboxes/none-")
    assert {request.headers["open-sandbox-api-key"] for request in service.requests} == {KEY}


async def test_asked_once(service: OpenSandbox) -> None:
    """A backend that has been probed knows."""
    backend = OpenSandboxBackend(service.settings(), f"o{secrets.token_hex(8)}")
    assert await backend.probe() == await backend.probe()
    await backend.aclose()
    assert len(service.requests) == 3


@pytest.mark.parametrize("ending", ["/", "/v1", "/v1/"])
async def test_address(service: OpenSandbox, ending: str) -> None:
    """An address may end with a slash, or with the version of the API."""
    service.base += ending
    assert (await probe(service.settings())).available
    assert [request.path for request in service.requests][::2] == ["/health", "/version"]


async def test_address_below_a_path(service: OpenSandbox) -> None:
    """A service may be below a path, which stands before all that it is asked."""
    service.base += "/boxes"
    service.engine.on("GET /boxes/health", Reply(body={"status": "healthy"}))
    service.engine.on("GET /boxes/v1/sandboxes/none-*", GONE)
    assert (await probe(service.settings())).available
    assert all(request.path.startswith("/boxes/") for request in service.requests)


@pytest.mark.parametrize(
    "word", [Reply(404), Reply(401), Reply(200, b"<html>"), Raw(), Reply(200, {"version": 7})], ids=repr
)
async def test_version_is_secret(service: OpenSandbox, word: Reply | Raw) -> None:
    """A service that does not tell its version is one all the same."""
    service.engine.on(VERSION, word)
    posture = await probe(service.settings())
    assert posture.available
    assert posture.engine == "OpenSandbox"


async def test_unset(service: OpenSandbox) -> None:
    """Without an address the hint names the setting."""
    posture = await refusal(service, opensandbox_api_url=None)
    assert posture.reason == "No OpenSandbox service is configured."
    assert "CLOCHE_OPENSANDBOX_API_URL" in posture.hint


async def test_nobody_there(service: OpenSandbox) -> None:
    """A port at which nobody listens is said to be that."""
    service.engine.vanish()
    posture = await refusal(service)
    assert "No OpenSandbox service can be reached" in posture.reason
    assert "CLOCHE_OPENSANDBOX_API_URL" in posture.hint


async def test_no_such_name(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads nowhere is told as that."""

    def getaddrinfo(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    posture = await refusal(service, opensandbox_api_url="http://box.example:8080")
    assert "can be reached at http://box.example:8080" in posture.reason


@pytest.mark.parametrize(
    "raw",
    [
        *(
            Raw(),
            Raw(b"SSH-2.0-x\r\n"),
            Raw(b"\x15\x03\x03\0\2\2\x46"),
            Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"),
        ),
        *(Reply(200, b"\xff\xfe"), Reply(200, b"<html>It works!</html>"), Reply(200, b""), Reply(200, b"[" * 100_000)),
        *(
            Reply(200, b"{}"),
            Reply(200, b"[]"),
            Reply(200, b"7"),
            Reply(200, {"status": "ok"}),
            Reply(200, {"status": 7}),
        ),
        *(Reply(404, {"message": "no"}), Reply(403, b"<html>"), Reply(500, {"status": "healthy"}), Reply(302, b"x")),
        *(Reply(200, {"status": "unhealthy"}), Reply(204)),
    ],
    ids=[
        *("cut", "ssh", "tls", "part", "bytes", "html", "empty", "deep", "object", "list", "number", "other", "type"),
        *("404", "403", "500", "302", "unhealthy", "204"),
    ],
)
async def test_no_service(service: OpenSandbox, raw: Reply | Raw) -> None:
    """What answers otherwise than a healthy service is said to be none, with the address, and what to check."""
    service.engine.on(HEALTH, raw)
    posture = await refusal(service)
    assert service.base in posture.reason
    assert "CLOCHE_OPENSANDBOX_API_URL" in posture.hint
    assert {str(request) for request in service.requests} == {HEALTH}


@pytest.mark.parametrize(("key", "code"), [(None, "is missing"), ("psst-wrong", "is not valid")])
async def test_wrong_key(service: OpenSandbox, key: str | None, code: str) -> None:
    """A service that does not take the key is told in its words, with its name for the request, and without the key."""
    posture = await refusal(service, opensandbox_api_key=key)
    assert f"does not take the key: The API key {code}." in posture.reason
    assert "request req-401" in posture.reason
    assert "CLOCHE_OPENSANDBOX_API_KEY" in posture.hint
    assert "psst" not in posture.reason
    assert {request.headers.get("open-sandbox-api-key") for request in service.requests} == {key}


@pytest.mark.parametrize(
    ("word", "words"),
    [
        (no(500, "X", "no database"), "no database"),
        (Reply(500, b"Internal Server Error"), "Internal Server Error"),
        (Reply(503, b"busy"), "busy"),
        (Reply(302, b"", {"Location": "http://127.0.0.1:1/"}), "302"),
        (no(405, "", "Method Not Allowed"), "Method Not Allowed"),
        (Reply(404, {"detail": "Not Found"}), "Not Found"),
        (Raw(), "did not tell how it is"),
        (Reply(200, b"<html>"), "not JSON"),
    ],
    ids=["500", "text", "503", "302", "405", "404", "cut", "html"],
)
async def test_api_does_not_work(service: OpenSandbox, word: Reply | Raw, words: str) -> None:
    """A service that says that it is well, and whose API does not work, is unavailable, with its words."""
    service.engine.on(LOOK, word)
    posture = await refusal(service)
    assert words in posture.reason


@pytest.mark.parametrize("word", [Reply(503, b"busy"), no(429, "X", "x"), Raw()], ids=["503", "429", "cut"])
async def test_busy(service: OpenSandbox, word: Reply | Raw) -> None:
    """A service that is busy for a moment is asked again."""
    service.engine.on(LOOK, word, word, DEFAULT)
    assert (await probe(service.settings())).available


async def test_slow(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that does not answer, or ever so slowly, is not waited for longer than is said."""
    hurry(monkeypatch, 0.2)
    drops: list[bytes | float] = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n",
        *(s for _ in range(500) for s in (b" ", 0.02)),
    ]
    for raw in (Raw(math.inf), Raw(*drops)):
        service.engine.on(HEALTH, raw)
        started = time.monotonic()
        posture = await refusal(service)
        assert "in time" in posture.reason
        assert "load" in posture.hint
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("announced", [True, False])
async def test_too_large(service: OpenSandbox, *, announced: bool) -> None:
    """Of an answer without an end no more is read than any answer has."""
    head = b"Content-Length: 99999999" if announced else b"Connection: close"
    service.engine.on(HEALTH, Raw(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n", *[bytes(2**20)] * 9, math.inf))
    posture = await refusal(service)
    assert "larger than" in posture.reason


async def test_redirects(service: OpenSandbox) -> None:
    """A redirect is not followed: the key goes nowhere else."""
    async with serving(tcp=True) as other:
        other.on("*", Reply(200, {"status": "healthy"}))
        elsewhere = {"Location": f"http{other.address.removeprefix('tcp')}/health"}
        for status in (301, 302, 303, 307, 308):
            for route in (HEALTH, LOOK):
                service.engine.on(route, Reply(status, b"", elsewhere))
            await refusal(service)
            service.engine.on(HEALTH, Reply(200, {"status": "healthy"}))
            await refusal(service)
        assert not other.requests


async def test_password(service: OpenSandbox, caplog: pytest.LogCaptureFixture) -> None:
    """The password of an address goes to the service, and is shown nowhere."""
    service.base = service.base.replace("http://", "http://me:psst%21@")
    for word in (Reply(404), Raw(), Reply(200, b"<html>")):
        service.engine.on(HEALTH, word)
        with caplog.at_level(logging.DEBUG, "cloche"):
            posture = await refusal(service)
        assert "psst" not in posture.reason + posture.hint + caplog.text
    assert {request.headers["authorization"] for request in service.requests} == {"Basic bWU6cHNzdCE="}
    assert "psst" not in repr(service.settings())


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.make(tmp_path_factory.mktemp("tls"))


def context(made: Certificates) -> ssl.SSLContext:
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.load_cert_chain(made.server_cert, made.server_key)
    return found


@pytest.mark.parametrize("scheme", ["", "https://"], ids=["without", "https"])
async def test_untrusted(made: Certificates, scheme: str) -> None:
    """An address without a scheme means TLS; a service whose certificate nobody vouches for gets no request, and is told so."""
    async with serving(tcp=True, tls=context(made)) as engine, serving(tcp=True) as execd:
        service = OpenSandbox(engine, execd)
        service.base = f"{scheme}{engine.address.removeprefix('tcp://')}"
        posture = await refusal(service)
        assert "could not agree on TLS" in posture.reason
        assert "certificate" in posture.reason
        assert "SSL_CERT_FILE" in posture.hint
        assert not engine.requests


async def test_trusted(made: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service whose certificate an authority of the user's vouches for works, run and all; execd is spoken to without TLS."""
    monkeypatch.setenv("SSL_CERT_FILE", str(made.ca))
    async with serving(tcp=True, tls=context(made)) as engine, serving(tcp=True) as execd:
        service = OpenSandbox(engine, execd)
        service.base = engine.address.removeprefix("tcp://")
        async with cloche.Sandbox(service.settings()) as opened:
            assert (await opened.run(SPEC)).stdout == "hi"
        assert not service.boxes


async def test_has_no_tls(service: OpenSandbox) -> None:
    """A service without TLS to which cloche speaks it is said to be so, and how to say that it has none."""
    service.base = service.base.removeprefix("http://")
    posture = await refusal(service)
    assert "could not agree on TLS" in posture.reason
    assert "http://" in posture.hint
    assert not service.requests


# --- what takes its place ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="there is no bubblewrap")
@pytest.mark.parametrize("how", ["unset", "nobody", "key"])
async def test_fallback(service: OpenSandbox, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where the user allows it, local takes the place of a service that cannot be used, with one warning that says why."""
    more: dict[str, Any] = {}
    if how == "unset":
        more["opensandbox_api_url"] = None
    if how == "key":
        more["opensandbox_api_key"] = "x"
    if how == "nobody":
        service.engine.vanish()
    with caplog.at_level(logging.WARNING):
        async with cloche.Sandbox(service.settings(**more, fallback=True)) as opened:
            result = await opened.run(cloche.Spec(content="print('here')", name="main.py"))
    assert (result.stdout, result.mode, result.fallback_from) == ("here\n", "local", "opensandbox")
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "opensandbox is unavailable" in record.getMessage()
    assert not service.made


async def test_no_fallback_later(service: OpenSandbox) -> None:
    """A service that goes away after it was chosen is an error of the run: nothing takes its place then."""
    async with cloche.Sandbox(service.settings(fallback=True)) as opened:
        service.engine.vanish()
        with pytest.raises(cloche.BackendUnavailable):
            await opened.run(SPEC)
