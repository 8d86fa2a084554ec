"""Images: which are looked for, when one is pulled, and what is said of a pull that fails."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.wire.docker import ARCH, IMAGE, Docker
from tests.wire.engine import Peer, Raw, Reply, Request
from tests.wire.runs import SPEC, failure, prepared, run, sandbox

import cloche

pytestmark = pytest.mark.anyio

PULL = "POST /images/create"
OTHER = "registry.example:5000/team/tool:2"
FOUND = {"Id": "sha256:2", "Architecture": ARCH, "Os": "linux"}
OF_OTHER = cloche.Spec(content="pass", name="main.py", timeout=20, image=OTHER)


def words(*said: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(word).encode() + b"\r\n" for word in said)


def chunks(*bodies: bytes) -> list[bytes | float]:
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%s\r\n" % (len(body), body) for body in bodies)]


async def test_here(docker: Docker) -> None:
    """An image that is there is not pulled; it is asked for once in a sandbox's life."""
    await prepared(docker)
    async with sandbox(docker, pull="missing") as opened:
        for _ in range(3):
            await opened.run(SPEC)
    assert not docker.engine.asked(PULL)
    assert len(docker.engine.asked(f"GET /images/{IMAGE}/json")) == 1


async def test_missing(docker: Docker) -> None:
    """An image that is missing is pulled, with its tag, and a box is made from what came."""
    await prepared(docker)
    docker.pullable[OTHER] = FOUND
    assert (await run(docker, OF_OTHER, pull="missing")).stdout == "hi"
    (pull,) = docker.engine.asked(PULL)
    assert pull.query == {"fromImage": "registry.example:5000/team/tool", "tag": "2"}
    assert docker.boxes()[0].body["Image"] == "sha256:2"


async def test_never(docker: Docker) -> None:
    """With CLOCHE_PULL=never a missing image is an error that says how to get it."""
    await prepared(docker)
    error = await failure(docker, OF_OTHER)
    assert error.code == "image-unavailable"
    assert OTHER in error.message
    assert f"docker pull {OTHER}" in error.hint
    assert not docker.engine.asked(PULL)


async def test_always(docker: Docker) -> None:
    """With CLOCHE_PULL=always an image is pulled once in a sandbox's life, also when it is there."""
    await prepared(docker)
    docker.pullable[IMAGE] = {**FOUND, "Id": "sha256:3"}
    async with sandbox(docker, pull="always") as opened:
        for _ in range(3):
            await opened.run(SPEC)
    assert len(docker.engine.asked(PULL)) == 1
    assert {box.body["Image"] for box in docker.boxes()} == {"sha256:3"}


async def test_one_pull_for_all(docker: Docker) -> None:
    """Runs that want the same image wait for one pull; those that want another one do not."""
    await prepared(docker)
    may_go = anyio.Event()

    async def slowly(request: Request, peer: Peer) -> Reply:
        await may_go.wait()
        docker.images[OTHER] = FOUND
        return Reply(body=words({"status": "Pull complete"}))

    docker.engine.on(PULL, slowly)
    got: list[str] = []

    async def one(opened: cloche.Sandbox, spec: cloche.Spec) -> None:
        got.append((await opened.run(spec)).stdout)

    async with sandbox(docker, pull="missing") as opened, anyio.create_task_group() as group:
        group.start_soon(one, opened, OF_OTHER)
        group.start_soon(one, opened, OF_OTHER)
        await docker.engine.wait_for(PULL)
        await one(opened, SPEC)
        assert got == ["hi"]
        may_go.set()
    assert got == ["hi"] * 3
    assert len(docker.engine.asked(PULL)) == 1


@pytest.mark.parametrize("last", [b"\r\n", b""], ids=["line", "no-newline"])
@pytest.mark.parametrize(
    "said",
    [
        {"errorDetail": {"message": "toomanyrequests: slow down"}, "error": "toomanyrequests: slow down"},
        {"error": "toomanyrequests: slow down"},
    ],
    ids=["detail", "error"],
)
async def test_fails_on_the_way(docker: Docker, said: dict[str, Any], last: bytes) -> None:
    """A pull that begins well and fails is image-unavailable, with the image and the daemon's reason."""
    await prepared(docker)
    begin = words({"status": "Pulling from team/tool", "id": "2"}, {"status": "Downloading", "id": "a"})
    docker.engine.on(PULL, Raw(*chunks(begin, json.dumps(said).encode() + last, b"")))
    error = await failure(docker, OF_OTHER, pull="missing")
    assert error.code == "image-unavailable"
    assert OTHER in error.message
    assert "toomanyrequests: slow down" in error.message
    assert "docker login registry.example:5000" in error.hint


@pytest.mark.parametrize(
    ("status", "message"), [(404, "manifest unknown"), (500, "no basic auth credentials"), (403, "denied")]
)
async def test_refused(docker: Docker, status: int, message: str) -> None:
    """A pull that is refused is image-unavailable, with the image and the daemon's reason."""
    await prepared(docker)
    docker.engine.on(PULL, Reply(status, {"message": message}))
    error = await failure(docker, OF_OTHER, pull="missing")
    assert (error.code, error.retryable) == ("image-unavailable", False)
    assert OTHER in error.message
    assert message in error.message


