"""Stands between cloche and a Docker daemon, and changes what cloche asks for: the engine that keeps less than it promises."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Change = Callable[[dict[str, Any]], None]
"""Of the body of a request to create a container, or to update one, in place."""
_WITH_LIMITS = re.compile(rb"POST /(?:v[0-9.]+/)?containers/(?:create\b|[^/ ]+/update\b)")


def host_config(**values: Any) -> Change:
    """A change of what a container is made with."""

    def change(body: dict[str, Any]) -> None:
        if "HostConfig" in body:
            body["HostConfig"].update(values)

    return change


WEAK: Mapping[str, tuple[Change, set[str], str]] = {
    "no bound of memory": (host_config(Memory=0, MemorySwap=0), {"memory-limit"}, "container"),
    "no bound of CPU": (host_config(NanoCpus=0), {"cpu-limit"}, "container"),
    "host IPC": (host_config(IpcMode="host"), {"namespaces"}, "process"),
    "token": (
        host_config(Binds=["/etc/hostname:/run/secrets/kubernetes.io/serviceaccount/token:ro"]),
        {"no-credentials"},
        "process",
    ),
    "device": (
        host_config(Devices=[{"PathOnHost": "/dev/full", "PathInContainer": "/dev/disk0", "CgroupPermissions": "r"}]),
        {"devices"},
        "namespace",
    ),
}
"""What can be changed in any container of cloche's, what a doctor then finds broken, and the level that is left."""


@contextlib.contextmanager
def meddling(daemon: str, folder: Path, change: Change) -> Iterator[str]:
    """The address of a daemon that is the other one but for this change."""
    path = folder / "docker.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(32)
        thread = threading.Thread(target=_accept, args=(server, daemon.removeprefix("unix://"), change))
        thread.start()
        try:
            yield f"unix://{path}"
        finally:
            # Closing alone does not wake who waits for a connection.
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def _accept(server: socket.socket, daemon: str, change: Change) -> None:
    workers: list[threading.Thread] = []
    while True:
        try:
            client, _ = server.accept()
        except OSError:
            break
        worker = threading.Thread(target=_serve, args=(client, daemon, change))
        worker.start()
        workers.append(worker)
    for worker in workers:
        worker.join()


def _serve(client: socket.socket, daemon: str, change: Change) -> None:
    with client, socket.socket(socket.AF_UNIX) as engine:
        engine.connect(daemon)
        answers = threading.Thread(target=_carry, args=(engine, client))
        answers.start()
        with contextlib.suppress(OSError):
            _requests(client, engine, change)
        with contextlib.suppress(OSError):
            engine.shutdown(socket.SHUT_WR)
        answers.join()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _requests(client: socket.socket, engine: socket.socket, change: Change) -> None:
    """One after the other; from one that turns the connection into something else on, bytes as they come."""
    stream = client.makefile("rb")
    while head := _head(stream):
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if re.search(rb"(?i)\r\n(?:upgrade|transfer-encoding):", head):
            engine.sendall(head)
            while data := stream.read1(65536):
                engine.sendall(data)
            return
        body = stream.read(int(length[1])) if length else b""
        if _WITH_LIMITS.match(head) and length is not None:
            asked = json.loads(body)
            change(asked)
            body = json.dumps(asked).encode()
            head = head[: length.start(1)] + str(len(body)).encode() + head[length.end(1) :]
        engine.sendall(head + body)


def _head(stream: io.BufferedReader) -> bytes:
    head = b""
    while line := stream.readline():
        head += line
        if line == b"\r\n":
            return head
    return b""
