"""Connections that leave HTTP, and servers that do not agree to it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel
import pytest
from tests.wire.docker import UPGRADED
from tests.wire.engine import Engine, Peer, Raw, Reply, Request

from cloche._kit.http import Answer, Connection, ConnectionLost, HttpClient, TimedOut

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[HttpClient]:
    client = HttpClient(engine.server)
    yield client
    await client.aclose()


async def read_all(connection: Connection | Answer) -> bytes:
    assert isinstance(connection, Connection)
    got = b""
    while data := await connection.read():
        got += data
    return got


async def write_for_ever(connection: Connection) -> None:
    with anyio.fail_after(10):
        while True:  # a system may take some before it says that nobody is there
            await connection.write(b"x" * 1000)


async def echo(request: Request, peer: Peer) -> Raw:
    await peer.send(UPGRADED)
    while data := await peer.reader.read(65536):
        await peer.send(data)
    return Raw()


async def test_both_ways(engine: Engine, client: HttpClient) -> None:
    """After the upgrade bytes go both ways, at the same time and more of them than any buffer holds."""
    engine.on("POST /x", echo)
    data = bytes(range(256)) * 16 * 1024
    got = bytearray()
    async with client.upgrade("/x", protocol="tcp", query={"a": True}, timeout_s=10, max_bytes=10) as connection:
        assert isinstance(connection, Connection)
        async with anyio.create_task_group() as group:
            group.start_soon(connection.write, data)
            while len(got) < len(data):
                got += await connection.read()
    assert bytes(got) == data
    (request,) = engine.requests
    assert request.query == {"a": "true"}
    assert request.headers["connection"].lower() == "upgrade"
    assert request.headers["upgrade"] == "tcp"


@pytest.mark.parametrize("size", [1, 100_000])
async def test_data_that_came_along(engine: Engine, client: HttpClient, size: int) -> None:
    """What the server sends together with its 101 is not lost."""
    engine.on("POST /x", Raw(UPGRADED + b"a" * size, b"b"))
    async with client.upgrade("/x", protocol="tcp", timeout_s=10, max_bytes=10) as connection:
        assert await read_all(connection) == b"a" * size + b"b"


async def test_silence(engine: Engine, client: HttpClient) -> None:
    """The timeout is for the answer, not for what comes after it: a script may be silent for long."""
    engine.on("POST /x", Raw(UPGRADED, 0.6, b"late"))
    async with client.upgrade("/x", protocol="tcp", timeout_s=0.3, max_bytes=10) as connection:
        assert await read_all(connection) == b"late"


@pytest.mark.parametrize("status", [404, 500])
async def test_refused(engine: Engine, client: HttpClient, status: int) -> None:
    """A server that does not agree gives its answer, cut to the bound."""
    engine.on("POST /x", Reply(status, b"a" * 100))
    async with client.upgrade("/x", protocol="tcp", timeout_s=10, max_bytes=10) as answer:
        assert isinstance(answer, Answer)
        assert (answer.status, answer.body) == (status, b"a" * 10)


async def test_no_answer(engine: Engine, client: HttpClient) -> None:
    """A server that never answers is TimedOut."""
    engine.on("POST /x", Raw(math.inf))
    with pytest.raises(TimedOut):
        async with client.upgrade("/x", protocol="tcp", timeout_s=0.3, max_bytes=10):
            pass


async def test_other_side_closes(engine: Engine, client: HttpClient) -> None:
    """When the other side has closed, reading gives nothing, and writing is ConnectionLost sooner or later."""
    engine.on("POST /x", Raw(UPGRADED))
    async with client.upgrade("/x", protocol="tcp", timeout_s=10, max_bytes=10) as connection:
        assert await read_all(connection) == b""
        assert isinstance(connection, Connection)
        with pytest.raises(ConnectionLost):
            await write_for_ever(connection)


async def test_left(engine: Engine, client: HttpClient) -> None:
    """Leaving closes the connection, and the client works on."""
    left = anyio.Event()

    async def watch(request: Request, peer: Peer) -> Raw:
        await peer.send(UPGRADED)
        assert await peer.reader.read() == b""
        left.set()
        return Raw()

    engine.on("POST /x", watch)
    engine.on("GET /x", Reply(body=b"next"))
    async with client.upgrade("/x", protocol="tcp", timeout_s=10, max_bytes=10) as connection:
        assert isinstance(connection, Connection)
    with anyio.fail_after(10):
        await left.wait()
    assert (await client.request("GET", "/x", timeout_s=10, max_bytes=10)).body == b"next"


async def test_others_have_their_turn(engine: Engine, client: HttpClient) -> None:
    """Reading what has come already, and writing what can leave at once, lets others have a turn: a deadline is kept."""
    engine.on("POST /x", Raw(UPGRADED, bytes(100_000), math.inf))
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with client.upgrade("/x", protocol="tcp", timeout_s=10, max_bytes=10) as connection:
        assert isinstance(connection, Connection)
        await anyio.sleep(0.1)  # until it has come
        async with anyio.create_task_group() as group:
            group.start_soon(count)
            await connection.read()  # what came with the head
            await anyio.sleep(0.01)
            before = turns
            await connection.read()
            assert turns > before
            before = turns
            await connection.write(b"x")
            assert turns > before
            group.cancel_scope.cancel()
