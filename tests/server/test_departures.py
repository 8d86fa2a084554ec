"""Clients that go away: their runs go with them, and nothing stays."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
from tests.server.serving import ALICE, Served, raw_request, raw_run, spec, tar_of, until

LIVE = {"Accept": "text/event-stream"}
SLEEP = spec("echo up; sleep 60", timeout=100)


def vanish(connection: socket.socket) -> None:
    """As when a process is killed, or a cable is cut by something that resets."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)
    connection.close()


WAYS = [socket.socket.close, vanish, half_close]


def measured(served: Served, name: str) -> float:
    with served.client() as nobody:
        lines = nobody.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def boxes(served: Served) -> int:
    """Sleeping scripts of the service."""
    found = 0
    for child in psutil.Process(served.process.pid).children(recursive=True):
        try:
            found += child.name() == "sleep"
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(autouse=True)
def _idle(served: Served) -> Iterator[None]:
    """Before and after each test nothing runs, nothing is kept on the disk, and nothing failed."""
    yield
    until(lambda: not measured(served, "cloche_runs_in_flight") and not measured(served, "cloche_queue_length"))
    until(lambda: not boxes(served) and not served.uploads())
    assert not [line for line in served.logged() if line["level"] in {"error", "critical"}]


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("headers", [{}, LIVE], ids=["result", "events"])
def test_while_it_runs(served: Served, headers: dict[str, str], leave: Callable[[socket.socket], None]) -> None:
    """When a client goes while its run goes on, the run is cancelled and its box is gone."""
    cancelled = measured(served, 'cloche_runs_total{mode="local",outcome="cancelled"}')
    connection = served.connect()
    connection.sendall(raw_run(SLEEP, token=ALICE, **headers))
    until(lambda: boxes(served) == 1)
    leave(connection)
    until(lambda: not boxes(served))
    until(lambda: measured(served, 'cloche_runs_total{mode="local",outcome="cancelled"}') == cancelled + 1)


@pytest.mark.parametrize("headers", [{}, LIVE], ids=["result", "events"])
def test_while_it_waits(served: Served, headers: dict[str, str]) -> None:
    """When a client goes while its run waits for a place, it waits no more, and takes none."""
    holding = [served.connect() for _ in range(4)]
    for connection in holding:
        connection.sendall(raw_run(SLEEP, token=ALICE))
    until(lambda: boxes(served) == 4)
    waiting = served.connect()
    waiting.sendall(raw_run(SLEEP, token=ALICE, **headers))
    until(lambda: measured(served, "cloche_queue_length") == 1)
    waiting.close()
    until(lambda: measured(served, "cloche_queue_length") == 0)
    assert boxes(served) == 4
    for connection in holding:
        connection.close()


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("chunked", [False, True])
def test_while_it_sends(served: Served, leave: Callable[[socket.socket], None], *, chunked: bool) -> None:
    """When a client goes in the middle of its request, there is no run, and nothing on the disk of what it sent."""
    for body, kind in (
        (b'{"content": "' + b"x" * 200_000, "application/json"),
        (
            b'--b\r\nContent-Disposition: form-data; name="workspace"; filename="w"\r\n\r\n'
            + tar_of({"a.sh": b"x" * 2_000_000}),
            "multipart/form-data; boundary=b",
        ),
    ):
        if chunked:
            request = raw_request("POST", "/v1/runs", token=ALICE, Content_Type=kind, Transfer_Encoding="chunked")
            request += f"{len(body):x}\r\n".encode() + body + b"\r\n"
        else:
            request = raw_request("POST", "/v1/runs", body, token=ALICE, Content_Type=kind, Content_Length="3000000")
        connection = served.connect()
        connection.sendall(request)
        leave(connection)
    with served.client(ALICE) as alice:
        assert alice.post("/v1/runs", json=spec("true")).status_code == 200


def test_with_a_workspace(served: Served) -> None:
    """When a client goes, the folder that it brought goes too."""
    script = b'{"script": "a.sh", "timeout": 100}'
    body = (
        b'--b\r\nContent-Disposition: form-data; name="spec"\r\n\r\n' + script + b"\r\n"
        b'--b\r\nContent-Disposition: form-data; name="workspace"; filename="w"\r\n\r\n'
        + tar_of({"a.sh": "sleep 60"})
        + b"\r\n--b--\r\n"
    )
    connection = served.connect()
    connection.sendall(
        raw_request("POST", "/v1/runs", body, token=ALICE, Content_Type="multipart/form-data; boundary=b")
    )
    until(lambda: boxes(served) == 1)
    assert _one(served.uploads()).is_dir()
    connection.close()


def _one(paths: list[Path]) -> Path:
    (path,) = paths
    return path


def test_with_respond_async(served: Served, alice: httpx2.Client) -> None:
    """A run whose caller wanted to go goes on without him."""
    with served.connect() as connection:
        connection.sendall(raw_run(SLEEP, token=ALICE, path="/v1/runs?run_id=goes-on", Prefer="respond-async"))
        assert connection.recv(100).startswith(b"HTTP/1.1 202 ")
    until(lambda: boxes(served) == 1)
    assert alice.get("/v1/runs/goes-on").json()["state"] == "running"
    alice.delete("/v1/runs/goes-on?kill=true")


def test_many_that_go(served: Served) -> None:
    """Fifty that go at any moment leave no descriptor open, and no place taken."""
    process = psutil.Process(served.process.pid)
    until(lambda: len(process.net_connections()) == 1)
    before = process.num_fds()
    for number in range(50):
        connection = served.connect()
        request = raw_run(SLEEP, token=ALICE, **(LIVE if number % 2 else {}))
        connection.sendall(request[: (number + 1) * len(request) // 50])
        WAYS[number % 3](connection)
    until(lambda: process.num_fds() <= before + 2)
