"""An OpenSandbox service in good order, played by an :class:`Engine`, and execd of all its sandboxes, played by another. A test
changes what is to go wrong.

Sandboxes run nothing: what a command prints is written by the test (``OpenSandbox.play``), and comes as the events of execd.
As with a real service on Docker, execd has an address of its own; which sandbox is meant its token tells.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeAlias
from urllib.parse import parse_qsl

import anyio
from anyio import to_thread
from tests.wire.engine import Engine, Peer, Raw, Reply, Request, Word
from tests.wire.kubernetes import FINISHED, HI, attended, chunk

import cloche
from cloche.backends import owners
from cloche.supervisor.binary import machine_name, supervisor_path

KEY = "the-key"
SANDBOXES, EXECD_PORT = "/v1/sandboxes", 44772
CREATE, LIST, DELETE = f"POST {SANDBOXES}", f"GET {SANDBOXES}", f"DELETE {SANDBOXES}/*"
ENDPOINT, LOOK = f"GET {SANDBOXES}/*/endpoints/{EXECD_PORT}", f"GET {SANDBOXES}/sb-{'?' * 32}"
PING, DOWNLOAD, UPLOAD = "GET /ping", "GET /files/download", "POST /files/upload"
COMMAND, INTERRUPT = "POST /command", "DELETE /command"
PROXY = f"/proxy/{EXECD_PORT}"
INSIDE = [PING, DOWNLOAD, DOWNLOAD, UPLOAD, COMMAND]
"""What a healthy run asks of execd; once it asks for its program without a token, to be refused."""
A_RUN = [
    CREATE,
    f"GET {SANDBOXES}/SANDBOX/endpoints/{EXECD_PORT}",
    *INSIDE,
    DELETE[:-1] + "SANDBOX",
]
"""All that it asks."""
EVENTS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nX-Accel-Buffering: no\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
DONE: Mapping[str, Any] = {"type": "execution_complete", "execution_time": 3}
PONG: Mapping[str, Any] = {"type": "ping", "text": "pong"}


def failed(value: str, *trace: str) -> Mapping[str, Any]:
    """The terminal event of a command that did not exit with 0."""
    return {"type": "error", "error": {"ename": "CommandExecError", "evalue": value, "traceback": list(trace)}}


def printed(text: str, stream: str = "stdout") -> Mapping[str, Any]:
    """A line that a command wrote."""
    return {"type": stream, "text": text}


@dataclass(frozen=True)
class Wire:
    """Bytes on the connection of a stream, as they are."""

    data: bytes


class CutError(Exception):
    """The connection breaks here."""


CUT = CutError()
Step: TypeAlias = bytes | Mapping[str, Any] | Wire
"""What the command wrote to stdout, an event, or neither."""
Play: TypeAlias = Callable[["Box"], AsyncIterator[Step]]


def says(*steps: Step | float | CutError) -> Play:
    """What a command says; numbers are pauses in seconds. After it the stream ends."""

    async def play(_: Box) -> AsyncIterator[Step]:
        for step in steps:
            if isinstance(step, CutError):
                raise step
            if isinstance(step, float):
                await anyio.sleep(step)
            else:
                yield step

    return play


def no(status: int, code: str, message: str, **headers: str) -> Reply:
    """The service's no, or execd's."""
    return Reply(status, {"code": code, "message": message}, {name.replace("_", "-"): t for name, t in headers.items()})


GONE = no(404, "DOCKER::SANDBOX_NOT_FOUND", "Sandbox not found.")
ELSEWHERE = Reply(401, {"error": "Unauthorized: invalid or missing header X-EXECD-ACCESS-TOKEN"})


@cache
def program() -> bytes:
    """A program for this machine."""
    return supervisor_path(machine_name(None)).read_bytes()[:4096]


class Box:
    """A sandbox, and what was done in it."""

    def __init__(self, name: str, body: dict[str, Any], created_at: float) -> None:
        self.id = name
        self.body = body
        self.created_at = created_at
        self.state, self.reason, self.message = "Running", "", ""
        self.machine = program()[:64]
        """The beginning of the program that execd is."""
        self.uid = 0
        """Whom the image starts as."""
        self.files: dict[str, tuple[int, bytes]] = {}
        self.commands: list[dict[str, Any]] = []
        self.interrupted = anyio.Event()
        self.running: dict[str, anyio.Event] = {}
        """Commands, and when they end."""
        self.streams: set[anyio.CancelScope] = set()

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.body.get("metadata") or {})

    @property
    def token(self) -> str:
        return str((self.body.get("env") or {}).get("EXECD_ACCESS_TOKEN", ""))

    @property
    def bundle(self) -> bytes:
        """What was uploaded beside the supervisor."""
        return self.files["/opt/cloche/bundle"][1]

    def shown(self) -> dict[str, Any]:
        """As the service shows it."""
        status = {"state": self.state, "reason": self.reason, "message": self.message}
        made = datetime.fromtimestamp(self.created_at, UTC).isoformat().replace("+00:00", "Z")
        return {"id": self.id, "status": status, "metadata": self.metadata, "createdAt": made}

    def ends(self, state: str = "Failed", message: str = "") -> None:
        """It stops by itself, or somebody stops it: whatever it had to say breaks off."""
        self.state, self.message = state, message
        self.cut()

    def cut(self) -> None:
        """Whatever it had to say breaks off."""
        for scope in list(self.streams):
            scope.cancel()


class OpenSandbox:
    """The service. ``boxes`` are the sandboxes that are there, ``made`` all that ever were."""

    def __init__(self, engine: Engine, execd: Engine) -> None:
        self.engine = engine
        self.execd = execd
        # One list, in the order in which they came.
        self.requests = execd.requests = engine.requests
        self.base = f"http{engine.address.removeprefix('tcp')}"
        self.play = says(HI, DONE)
        self.old = False
        """Whether execd is one up to 1.1.0: no argv, lines without their ends, streams that stay open for a while."""
        self.linger_s = 0.0
        """For so long a stream stays open after its last event."""
        self.page = 200
        """Sandboxes in a list, at most."""
        self.boxes: dict[str, Box] = {}
        self.made: list[Box] = []
        self.new_id: Callable[[], str] = lambda: f"sb-{secrets.token_hex(16)}"
        self.command_id: Callable[[], str] = lambda: secrets.token_hex(16)
        self.places: Callable[[Box], None] = lambda box: None
        """What becomes of a new sandbox."""
        table: dict[str, Word] = {
            "GET /health": Reply(body={"status": "healthy"}),
            "GET /version": Reply(body={"version": "1.1.1"}),
            CREATE: self.create,
            LIST: self.list,
            f"GET {SANDBOXES}/*": self.get,
            f"GET {SANDBOXES}/*/diagnostics/events": Reply(body={"content": ""}),
            DELETE: self.delete,
            f"GET {SANDBOXES}/*/endpoints/*": self.endpoint,
            f"* {SANDBOXES}/*{PROXY}/*": self.proxy,
        }
        for route, word in table.items():
            engine.on(route, word)
        inside: dict[str, Word] = {
            PING: self.ping,
            DOWNLOAD: self.download,
            UPLOAD: self.upload,
            COMMAND: self.command,
            INTERRUPT: self.interrupt,
        }
        for route, word in inside.items():
            method, _, path = route.partition(" ")
            execd.on(route, word)
            execd.on(f"{method} {PROXY}{path}", word)

    @property
    def execd_address(self) -> str:
        """Host and port of execd."""
        return self.execd.address.removeprefix("tcp://")

    def settings(self, **more: Any) -> cloche.Settings:
        """Settings that lead to this service."""
        known = {"mode": "opensandbox", "fallback": False, "opensandbox_api_url": self.base, "opensandbox_api_key": KEY}
        return cloche.Settings.model_validate({**known, **more})

    def to_execd(self) -> list[Request]:
        """What execd was asked at its own address."""
        return [request for request in self.requests if request.headers["host"] == self.execd_address]

    def to_service(self) -> list[Request]:
        """What the service was asked."""
        return [request for request in self.requests if request.headers["host"] != self.execd_address]

    def tokens(self) -> list[str]:
        """The tokens that execd was shown; empty: none was."""
        return [request.headers.get("x-execd-access-token", "") for request in self.to_execd()]

    def program_is(self, word: Reply | Raw) -> None:
        """What is said to whoever asks for execd's program and shows a token."""

        async def download(request: Request, _: Peer) -> Reply | Raw:
            return ELSEWHERE if self._box(request) is None else word

        self.execd.on(DOWNLOAD, download)

    def asked(self) -> list[str]:
        """What was asked so far, without names that are made up."""
        found = list(map(str, self.requests))
        for box in self.made:
            found = [said.replace(box.id, "SANDBOX") for said in found]
        return found

    def add(self, name: str, metadata: Mapping[str, str], age_s: float = 3600.0) -> Box:
        """A sandbox that somebody else made, so long ago by the service's clock."""
        now = time.time() + (self.engine.clock_offset_s or 0.0)
        box = self.boxes[name] = Box(name, {"metadata": dict(metadata)}, now - age_s)
        return box

    # --- what the service is asked ------------------------------------------------------------------------------------

    def _key_is_missing(self, request: Request) -> Reply | None:
        given = request.headers.get("open-sandbox-api-key")
        if given == KEY:
            return None
        said = ("MISSING", "is missing") if given is None else ("INVALID", "is not valid")
        return no(401, f"{said[0]}_API_KEY", f"The API key {said[1]}.", X_Request_ID="req-401")

    async def create(self, request: Request, _: Peer) -> Reply:
        if (refused := self._key_is_missing(request)) is not None:
            return refused
        box = Box(self.new_id(), request.json(), time.time() + (self.engine.clock_offset_s or 0.0))
        self.boxes[box.id] = box
        self.made.append(box)
        self.places(box)
        return Reply(202, box.shown(), {"X-Request-ID": "req-create"})

    async def list(self, request: Request, _: Peer) -> Reply:
        if (refused := self._key_is_missing(request)) is not None:
            return refused
        wanted = dict(parse_qsl(request.query.get("metadata", ""), keep_blank_values=True)).items()
        found = [box for box in self.boxes.values() if wanted <= box.metadata.items()]
        size, page = min(int(request.query.get("pageSize", "20")), self.page), int(request.query.get("page", "1"))
        more = page * size < len(found)
        items = [box.shown() for box in found[(page - 1) * size : page * size]]
        return Reply(200, {"items": items, "pagination": {"page": page, "pageSize": size, "hasNextPage": more}})

    async def get(self, request: Request, _: Peer) -> Reply:
        if (refused := self._key_is_missing(request)) is not None:
            return refused
        box = self.boxes.get(request.path.split("/")[3])
        return GONE if box is None else Reply(200, box.shown())

    async def delete(self, request: Request, _: Peer) -> Reply:
        if (refused := self._key_is_missing(request)) is not None:
            return refused
        box = self.boxes.pop(request.path.split("/")[3], None)
        if box is None:
            return GONE
        box.cut()
        return Reply(204)

    async def endpoint(self, request: Request, _: Peer) -> Reply:
        if (refused := self._key_is_missing(request)) is not None:
            return refused
        name, port = request.path.split("/")[3], request.path.rpartition("/")[2]
        if name not in self.boxes:
            return GONE
        if request.query.get("use_server_proxy") == "true":
            return Reply(body={"endpoint": f"{request.headers['host']}{SANDBOXES}/{name}/proxy/{port}"})
        return Reply(body={"endpoint": f"{self.execd_address}/proxy/{port}"})

    async def proxy(self, request: Request, peer: Peer) -> Reply | Raw:
        """The service passes a request on to execd."""
        method, target, version = request.line.split(" ")
        inner = replace(request, line=f"{method} {target.partition(PROXY)[2]} {version}")
        word = self.execd.word(inner)
        return word if isinstance(word, Reply | Raw) else await word(inner, peer)

    # --- what execd is asked ------------------------------------------------------------------------------------------

    def _box(self, request: Request) -> Box | None:
        given = request.headers.get("x-execd-access-token", "")
        return next((box for box in self.boxes.values() if box.token and box.token == given), None)

    async def ping(self, request: Request, _: Peer) -> Reply:
        return Reply() if self._box(request) is not None or not self.old else ELSEWHERE

    async def download(self, request: Request, _: Peer) -> Reply:
        if (box := self._box(request)) is None:
            return ELSEWHERE
        if request.query["path"] != "/proc/self/exe":
            return no(404, "FILE_NOT_FOUND", "no such file")
        assert request.headers["range"] == "bytes=0-63"
        return Reply(206, box.machine)

    async def upload(self, request: Request, _: Peer) -> Reply:
        if (box := self._box(request)) is None:
            return ELSEWHERE
        given = list(parts(request))
        assert [name for name, _ in given] == ["metadata", "file"] * (len(given) // 2)
        if box.uid:
            return no(500, "RUNTIME_ERROR", "mkdir /opt/cloche: permission denied")
        for (__, about), (__, content) in zip(given[::2], given[1::2], strict=True):
            described = json.loads(about)
            box.files[described["path"]] = described["mode"], content
        return Reply()

    async def command(self, request: Request, peer: Peer) -> Reply | Raw:
        if (box := self._box(request)) is None:
            return ELSEWHERE
        body = request.json()
        if ("command" in body) == ("argv" in body and not self.old):
            return no(400, "INVALID_REQUEST_BODY", "error validating request, invalid value: command")
        box.commands.append(body)
        name, ended = self.command_id(), anyio.Event()
        box.running[name] = ended
        async with attended(peer) as scope:
            box.streams.add(scope)
            try:
                await peer.send(EVENTS)
                async for data in self._stream(box, name, body):
                    await peer.send(data)
                await peer.send(FINISHED)
            except CutError:
                pass
            finally:
                box.streams.discard(scope)
                ended.set()
                del box.running[name]
        return Raw()

    async def _stream(self, box: Box, name: str, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        yield event({"type": "init", "text": name})
        yield event(PONG)
        play = says(f"{box.uid}\n".encode(), DONE) if body.get("command") == "id -u" else self.play
        async for step in play(box):
            if isinstance(step, Wire):
                yield step.data
            elif isinstance(step, bytes):
                for line in step.splitlines(keepends=True):
                    yield event(printed((line.removesuffix(b"\n") if self.old else line).decode()))
            else:
                yield event(step)
                if step.get("type") in {"error", "execution_complete"}:
                    await anyio.sleep(self.linger_s)

    async def interrupt(self, request: Request, _: Peer) -> Reply:
        if (box := self._box(request)) is None:
            return ELSEWHERE
        ended = box.running.get(request.query["id"])
        if ended is None:
            return no(500, "RUNTIME_ERROR", "no such process")
        box.interrupted.set()
        with anyio.move_on_after(3):
            await ended.wait()
        return Reply()


def event(found: Mapping[str, Any]) -> bytes:
    """An event, as execd writes it, in a chunk of its own."""
    return chunk(json.dumps({**found, "timestamp": 1}).encode() + b"\n\n")


def parts(request: Request) -> Iterator[tuple[str, bytes]]:
    """The files of a form."""
    boundary = request.headers["content-type"].partition("boundary=")[2].encode()
    first, *found, last = (b"\r\n" + request.body).split(b"\r\n--" + boundary)
    assert (first, last) == (b"", b"--\r\n")
    for part in found:
        head, _, content = part.partition(b"\r\n\r\n")
        assert b"filename=" in head  # a field without is not seen
        match = re.search(rb'[ ;]name="(\w+)"', head)
        assert match is not None
        yield match[1].decode(), content


async def is_left(owner: str) -> bool:
    """Whether an owner who has closed let it be known that something of his is still there."""
    return await to_thread.run_sync(_has_file, owner)


def _has_file(owner: str) -> bool:
    return (owners.state_folder() / f"{owner}.owner").exists()
