"""A Docker daemon in good order, played by an :class:`Engine`. A test changes what is to go wrong.

Containers run nothing: what comes out of one is written by the test (``Docker.play``), in real frames in Docker's real pieces.
"""

from __future__ import annotations

import io
import json
import platform
import secrets
import tarfile
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeAlias

import anyio
from tests.wire.engine import GONE, Engine, Peer, Raw, Reply, Request

import cloche
from cloche.supervisor.frames import Data, Frame
from cloche.testing.fake import begin, encode_frames, end

ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
IMAGE = "python:3.12-slim"
VERSION = {
    "ApiVersion": "1.51",
    "MinAPIVersion": "1.24",
    "Version": "28.3.0",
    "Os": "linux",
    "Arch": ARCH,
    "KernelVersion": "6.1.0",
}
INFO = {
    "Runtimes": {"runc": {}, "runsc": {}},
    "DefaultRuntime": "runc",
    "SecurityOptions": ["name=seccomp,profile=builtin", "name=cgroupns"],
    "NCPU": 2,
    "MemoryLimit": True,
    "SwapLimit": True,
    "PidsLimit": True,
    "CpuCfsQuota": True,
    "CgroupVersion": "2",
}
UPGRADED = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
LAST_RECORD = b"Z\0\0\0\0"
"""Of a bundle."""


