"""An engine's HTTP API over its unix socket: as much of it as is needed to fill a daemon and to try it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode

from tests.engines.docker import images

SECONDS = 300.0
PING_S = 5.0


class EngineError(RuntimeError):
    """The engine said no."""


@dataclass(frozen=True)
class Ran:
    """What became of a container."""

    exit_code: int
    oom_killed: bool
    output: bytes
    """Both streams, in the order of their frames."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("engine", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Engine:
    """Asks the engine that listens on a socket. Every question has a connection of its own."""

    def __init__(self, path: Path, *, timeout: float = SECONDS) -> None:
        self.path = path
        self.timeout = timeout

    def ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, object] | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """The answer's body. ``body`` is an open file, or becomes JSON.

        Raises:
            EngineError: the engine answered with an error.
            OSError: nobody answers.
        """
        target = quote(path) + (f"?{urlencode(query, doseq=True)}" if query else "")
        sent: bytes | IO[bytes] | None
        kind = {"Content-Type": "application/json"}
        if isinstance(body, io.BufferedReader):
            sent, kind = (
                body,
                {"Content-Type": "application/x-tar", "Content-Length": str(os.fstat(body.fileno()).st_size)},
            )
        else:
            sent = None if body is None else json.dumps(body).encode()
        connection = _Connection(self.path, self.timeout)
        try:
            connection.request(method, target, sent, {**kind, **(headers or {})})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise EngineError(f"{method} {target}: {answer.status} {content.decode(errors='replace').strip()}")
        return content

    def get(self, path: str, **query: object) -> Any:
        """What the engine tells in JSON."""
        return json.loads(self.ask("GET", path, query))

    def answers(self) -> bool:
        """Whether somebody is there."""
        try:
            return Engine(self.path, timeout=PING_S).ask("GET", "/_ping") == b"OK"
        except (OSError, http.client.HTTPException, EngineError):
            return False

    def add(self, image: images.Image) -> None:
        """Give the engine an image, unless it has it from the same recipe."""
        labels = image.labels
        try:
            has: dict[str, str] = self.get(f"/images/{image.name}/json")["Config"]["Labels"] or {}
        except EngineError:
            has = {}
        if labels.items() <= has.items():
            return
        changes = [*image.changes, *(f"LABEL {name}={value}" for name, value in labels.items())]
        with open(image.obtain(), "rb") as file:
            # podman knows no parameter for the tag; both take one in the name.
            query = {"fromSrc": "-", "repo": image.name, "changes": changes}
            self._watch(self.ask("POST", "/images/create", query, file))

    def push(self, image: str, to: str, *, user: str = "", password: str = "") -> str:
        """Tag an image of the engine as ``registry/name:tag`` and push it there; gives its digest."""
        name, _, tag = to.rpartition(":")
        self.ask("POST", f"/images/{image}/tag", {"repo": name, "tag": tag})
        secret = json.dumps({"username": user, "password": password, "serveraddress": name.partition("/")[0]})
        header = {"X-Registry-Auth": base64.urlsafe_b64encode(secret.encode()).decode()}
        digest = ""
        for line in self._watch(self.ask("POST", f"/images/{name}/push", {"tag": tag}, headers=header)):
            digest = (line.get("aux") or {}).get("Digest", digest)
        return digest

    def run(self, image: str, *command: str, **host: object) -> Ran:
        """Run a container to its end, with a HostConfig, and remove it."""
        config = {"Image": image, "Cmd": command, "HostConfig": host}
        name: str = json.loads(self.ask("POST", "/containers/create", body=config))["Id"]
        try:
            self.ask("POST", f"/containers/{name}/start")
            self.ask("POST", f"/containers/{name}/wait")
            state = self.get(f"/containers/{name}/json")["State"]
            raw = self.ask("GET", f"/containers/{name}/logs", {"stdout": 1, "stderr": 1})
        finally:
            self.ask("DELETE", f"/containers/{name}", {"force": 1, "v": 1})
        return Ran(state["ExitCode"], state["OOMKilled"], b"".join(_frames(raw)))

    @staticmethod
    def _watch(content: bytes) -> list[dict[str, Any]]:
        """The lines of a progress report. It begins with 200 whatever comes, so an error stands in a line.

        Raises:
            EngineError: one of them is an error.
        """
        lines = [json.loads(line) for line in content.splitlines() if line.strip()]
        for line in lines:
            if "error" in line:
                raise EngineError(str(line["error"]))
        return lines


def _frames(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at + 8 <= len(raw):
        size = int.from_bytes(raw[at + 4 : at + 8], "big")
        yield raw[at + 8 : at + 8 + size]
        at += 8 + size
