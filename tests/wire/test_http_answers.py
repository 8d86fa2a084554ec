"""Answers good and bad, and what becomes of those that do not come."""

from __future__ import annotations

import errno
import math
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from tests.wire.engine import DEFAULT, Engine, Raw, Reply, serving

from cloche._kit.http import (
    Answer,
    ConnectFailure,
    ConnectionLost,
    HttpClient,
    Server,
    TimedOut,
    TlsFailure,
    TooLarge,
)

pytestmark = pytest.mark.anyio

SHORT_S = 0.3
"""For servers that will not answer."""
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[HttpClient]:
    client = HttpClient(engine.server)
    yield client
    await client.aclose()


async def ask(client: HttpClient, path: str = "/x", *, timeout_s: float = 10, max_bytes: int = 1000) -> Answer:
    return await client.request("GET", path, timeout_s=timeout_s, max_bytes=max_bytes)


async def ask_at(server: Server) -> Answer:
    client = HttpClient(server)
    try:
        return await ask(client)
    finally:
        await client.aclose()


async def test_answer(engine: Engine, client: HttpClient) -> None:
    """An answer has its status, its headers by names in lower case, and its body; an error status is an answer too."""
    engine.on("GET /x", Reply(418, {"a": [1]}, {"X-Some-Thing": "y"}))
    answer = await ask(client)
    assert (answer.status, answer.ok, answer.json()) == (418, False, {"a": [1]})
    assert answer.headers["x-some-thing"] == "y"


async def test_body_is_sent(engine: Engine, client: HttpClient) -> None:
    """Bytes are sent as they are, anything else as JSON, which the headers say."""
    engine.on("PUT /x", Reply())
    kind = {"Content-Type": "application/x-tar"}
    await client.request("PUT", "/x", body=b"\0\xff", headers=kind, timeout_s=10, max_bytes=10)
    await client.request("PUT", "/x", body={"a": True}, timeout_s=10, max_bytes=10)
    first, second = engine.requests
    assert (first.body, first.headers["content-type"]) == (b"\0\xff", "application/x-tar")
    assert (second.json(), second.headers["content-type"]) == ({"a": True}, "application/json")


async def test_bound(engine: Engine, client: HttpClient) -> None:
    """An answer as large as the bound is whole; one byte more is TooLarge."""
    engine.on("GET /x", Reply(body=bytes(1000)), Reply(body=bytes(1001)))
    assert len((await ask(client)).body) == 1000
    with pytest.raises(TooLarge, match="1000 bytes"):
        await ask(client)


async def test_endless_body(engine: Engine, client: HttpClient) -> None:
    """A body without an end is not read beyond the bound."""
    piece = b"400\r\n" + bytes(0x400) + b"\r\n"
    engine.on("GET /x", Raw(CHUNKED, *[piece] * 100, math.inf))
    with pytest.raises(TooLarge):
        await ask(client)


async def test_endless_head(engine: Engine, client: HttpClient) -> None:
    """A head without an end is not kept."""
    engine.on("GET /x", Raw(b"HTTP/1.1 200 OK\r\n", *[b"X-A: " + b"a" * 4000 + b"\r\n"] * 100, math.inf))
    with pytest.raises(ConnectionLost):
        await ask(client)


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 2", CHUNKED, CHUNKED + b"5\r\nhe"], ids=["nothing", "head", "body", "chunk"]
)
async def test_no_answer(engine: Engine, client: HttpClient, head: bytes) -> None:
    """A server that falls silent, wherever it does, is TimedOut."""
    engine.on("GET /x", Raw(head, math.inf))
    with pytest.raises(TimedOut):
        await ask(client, timeout_s=SHORT_S)


async def test_slow_answer(engine: Engine, client: HttpClient) -> None:
    """A byte now and then does not keep a request alive beyond its timeout."""
    drops: list[bytes | float] = [b"1\r\nx\r\n", SHORT_S / 2]
    engine.on("GET /x", Raw(CHUNKED, *drops * 100))
    with anyio.fail_after(SHORT_S * 10), pytest.raises(TimedOut):
        await ask(client, timeout_s=SHORT_S)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello",
        CHUNKED + b"5\r\nhe",
    ],
    ids=["nothing", "head", "body", "chunk"],
)
async def test_cut(engine: Engine, client: HttpClient, head: bytes) -> None:
    """A connection that is cut before the answer is whole is ConnectionLost, never a shorter answer."""
    engine.on("GET /x", Raw(head))
    with pytest.raises(ConnectionLost):
        await ask(client)


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/9.9 what\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        CHUNKED + b"zz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
        b"\0\xff" * 500,
    ],
    ids=["ssh", "version", "length", "lengths", "chunk", "gzip", "bytes"],
)
async def test_garbage(engine: Engine, client: HttpClient, garbage: bytes) -> None:
    """What is no HTTP is ConnectionLost."""
    engine.on("GET /x", Raw(garbage))
    with pytest.raises(ConnectionLost):
        await ask(client)


