"""The client's two kinds of error, and answers that a daemon should not give."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator

import anyio
import pytest
from tests.wire.engine import Engine, Raw, Reply

from cloche._kit.http import ConnectionLost, TooLarge
from cloche.backends.docker.client import DockerClient, Refused

pytestmark = pytest.mark.anyio

LONG = b"x" * 100_000


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[DockerClient]:
    client = DockerClient(engine.server)
    yield client
    await client.aclose()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"message": "no space left"}', "no space left"),
        (b'{"cause": "x", "message": "no such\\n  thing", "response": 500}', "no such thing"),
        (b"plain text\n", "plain text"),
        (b"<html>\n  <h1>Bad Gateway</h1>\n</html>", "<html> <h1>Bad Gateway</h1> </html>"),
        (b"", "no reason was given"),
        (b" \n ", "no reason was given"),
        (b'{"message": 7}', '{"message": 7}'),
        (b'{"message": ""}', '{"message": ""}'),
        (b"[1]", "[1]"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"[" * 100_000, "[" * 1000),
        (LONG, "x" * 1000),
        (json.dumps({"message": LONG.decode()}).encode(), "x" * 1000),
    ],
    ids=[
        "json",
        "podman",
        "text",
        "html",
        "empty",
        "blank",
        "number",
        "nothing",
        "list",
        "bytes",
        "deep",
        "huge",
        "huge-json",
    ],
)
async def test_refused(engine: Engine, client: DockerClient, body: bytes, message: str) -> None:
    """Whatever body an error has, its message is one line of at most 1,000 characters, beside its status."""
    engine.on("POST /containers/c/start", Reply(507, body))
    with pytest.raises(Refused) as caught:
        await client.start("c")
    assert (caught.value.status, caught.value.message) == (507, message)


async def test_too_large(engine: Engine, client: DockerClient) -> None:
    """An error without an end is not read to it."""
    head = b"HTTP/1.1 500 Error\r\nContent-Length: 99999999\r\n\r\n"
    engine.on("POST /containers/c/start", Raw(head, *[bytes(2**20)] * 20, math.inf))
    with pytest.raises(TooLarge):
        await client.start("c")


@pytest.mark.parametrize("body", [b"", b"<html>", b"{", b"\xff"])
async def test_no_json(engine: Engine, client: DockerClient, body: bytes) -> None:
    """An answer with 200 that is no JSON is none."""
    engine.on("*", Reply(body=body))
    for call in (client.info(), client.image("x"), client.state("c"), client.containers("l"), client.volumes("l")):
        with pytest.raises(ConnectionLost, match="not JSON"):
            await call


@pytest.mark.parametrize(
    "body", ["x", 7, None, [], [7, None, {}, {"Id": 7}], {"Volumes": [7, {}, {"Name": None}]}], ids=repr
)
async def test_lists_of_something_else(engine: Engine, client: DockerClient, body: object) -> None:
    """Lists of something else are empty ones, and a container that tells no state does not run."""
    engine.on("*", Reply(body=body))
    assert await client.containers("l") == []
    assert await client.volumes("l") == []
    state = await client.state("c")
    assert state is not None
    assert not state.running


@pytest.mark.parametrize("body", [{}, [], {"Id": ""}, {"Id": "../x"}, {"Id": 7}], ids=repr)
async def test_created_without_an_id(engine: Engine, client: DockerClient, body: object) -> None:
    """An answer that names no container leaves open whether one was made."""
    engine.on("POST /containers/create", Reply(201, body))
    with pytest.raises(ConnectionLost, match="names no container"):
        await client.create("c", {})


async def test_gone(engine: Engine, client: DockerClient) -> None:
    """That a thing is not there is an answer where one may ask for it, and fine where it was to go."""
    engine.on("*", Reply(404, {"message": "No such thing"}))
    assert await client.image("x") is None
    assert await client.volume_labels("v") is None
    assert await client.state("c") is None
    assert await client.size_in("c", "/x") is None
    assert await client.remove("c")
    await client.remove_volume("v")
    await client.signal("c", "SIGTERM")
    with pytest.raises(Refused):
        await client.start("c")


async def test_already_so(engine: Engine, client: DockerClient) -> None:
    """304 says that a container has started already, which is what was wanted."""
    engine.on("POST /containers/c/start", Reply(304))
    await client.start("c")


async def test_removal_by_somebody_else(engine: Engine, client: DockerClient) -> None:
    """A removal that is under way is told from a conflict."""
    engine.on(
        "DELETE /containers/c",
        Reply(409, {"message": "removal of container c is already in progress"}),
        Reply(409, {"message": "You cannot do that"}),
    )
    assert not await client.remove("c")
    with pytest.raises(Refused, match="cannot do that"):
        await client.remove("c")


@pytest.mark.parametrize("date", ["", "yesterday", "Thu, 99 Jan 1970 00:00:00 GMT", "7"])
async def test_no_time(engine: Engine, client: DockerClient, date: str) -> None:
    """A daemon that tells no time, or none that can be read, has none."""
    engine.clock_offset_s = None
    engine.on("GET /_ping", Reply(headers={"Date": date} if date else {}))
    assert await client.engine_time() is None


async def test_time(engine: Engine, client: DockerClient) -> None:
    """The time is the daemon's, in Unix time."""
    engine.clock_offset_s = None
    engine.on("GET /_ping", Reply(headers={"Date": "Thu, 01 Jan 1970 01:00:00 GMT"}))
    assert await client.engine_time() == 3600.0


@pytest.mark.parametrize("stat", ["", "%%%", "bm8=", "e30=", "W10="])
async def test_size_that_is_none(engine: Engine, client: DockerClient, stat: str) -> None:
    """A file whose size cannot be read has not the size that it should have."""
    engine.on("HEAD /containers/c/archive", Reply(headers={"X-Docker-Container-Path-Stat": stat}))
    assert await client.size_in("c", "/x") in {None, -1}


async def test_attach_without_an_upgrade(engine: Engine, client: DockerClient) -> None:
    """A daemon, or what stands before it, that stays in HTTP is refused at once, also when its answer has no end."""
    engine.on("POST /containers/c/attach", Raw(b"HTTP/1.1 200 OK\r\n\r\n", math.inf))
    with anyio.fail_after(3), pytest.raises(Refused) as caught:
        async with client.attach("c"):
            pass
    assert caught.value.status == 200
