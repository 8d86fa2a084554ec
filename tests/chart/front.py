"""What leads to a Service in the cluster of the tests, which has neither kube-proxy nor a DNS server.

A cluster of somebody's own has both, and needs nothing of this.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from tests.engines.kubernetes.cluster import Cluster
from tests.engines.kubernetes.configuration import DNS_SERVICE
from tests.kubernetes.deployment import Api, core

CHUNK_BYTES = 65536
CONNECT_S = 5.0
LOOK_S = 0.2
"""How soon a thread that waits for a client sees that it shall end."""
A_RECORD = 1
NO_SUCH_NAME = 3
TTL_S = 1


class Front:
    """One Service: its name is known to pods, and who connects to its address is connected to one of its pods that are ready.

    All of it is threads of this process with sockets of the cluster's network.
    """

    def __init__(self, cluster: Cluster, admin: Api, namespace: str, service: str) -> None:
        self._cluster = cluster
        self._admin = admin
        self._name = f"{service}.{namespace}.svc.cluster.local"
        self._slices = (
            f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
            f"?labelSelector=kubernetes.io/service-name={service}"
        )
        spec = admin.ask("GET", f"{core('services', namespace)}/{service}").body["spec"]
        self._address: str = spec["clusterIP"]
        self._port: int = spec["ports"][0]["port"]
        self._undo = ExitStack()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        with ExitStack() as undone:
            for address in (self._address, DNS_SERVICE):
                self._ip("replace", address)
                undone.callback(self._ip, "del", address)
            resolver = undone.enter_context(self._cluster.socket(kind=socket.SOCK_DGRAM))
            resolver.bind((DNS_SERVICE, 53))
            listener = undone.enter_context(self._cluster.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._address, self._port))
            listener.listen()
            for each, serve in ((resolver, self._resolve), (listener, self._accept)):
                each.settimeout(LOOK_S)
                undone.callback(_start(serve, each).join)
            undone.callback(self._ended.set)
            self._undo = undone.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _ip(self, verb: str, address: str) -> None:
        words = self._cluster.enter("ip", "address", verb, f"{address}/32", "dev", "lo")
        subprocess.run(words, check=True, capture_output=True)

    def _resolve(self, resolver: socket.socket) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                question, asker = resolver.recvfrom(CHUNK_BYTES)
                resolver.sendto(answer(question, self._name, self._address), asker)

    def _accept(self, listener: socket.socket) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                _start(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        for host, port in self._endpoints():
            server = self._cluster.socket()
            server.settimeout(CONNECT_S)
            with contextlib.suppress(OSError):
                server.connect((host, port))
                _join(client, server)
                return
            server.close()
        client.close()

    def _endpoints(self) -> list[tuple[str, int]]:
        slices: list[dict[str, Any]] = self._admin.ask("GET", self._slices).body["items"]
        return [
            (endpoint["addresses"][0], each["ports"][0]["port"])
            for each in slices
            for endpoint in each["endpoints"]
            if endpoint["conditions"]["ready"]
        ]


def answer(question: bytes, name: str, address: str) -> bytes:
    """A DNS server's answer to a question, when it knows one name (RFC 1035, 4.1)."""
    labels, at = [], 12
    while length := question[at]:
        labels.append(question[at + 1 : at + 1 + length].decode())
        at += 1 + length
    kind = int.from_bytes(question[at + 1 : at + 3])
    known = ".".join(labels).lower() == name
    records = [b"\xc0\x0c\0\x01\0\x01" + TTL_S.to_bytes(4) + b"\0\x04" + socket.inet_aton(address)]
    if not known or kind != A_RECORD:
        records = []
    # An answer, with authority, recursion as it was wished for; one question, these answers, nothing more.
    flags = bytes([0x84 | question[2] & 1, 0x80 | (0 if known else NO_SUCH_NAME)])
    counts = (1).to_bytes(2) + len(records).to_bytes(2) + bytes(4)
    return question[:2] + flags + counts + question[12 : at + 5] + b"".join(records)


def _start(what: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=what, args=arguments, daemon=True)
    thread.start()
    return thread


def _join(client: socket.socket, server: socket.socket) -> None:
    """Pass on what each sends, until both have ended."""
    server.settimeout(None)
    with client, server:
        back = _start(_pump, server, client)
        _pump(client, server)
        back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK_BYTES):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