async def test_kept_connection_is_gone(engine: Engine, client: HttpClient) -> None:
    """A server that was started anew between two requests is spoken to again."""
    engine.on("GET /x", Reply())
    await ask(client)
    engine.cut()
    await anyio.sleep(0.05)
    assert (await ask(client)).ok


async def test_redirect(engine: Engine, client: HttpClient) -> None:
    """A redirect is an answer, and is not followed."""
    engine.on("GET /x", Reply(302, headers={"Location": "/other"}))
    assert (await ask(client)).status == 302
    assert [request.path for request in engine.requests] == ["/x"]


async def test_no_such_socket(tmp_path: Path) -> None:
    """A socket that is not there is a ConnectFailure with the system's number."""
    with pytest.raises(ConnectFailure) as caught:
        await ask_at(Server("http://engine", str(tmp_path / "none")))
    assert caught.value.errno == errno.ENOENT


async def test_nobody_listens(engine: Engine) -> None:
    """So is a socket, or a port, at which nobody listens any more."""
    async with serving(tcp=True) as at_port:
        pass
    engine.vanish()
    await anyio.sleep(0.05)
    for server in (engine.server, at_port.server):
        with pytest.raises(ConnectFailure) as caught:
            await ask_at(server)
        assert caught.value.errno == errno.ECONNREFUSED


async def test_a_file_that_is_no_socket(tmp_path: Path) -> None:
    """So is a path at which something else lies."""
    (tmp_path / "file").touch()
    with pytest.raises(ConnectFailure) as caught:
        await ask_at(Server("http://engine", str(tmp_path / "file")))
    assert caught.value.errno == errno.ECONNREFUSED


async def test_no_tls() -> None:
    """A server that speaks plain HTTP to a client of TLS is a TlsFailure."""
    async with serving(tcp=True) as engine:
        engine.on("*", Reply(400))
        with pytest.raises(TlsFailure):
            await ask_at(Server(engine.server.base.replace("http:", "https:"), tls=ssl.create_default_context()))


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
async def test_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch, *, tcp: bool) -> None:
    """A proxy that the environment names is not on the way to an engine."""
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    async with serving(tcp=tcp) as engine:
        engine.on("GET /x", Reply(body=b"direct"))
        assert (await ask_at(engine.server)).body == b"direct"


async def test_stream(engine: Engine, client: HttpClient) -> None:
    """A streamed answer comes piece by piece, and its timeout is for the time between two of them."""
    drops: list[bytes | float] = [b"2\r\nhi\r\n", 0.1]
    engine.on("POST /x", Raw(CHUNKED, *drops * 8, b"0\r\n\r\n"))
    got = b""
    async with client.stream("POST", "/x", idle_s=0.6) as stream:
        assert stream.status == 200
        async for chunk in stream.chunks():
            got += chunk
    assert got == b"hi" * 8


async def test_stream_that_stops(engine: Engine, client: HttpClient) -> None:
    """A streamed answer that falls silent is TimedOut, one that is cut ConnectionLost."""
    engine.on("POST /x", Raw(CHUNKED, b"2\r\nhi\r\n", math.inf), Raw(CHUNKED, b"2\r\nhi\r\n"))
    for expected in (TimedOut, ConnectionLost):
        async with client.stream("POST", "/x", idle_s=SHORT_S) as stream:
            chunks = stream.chunks()
            assert await anext(chunks) == b"hi"
            with pytest.raises(expected):
                await anext(chunks)


async def test_stream_of_which_the_beginning_is_enough(engine: Engine, client: HttpClient) -> None:
    """No more than the bound is read of a streamed answer, and the client works on after it."""
    piece = b"400\r\n" + b"a" * 0x400 + b"\r\n"
    engine.on("GET /x", Raw(CHUNKED, *[piece] * 100, math.inf), Reply(body=b"next"), DEFAULT)
    async with client.stream("GET", "/x", idle_s=10) as stream:
        assert await stream.read(1500) == b"a" * 1500
    assert (await ask(client)).body == b"next"
