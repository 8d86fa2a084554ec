"""Services for the tests: `cloche serve` as a process of its own, and one in the test's own loop over an engine that plays."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx2
import psutil
import uvicorn
from anyio.abc import SocketStream
from structlog.testing import capture_logs

from cloche.runtime import Sandbox
from cloche.server.app import open_service
from cloche.server.auth import Caller, Doorkeeper
from cloche.server.process import make_server
from cloche.server.routes import Readiness
from cloche.server.runs import Runs
from cloche.server.uploads import Room
from cloche.settings import Settings
from cloche.testing.fake import FakeBackend
from cloche.wire import event_from_dict

ALICE, BOB = "alice-has-a-long-token", "bob-has-another-token"
START_S = 60.0
"""On a busy machine Python alone takes seconds to start."""


def spec(content: str, name: str = "a.sh", **fields: Any) -> dict[str, Any]:
    """A spec as JSON."""
    return {"content": content, "name": name, **fields}


def tar_of(files: Mapping[str, bytes | str]) -> bytes:
    """A tar file of these files."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", errors="surrogateescape") as tar:
        for name, data in files.items():
            content = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def form(given: Mapping[str, Any], workspace: bytes | None = None, stdin: bytes | None = None) -> dict[str, Any]:
    """A spec with its workspace, as httpx takes a form."""
    parts: dict[str, Any] = {"spec": (None, json.dumps(given), "application/json")}
    if workspace is not None:
        parts["workspace"] = ("w.tar", workspace, "application/octet-stream")
    if stdin is not None:
        parts["stdin"] = ("stdin", stdin, "application/octet-stream")
    return parts


def raw_request(method: str, path: str, body: bytes = b"", *, token: str | None = None, **headers: str) -> bytes:
    """A request as bytes. Underscores in the names of headers are hyphens."""
    lines = [f"{method} {path} HTTP/1.1", "Host: cloche.example"]
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if body and "Content-Length" not in named and "Transfer-Encoding" not in named:
        named["Content-Length"] = str(len(body))
    if token is not None:
        named["Authorization"] = f"Bearer {token}"
    lines += [f"{name}: {value}" for name, value in named.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def raw_run(given: Mapping[str, Any], *, token: str | None = None, path: str = "/v1/runs", **headers: str) -> bytes:
    """A request for a run as bytes."""
    return raw_request(
        "POST", path, json.dumps(given).encode(), token=token, **{"Content_Type": "application/json", **headers}
    )


@dataclass
class Served:
    """A service that listens."""

    port: int
    process: subprocess.Popen[bytes] = field(repr=False)
    log_path: Path
    folder: Path
    """Where it puts what requests bring."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, token: str | None = None) -> httpx2.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def ask(self, request: bytes) -> bytes:
        """All that comes back on a connection, until the service closes it or falls silent."""
        with self.connect() as connection:
            connection.sendall(request)
            connection.settimeout(5)
            got = b""
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while piece := connection.recv(65536):
                    got += piece
                    if b"Connection: close" not in request and _whole(got):
                        break
            return got

    def log(self) -> str:
        return self.log_path.read_text()

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log().splitlines()]

    def rss(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def uploads(self) -> list[Path]:
        """Folders of what requests brought that are there now."""
        return [path for path in self.folder.glob("cloche-serve-*/*") if path.name != "lock"]


def _whole(answer: bytes) -> bool:
    head, blank, body = answer.partition(b"\r\n\r\n")
    if not blank or head.startswith(b"HTTP/1.1 100"):
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
    return False


def serve_command(**settings: str) -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("CLOCHE_", "WEKNORA_"))}
    return [sys.executable, "-m", "cloche", "serve"], {
        **environ,
        "CLOCHE_SERVE_ADDRESS": "127.0.0.1:0",
        "PYTHONWARNINGS": "error",
        **settings,
    }


@contextmanager
def serving(**settings: str) -> Iterator[Served]:
    """`cloche serve` in the mode local, with these settings. It is killed in the end if it still runs."""
    with tempfile.TemporaryDirectory(prefix="serving-") as place:
        folder = Path(settings.setdefault("TMPDIR", place))
        log_path = Path(place, "log")
        command, environ = serve_command(**settings)
        with log_path.open("wb") as log:
            process = subprocess.Popen(command, env=environ, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield Served(_port(process, log_path), process, log_path, folder)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                finally:
                    process.kill()
                    process.wait()


def _port(process: subprocess.Popen[bytes], log_path: Path) -> int:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        for line in log_path.read_text().splitlines(keepends=True):
            if line.endswith("\n") and '"listening"' in line:
                return int(json.loads(line)["address"].rpartition(":")[2])
        time.sleep(0.02)
    raise AssertionError(f"the service does not listen: {log_path.read_text()}")


def until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait for something that comes by itself."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream, with their names; comments are passed over."""
    found = []
    for message in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in message.splitlines() if line and not line.startswith(":"))
        if fields:
            assert fields.keys() == {"event", "data"}
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def as_events(text: str) -> list[Any]:
    """The same, as the library has them."""
    return [event_from_dict(data) for _, data in events_of(text)]


# --- in the test's own loop --------------------------------------------------------------------------------------------


@dataclass
class Here:
    """A service in the test's own loop."""

    port: int
    sandbox: Sandbox
    runs: Runs
    readiness: Readiness
    room: Room
    server: uvicorn.Server = field(repr=False)
    client: httpx2.AsyncClient = field(repr=False)

    log: list[Any] = field(repr=False)
    held: AsyncExitStack = field(repr=False)

    async def connect(self) -> SocketStream:
        """A connection, closed in the end."""
        return await self.held.enter_async_context(await anyio.connect_tcp("127.0.0.1", self.port))


@asynccontextmanager
async def serving_here(
    backend: FakeBackend, *callers: tuple[str, Caller], body_s: float | None = None, **settings: Any
) -> AsyncIterator[Here]:
    """A service over an engine that plays; ``callers`` are tokens and whose they are."""
    with capture_logs() as log, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)  # noqa: FBT003 (the socket's own signature)
        port = listener.getsockname()[1]
        async with (
            Sandbox(Settings.model_validate(settings), backends={"local": backend.factory}) as sandbox,
            open_service(sandbox, Doorkeeper(callers)) as (app, runs),
        ):
            if body_s is not None:
                app.state.service.body_s = body_s
            server = make_server(app)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.serve, [listener])
                headers = {"Authorization": f"Bearer {callers[0][0]}"} if callers else {}
                async with AsyncExitStack() as held:
                    client = await held.enter_async_context(
                        httpx2.AsyncClient(
                            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30, trust_env=False
                        )
                    )
                    service = app.state.service
                    yield Here(port, sandbox, runs, service.readiness, service.uploads.room, server, client, log, held)
                runs.kill_all()
                server.should_exit = True


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something in this loop that comes by itself."""
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 (what is waited for is looked at from outside)
            await anyio.sleep(0.005)