@pytest.mark.parametrize(
    "steps",
    [[], [b"HTTP/1.1 200 OK\r\n"], chunks(words({"status": "Downloading"})), chunks(b"x" * 600_000, b"x" * 600_000)],
    ids=["nothing", "head", "body", "endless-line"],
)
async def test_broken(docker: Docker, steps: list[bytes | float]) -> None:
    """A pull whose connection breaks, or that speaks without an end, is image-unavailable, and may be tried again."""
    await prepared(docker)
    docker.engine.on(PULL, Raw(*steps))
    error = await failure(docker, OF_OTHER, pull="missing")
    assert (error.code, error.retryable) == ("image-unavailable", True)


@pytest.mark.parametrize(
    "body", [b"", b"<html>\n", b"7\n[]\nnull\n", b'{"status": 7, "error": null, "errorDetail": "x"}\n']
)
async def test_says_nothing_of_use(docker: Docker, body: bytes) -> None:
    """Words that make no sense are passed over; whether the image is there then is asked again."""
    await prepared(docker)
    docker.engine.on(PULL, Reply(body=body))
    error = await failure(docker, OF_OTHER, pull="missing")
    assert (error.code, OTHER in error.message) == ("image-unavailable", True)


async def test_tried_again(docker: Docker) -> None:
    """A pull that failed does not keep the next run from trying."""
    await prepared(docker)
    async with sandbox(docker, pull="missing") as opened:
        with pytest.raises(cloche.ImageUnavailable):
            await opened.run(OF_OTHER)
        docker.pullable[OTHER] = FOUND
        assert (await opened.run(OF_OTHER)).stdout == "hi"


@pytest.mark.parametrize(
    "found", [{**FOUND, "Architecture": "s390x"}, {**FOUND, "Os": "windows"}], ids=["architecture", "os"]
)
async def test_for_another_machine(docker: Docker, found: dict[str, Any]) -> None:
    """An image for another kind of machine is refused before a container is made."""
    await prepared(docker)
    docker.images[OTHER] = found
    error = await failure(docker, OF_OTHER)
    assert error.code == "image-unavailable"
    assert f"linux/{ARCH}" in error.message
    assert not docker.made


async def test_malformed_name(docker: Docker) -> None:
    """A name that the daemon finds malformed is image-unavailable."""
    await prepared(docker)
    docker.engine.on("GET /images/A B/json", Reply(400, {"message": "invalid reference format"}))
    error = await failure(docker, cloche.Spec(content="pass", name="main.py", image="A B"))
    assert error.code == "image-unavailable"
    assert "invalid reference format" in error.message


async def test_credentials(docker: Docker, tmp_path: Path) -> None:
    """The registry's credentials go with the pull, and with no other request; another registry's do not."""
    await prepared(docker)
    auth = {"auth": base64.b64encode(b"me:secret").decode()}
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"registry.example:5000": auth}}))
    docker.pullable = {OTHER: FOUND, "elsewhere.example/tool:1": FOUND}
    async with sandbox(docker, pull="missing", docker_config=str(tmp_path)) as opened:
        await opened.run(OF_OTHER)
        await opened.run(cloche.Spec(content="pass", name="main.py", image="elsewhere.example/tool:1"))
    with_auth = [request for request in docker.engine.requests if "x-registry-auth" in request.headers]
    assert [request.query["fromImage"] for request in with_auth] == ["registry.example:5000/team/tool"]
    sent = json.loads(base64.urlsafe_b64decode(with_auth[0].headers["x-registry-auth"]))
    assert sent == {"username": "me", "password": "secret", "serveraddress": "registry.example:5000"}


async def test_progress(docker: Docker, caplog: pytest.LogCaptureFixture) -> None:
    """A pull is told line by line on the logger cloche.progress, the last record of which says that it is over."""
    await prepared(docker)

    def layer(current: int) -> dict[str, Any]:
        return {"status": "Downloading", "id": "a", "progressDetail": {"current": current * 2**20, "total": 4 * 2**20}}

    async def slowly(request: Request, peer: Peer) -> Raw:
        head, *pieces = chunks(words(layer(1)), words(layer(2)), words({"status": "Pull complete", "id": "a"}), b"")
        steps: list[bytes | float] = [head]
        for piece in pieces:
            steps += [piece, 0.15]
        docker.images[OTHER] = FOUND
        return Raw(*steps)

    docker.engine.on(PULL, slowly)
    caplog.set_level(logging.INFO, logger="cloche.progress")
    await run(docker, OF_OTHER, pull="missing")
    records = [record for record in caplog.records if record.name == "cloche.progress"]
    assert [record.getMessage() for record in records] == [
        f"pulling {OTHER}",
        f"pulling {OTHER}: 1.0 of 4.0 MiB",
        f"pulling {OTHER}: 2.0 of 4.0 MiB",
        f"pulling {OTHER}: 4.0 MiB are here, unpacking",
        "",
    ]
    assert [getattr(record, "done", False) for record in records] == [False] * 4 + [True]


async def test_caller_leaves(docker: Docker, caplog: pytest.LogCaptureFixture) -> None:
    """A caller who goes away during a pull ends it, and what was shown of it."""
    await prepared(docker)
    docker.engine.on(PULL, Raw(*chunks(words({"status": "Downloading"})), 60.0))
    caplog.set_level(logging.INFO, logger="cloche.progress")
    async with sandbox(docker, pull="missing") as opened, anyio.create_task_group() as group:
        group.start_soon(opened.run, OF_OTHER)
        await docker.engine.wait_for(PULL)
        await anyio.sleep(0.1)
        group.cancel_scope.cancel()
    assert not docker.made
    assert getattr(caplog.records[-1], "done", False)
