"""What stands in the first line of a request: whatever a name has in it, it stays where it was put."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.wire.engine import Engine, Reply

from cloche._kit.http import HttpClient, segment
from cloche.backends.docker.client import DockerClient

pytestmark = pytest.mark.anyio

NAMES = [
    "a/b",
    "a?b=c",
    "a#b",
    "a%2fb",
    "a%",
    "a b",
    "a\r\nX-Evil: 1",
    "ä",
    "\0",
    ".",
    "..",
    "../..",
    "%2e%2e",
    "a;b",
    "a:1@b",
]


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[HttpClient]:
    engine.on("*", Reply())
    client = HttpClient(engine.server)
    yield client
    await client.aclose()


@pytest.mark.parametrize("name", NAMES)
async def test_segment(engine: Engine, client: HttpClient, name: str) -> None:
    """A segment of a path comes out as the same one segment, between what stands before and after it."""
    await client.request("GET", f"/v1/things/{segment(name)}/json", query={"q": "1"}, timeout_s=10, max_bytes=10)
    (request,) = engine.requests
    assert request.target.count("/") == 4
    assert request.path == f"/v1/things/{name}/json"
    assert request.query == {"q": "1"}
    assert "x-evil" not in request.headers


@pytest.mark.parametrize("name", NAMES)
async def test_query(engine: Engine, client: HttpClient, name: str) -> None:
    """A value in a query comes out as it was put in, beside the others."""
    await client.request("GET", "/x", query={"a": name, "b": "2"}, timeout_s=10, max_bytes=10)
    (request,) = engine.requests
    assert request.path == "/x"
    assert request.query == {"a": name, "b": "2"}


async def test_numbers_and_booleans(engine: Engine, client: HttpClient) -> None:
    """Numbers are written plainly, booleans as JSON has them; without a query there is no question mark."""
    await client.request("GET", "/x", query={"yes": True, "no": False, "n": 7}, timeout_s=10, max_bytes=10)
    await client.request("GET", "/x", timeout_s=10, max_bytes=10)
    assert [request.target for request in engine.requests] == ["/x?yes=true&no=false&n=7", "/x"]


async def test_host(engine: Engine, client: HttpClient) -> None:
    """A request over a Unix socket names the host that the server was given."""
    await client.request("GET", "/x", timeout_s=10, max_bytes=10)
    assert engine.requests[0].headers["host"] == "engine"


@pytest.mark.parametrize("name", ["../containers/json?all=1&x=", "../../containers/x", "a/../../info?", "./x", "a?b#c"])
async def test_image(engine: Engine, name: str) -> None:
    """The name of an image, which comes from a spec, asks for an image and for nothing else."""
    engine.on("*", Reply(body={}))
    client = DockerClient(engine.server)
    await client.image(name)
    await client.aclose()
    (request,) = engine.requests
    assert request.target.startswith("/images/")
    assert request.target.endswith("/json")
    assert "/../" not in request.target
    assert request.query == {}
    assert request.path == f"/images/{name}/json"


@pytest.mark.parametrize("name", ["../x", "a?force=false", "a#b"])
async def test_container(engine: Engine, name: str) -> None:
    """Neither does the name of a container, which may come from the daemon, lead anywhere else."""
    engine.on("*", Reply(204))
    client = DockerClient(engine.server)
    await client.remove(name)
    await client.aclose()
    (request,) = engine.requests
    assert request.path == f"/containers/{name}"
    assert request.query == {"force": "true", "v": "true"}
