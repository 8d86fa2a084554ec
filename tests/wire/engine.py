r"""A server for tests that speaks real HTTP and does what a table says, also what no good server does.

engine.on("GET /version", Reply(body={"ApiVersion": "1.41"}))
engine.on("GET /info", Raw(b"HTTP/1.1 200 OK\r\nContent-Le", 0.1))  # some bytes, a pause, and the connection is cut
engine.on("DELETE /containers/*", Reply(500), DEFAULT)  # once like this, from then on as it was before
"""

from __future__ import annotations

import asyncio
import fnmatch
import json
import re
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl, unquote

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from cloche._kit.http import Server

MAX_HEAD_BYTES = 2**20
GONE = (OSError, asyncio.IncompleteReadError)
"""The other side has left, however it did it."""


@dataclass(frozen=True)
class Request:
    """What came, with its first line as it was on the wire."""

    line: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def target(self) -> str:
        """Path and query, still encoded."""
        return self.line.split(" ")[1]

    @property
    def path(self) -> str:
        """Decoded, and without the version of the API."""
        return unquote(re.sub(r"^/v\d+\.\d+(?=/)", "", self.target.partition("?")[0]))

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    def json(self) -> Any:
        return json.loads(self.body)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class Reply:
    """A good answer. A ``body`` that is not bytes is sent as JSON."""

    status: int = 200
    body: object = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self, method: str, clock_offset_s: float | None) -> bytes:
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        known = {"Content-Length": str(len(body)), **self.headers}
        if clock_offset_s is not None:
            known["Date"] = formatdate(time.time() + clock_offset_s, usegmt=True)
        head = "".join(f"{name}: {value}\r\n" for name, value in known.items())
        return f"HTTP/1.1 {self.status} Word\r\n{head}\r\n".encode() + (b"" if method == "HEAD" else body)


class Raw:
    """Bytes as they are, and pauses in seconds (``math.inf``: until somebody leaves); then the connection is cut."""

    def __init__(self, *steps: bytes | float) -> None:
        self.steps = steps


class _Default:
    pass


DEFAULT: Final = _Default()
"""What the table said before."""


class Peer:
    """Who is at the other end of a connection.

    On asyncio's own streams: those of anyio over Unix sockets (4.16) may set the result of a read that was cancelled.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer
        # What was sent has left. (Over TLS asyncio stops whoever has as much as the bound, not more, and 0 is for ever.)
        writer.transport.set_write_buffer_limits(high=1, low=0)

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def stop_reading(self) -> None:
        """What comes from now on stays unread: to cut the connection then resets it."""
        transport = self._writer.transport
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()

    def cut(self) -> None:
        self._writer.transport.abort()

    def certificate(self) -> dict[str, Any] | None:
        """What the other side showed of itself; None: nothing."""
        found: dict[str, Any] | None = self._writer.get_extra_info("peercert")
        return found or None


Handler: TypeAlias = Callable[[Request, Peer], Awaitable[Reply | Raw]]
"""Anything else. It may speak on the connection itself, and have it cut by an empty ``Raw()``."""
Word: TypeAlias = Reply | Raw | Handler | _Default


class Engine:
    """The server, and what it was asked."""

    def __init__(self) -> None:
        self.address = ""
        """As in DOCKER_HOST."""
        self.requests: list[Request] = []
        self.clock_offset_s: float | None = 0.0
        """How far its clock is ahead of ours; None: it tells no time."""
        self._table: list[tuple[str, list[Word]]] = []
        self._connections: set[anyio.CancelScope] = set()
        self._stop_listening: Callable[[], None] = lambda: None

    @property
    def server(self) -> Server:
        """For a client."""
        path = self.address.removeprefix("unix://")
        return Server("http://engine", path) if path.startswith("/") else Server(f"http{path.removeprefix('tcp')}")

    def on(self, route: str, *words: Word) -> None:
        """What is said to ``METHOD /path``, where ``*`` stands for anything: each word once, the last one from then on."""
        self._table.insert(0, (route, list(words)))

    def asked(self, route: str) -> list[Request]:
        """The requests so far to which a route applies."""
        return [request for request in self.requests if fnmatch.fnmatchcase(str(request), route)]

    async def wait_for(self, route: str, times: int = 1) -> None:
        """Until a route was asked for so often."""
        with anyio.fail_after(10):
            while len(self.asked(route)) < times:  # noqa: ASYNC110 (it is looked at from outside)
                await anyio.sleep(0.002)

    def cut(self) -> None:
        """Cut all connections."""
        for scope in self._connections:
            scope.cancel()

    def vanish(self) -> None:
        """Cut all connections, and take no more. The path of the socket stays."""
        self._stop_listening()
        self.cut()

    async def listen(self, group: TaskGroup, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve in tasks of the group."""

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            group.start_soon(self._connection, Peer(reader, writer))

        server = await asyncio.start_server(connected, sock=listener, limit=MAX_HEAD_BYTES, ssl=tls)
        self._stop_listening = server.close

    async def _connection(self, peer: Peer) -> None:
        with anyio.CancelScope() as scope:
            self._connections.add(scope)
            try:
                while await self._exchange(peer):
                    pass
            except GONE:
                pass
            finally:
                self._connections.discard(scope)
                peer.cut()

    async def _exchange(self, peer: Peer) -> bool:
        """One request and its answer. False: the connection is to be cut."""
        first = await peer.reader.readexactly(1)
        if not first.isupper():  # no method begins so; Go's server answers like this when somebody speaks TLS to it
            await peer.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n400 Bad Request")
            return False
        head = (first + await peer.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = await peer.reader.readexactly(int(headers.get("content-length", "0")))
        request = Request(head[0], headers, body)
        self.requests.append(request)
        word = self.word(request)
        if not isinstance(word, Reply | Raw):
            word = await word(request, peer)
        if isinstance(word, Reply):
            await peer.send(word.encode(request.method, self.clock_offset_s))
            return True
        for step in word.steps:
            if isinstance(step, bytes):
                await peer.send(step)
            else:
                await anyio.sleep(step)
        return False

    def word(self, request: Request) -> Reply | Raw | Handler:
        """What the table says to a request."""
        for route, words in self._table:
            if fnmatch.fnmatchcase(str(request), route):
                word = words.pop(0) if len(words) > 1 else words[0]
                if not isinstance(word, _Default):
                    return word
        return Reply(404, {"message": f"the test says nothing of {request}"})


@asynccontextmanager
async def serving(
    *, tcp: bool = False, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Engine]:
    """An engine at a Unix socket, whose path is short enough for one, or at a port of the loopback."""
    engine = Engine()
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        if tcp:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, 0), family=family)
            engine.address = f"tcp://{host}:{listener.getsockname()[1]}"
        else:
            path = Path(folder, "engine.sock")
            listener = socket.create_server(str(path), family=socket.AF_UNIX)
            engine.address = f"unix://{path}"
        async with anyio.create_task_group() as group:
            await engine.listen(group, listener, tls)
            yield engine
            engine.vanish()
            group.cancel_scope.cancel()
        await anyio.lowlevel.checkpoint()  # for the loop to close what was cut