def piece(number: int, data: bytes) -> bytes:
    """What a container wrote to stdout (1) or stderr (2), as the daemon passes it on."""
    return bytes([number, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


def frames(*given: Frame) -> bytes:
    """What the supervisor writes, as the daemon passes it on."""
    return piece(1, encode_frames(given))


BEGIN: list[Any] = begin()
HI = frames(*BEGIN, Data("stdout", 0, b"hi"), end(stdout=2))


class Container:
    """One that was made."""

    def __init__(self, name: str, body: dict[str, Any]) -> None:
        self.id = secrets.token_hex(32)
        self.name = name
        self.body = body
        self.stdin = bytearray()
        self.started = anyio.Event()
        self.fed = anyio.Event()
        self.signalled = anyio.Event()
        self.streams = anyio.CancelScope()

    async def swallow(self, peer: Peer) -> None:
        """Take what is written to it, until nobody is there any more."""
        try:
            while data := await peer.reader.read(65536):
                self.stdin += data
                if self.stdin.endswith(LAST_RECORD):
                    self.fed.set()
        except GONE:
            pass
        self.streams.cancel()


Play: TypeAlias = Callable[[Container], AsyncIterator[bytes]]


def says(*steps: bytes | float) -> Play:
    """What comes out of a container, once it has its bundle; numbers are pauses in seconds."""

    async def play(container: Container) -> AsyncIterator[bytes]:
        await container.fed.wait()
        for step in steps:
            if isinstance(step, bytes):
                yield step
            else:
                await anyio.sleep(step)

    return play


class Docker:
    """The daemon. ``containers`` are those that are there, ``made`` all that ever were, ``removed`` their names."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.play = says(HI)
        self.state: dict[str, Any] = {"Running": False, "OOMKilled": False, "ExitCode": 0, "Error": ""}
        self.images: dict[str, dict[str, Any]] = {IMAGE: {"Id": "sha256:1", "Architecture": ARCH, "Os": "linux"}}
        self.pullable: dict[str, dict[str, Any]] = {}
        self.containers: dict[str, Container] = {}
        self.made: list[Container] = []
        self.removed: list[str] = []
        self.volumes: dict[str, Mapping[str, str]] = {}
        self.program_bytes: int | None = None
        """Of the supervisor in its volume."""
        engine.on("GET /version", Reply(body=VERSION))
        engine.on("GET /info", Reply(body=INFO))
        engine.on("GET /_ping", Reply(body=b"OK"))
        engine.on("GET /events", Reply(body=b""))
        engine.on("GET /images/*/json", self._image)
        engine.on("POST /images/create", self._pull)
        engine.on("GET /volumes/*", self._volume)
        engine.on("GET /volumes", self._list_volumes)
        engine.on("POST /volumes/create", self._create_volume)
        engine.on("DELETE /volumes/*", self._remove_volume)
        engine.on("GET /containers/*/json", self._inspect)
        engine.on("GET /containers/json", self._list)
        engine.on("POST /containers/create", self.create)
        engine.on("POST /containers/*/attach", self._attach)
        engine.on("POST /containers/*/start", self._start)
        engine.on("POST /containers/*/update", Reply(body={"Warnings": []}))
        engine.on("POST /containers/*/kill", self._kill)
        engine.on("POST /containers/*/wait", self._wait)
        engine.on("DELETE /containers/*", self.remove)
        engine.on("HEAD /containers/*/archive", self._stat)
        engine.on("PUT /containers/*/archive", self._unpack)

    def settings(self, **more: Any) -> cloche.Settings:
        """Settings that lead to this daemon and to no other."""
        known = {"mode": "docker", "fallback": False, "docker_host": self.engine.address, "pull": "never"}
        return cloche.Settings.model_validate({"docker_config": "/nonexistent", **known, **more})

    def boxes(self) -> list[Container]:
        """Those of runs, made so far."""
        return [made for made in self.made if "cloche.run" in made.body["Labels"]]

    def add(self, name: str, **labels: str) -> Container:
        """A container that somebody else made."""
        made = Container(name, {"Labels": {key.replace("_", "."): value for key, value in labels.items()}})
        self.made.append(made)
        self.containers[name] = made
        return made

    async def create(self, request: Request, _: Peer) -> Reply:
        name, body = request.query["name"], request.json()
        if name in self.containers:
            return Reply(409, {"message": f'Conflict. The container name "/{name}" is already in use'})
        made = Container(name, body)
        self.made.append(made)
        self.containers[name] = made
        for mount in body["HostConfig"]["Mounts"]:
            self.volumes.setdefault(mount["Source"], {})
        return Reply(201, {"Id": made.id, "Warnings": []})

    def _of(self, request: Request) -> Container | None:
        name = request.path.split("/")[2]
        return next((found for found in self.containers.values() if name in {found.name, found.id}), None)

    async def _attach(self, request: Request, peer: Peer) -> Reply | Raw:
        if (found := self._of(request)) is None:
            return _no("container")
        await peer.send(UPGRADED)
        with found.streams:
            async with anyio.create_task_group() as group:
                group.start_soon(found.swallow, peer)
                await found.started.wait()
                async for data in self.play(found):
                    await peer.send(data)
                group.cancel_scope.cancel()
        return Raw()

    async def _start(self, request: Request, _: Peer) -> Reply:
        if (found := self._of(request)) is None:
            return _no("container")
        found.started.set()
        return Reply(204)

    async def _kill(self, request: Request, _: Peer) -> Reply:
        if (found := self._of(request)) is None:
            return _no("container")
        found.signalled.set()
        return Reply(204)

    async def _wait(self, request: Request, _: Peer) -> Reply:
        return _no("container") if self._of(request) is None else Reply(body={"StatusCode": 0})

    async def _inspect(self, request: Request, _: Peer) -> Reply:
        return _no("container") if self._of(request) is None else Reply(body={"State": self.state})

    async def _list(self, request: Request, _: Peer) -> Reply:
        (label,) = json.loads(request.query["filters"])["label"]
        found = [made for made in self.containers.values() if label in made.body["Labels"]]
        return Reply(
            body=[{"Id": made.id, "Names": [f"/{made.name}"], "Labels": made.body["Labels"]} for made in found]
        )

    async def remove(self, request: Request, _: Peer) -> Reply:
        if (found := self._of(request)) is None:
            return _no("container")
        found.streams.cancel()
        del self.containers[found.name]
        self.removed.append(found.name)
        return Reply(204)

    async def _stat(self, request: Request, _: Peer) -> Reply:
        if self.program_bytes is None:
            return _no("file")
        stat = json.dumps({"name": "supervisor", "size": self.program_bytes}).encode()
        return Reply(headers={"X-Docker-Container-Path-Stat": b64encode(stat).decode()})

    async def _unpack(self, request: Request, _: Peer) -> Reply:
        with tarfile.open(fileobj=io.BytesIO(request.body)) as archive:
            (member,) = archive.getmembers()
        self.program_bytes = member.size
        return Reply()

    async def _image(self, request: Request, _: Peer) -> Reply:
        name = request.path.removeprefix("/images/").removesuffix("/json")
        found = self.images.get(name)
        return _no("image") if found is None else Reply(body=found)

    async def _pull(self, request: Request, _: Peer) -> Reply:
        name = f"{request.query['fromImage']}:{request.query['tag']}"
        if (found := self.pullable.get(name)) is None:
            return Reply(404, {"message": f"manifest for {name} not found"})
        self.images[name] = found
        return Reply(body=b'{"status": "Pull complete", "id": "0"}\r\n')

    async def _volume(self, request: Request, _: Peer) -> Reply:
        name = request.path.removeprefix("/volumes/")
        return Reply(body={"Labels": self.volumes[name]}) if name in self.volumes else _no("volume")

    async def _list_volumes(self, request: Request, _: Peer) -> Reply:
        (label,) = json.loads(request.query["filters"])["label"]
        found = [{"Name": name, "Labels": labels} for name, labels in self.volumes.items() if label in labels]
        return Reply(body={"Volumes": found or None})

    async def _create_volume(self, request: Request, _: Peer) -> Reply:
        body = request.json()
        self.volumes.setdefault(body["Name"], body["Labels"])
        return Reply(201, {"Name": body["Name"]})

    async def _remove_volume(self, request: Request, _: Peer) -> Reply:
        self.volumes.pop(request.path.removeprefix("/volumes/"), None)
        return Reply(204)


def _no(what: str) -> Reply:
    return Reply(404, {"message": f"No such {what}"})
