"""How much a request may bring, and what it may cost: memory and descriptors stay where they were."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
from collections.abc import Iterator

import httpx2
import psutil
import pytest
from tests.server.serving import ALICE, Served, form, raw_request, spec, tar_of, until

JSON = {"Content-Type": "application/json"}
FLAT_BYTES = 48 * 2**20
"""Beside what a whole request of the largest size takes: the allocator keeps some of it."""
LARGEST = 55 * 2**20
"""A little more than the largest request that this service reads."""


def announced(length: int | str, kind: str = "application/json") -> bytes:
    return raw_request("POST", "/v1/runs", token=ALICE, Content_Length=str(length), Content_Type=kind)


@pytest.mark.parametrize("length", [LARGEST, 2**40, "9" * 20])
def test_announced_length(served: Served, length: int | str) -> None:
    """A request that says itself that it is too large is refused before anything of it is read, and asked for."""
    assert served.ask(announced(length)).startswith(b"HTTP/1.1 413 ")
    expecting = raw_request(
        "POST",
        "/v1/runs",
        token=ALICE,
        Content_Length=str(length),
        Content_Type="application/json",
        Expect="100-continue",
    )
    assert served.ask(expecting).startswith(b"HTTP/1.1 413 ")


def test_length_that_nobody_can_read(served: Served) -> None:
    """A length of more digits than HTTP's reader takes is no HTTP."""
    assert served.ask(announced("9" * 30)).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))


def test_expected_request(served: Served, alice: httpx2.Client) -> None:
    """A client that waits to be asked for its request is asked, when it may send it."""
    body = json.dumps(spec("echo hi")).encode()
    with served.connect() as connection:
        connection.sendall(
            raw_request(
                "POST",
                "/v1/runs",
                token=ALICE,
                Content_Length=str(len(body)),
                Expect="100-continue",
                Content_Type="application/json",
            )
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def endless(piece: bytes = b"x" * 2**20) -> Iterator[bytes]:
    yield b'{"content": "'
    while True:
        yield piece


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_length_that_is_not_announced(served: Served, kind: str) -> None:
    """A request of unknown length is read up to the bound and no further, whatever its kind; its client hears of it."""
    before = served.rss()
    with served.connect() as connection:
        connection.sendall(
            raw_request("POST", "/v1/runs", token=ALICE, Content_Type=kind, Transfer_Encoding="chunked")
            + b'50\r\n--b\r\nContent-Disposition: form-data; name="workspace"; filename="aaaaaaaaaa"\r\n\r\n\r\n'
        )
        sent = 0
        connection.settimeout(0)
        answer = b""
        end = time.monotonic() + 60
        piece = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
        left = piece
        while not answer and time.monotonic() < end:
            try:
                done = connection.send(left)
                left, sent = left[done:] or piece, sent + done
            except BlockingIOError:
                time.sleep(0.001)
            with contextlib.suppress(BlockingIOError):
                answer = connection.recv(1000)
        connection.settimeout(5)
        while b"payload-too-large" not in answer and (more := connection.recv(1000)):
            answer += more
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"payload-too-large" in answer
    assert sent < 3 * LARGEST
    until(lambda: served.rss() < before + LARGEST + FLAT_BYTES)
    until(lambda: not served.uploads())


def test_many_values(served: Served, alice: httpx2.Client) -> None:
    """A request of the largest size that is all values, of which each takes thirty times its text, is refused before that."""
    before = served.rss()
    answer = alice.post("/v1/runs", content=b'{"args": [' + b"[]," * (15 * 2**20) + b"[]]}", headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-spec")
    peak = psutil.Process(served.process.pid).memory_info().rss
    assert peak - before < 2 * LARGEST + FLAT_BYTES


def test_bombs(served: Served, alice: httpx2.Client) -> None:
    """What unpacks to a gigabyte, in a file or in a header, is refused at the bound, and leaves memory and disk as they were."""
    import tarfile

    before = served.rss()
    info = tarfile.TarInfo("a.sh")
    info.size = 2**30
    heads = [info.tobuf()]
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info.type = kind
        heads.append(info.tobuf())
    for head in heads:
        bomb = gzip.compress(head + bytes(2**26), 1) + gzip.compress(bytes(2**26), 1) * 15
        answer = alice.post("/v1/runs", files=form({"script": "a.sh"}, bomb))
        assert (answer.status_code, answer.json()["code"]) == (413, "workspace-too-large")
    assert served.rss() - before < FLAT_BYTES
    until(lambda: not served.uploads())


def test_slow_charset(alice: httpx2.Client) -> None:
    """An encoding that takes quadratic time is not used, whatever the form says."""
    data = b"".join(b"a" + bytes([97 + i % 26]) for i in range(100_000))
    body = b'--b\r\nContent-Disposition: form-data; name="spec"\r\n\r\n-' + data + b"\r\n--b--\r\n"
    for kind in (
        "multipart/form-data; boundary=b; charset=punycode",
        "multipart/form-data; charset=idna; boundary=b",
        'multipart/form-data; boundary=b; charset="punycode"',
        "multipart/form-data; boundary=b; charset*=utf-8''punycode",
        "multipart/form-data; boundary=b; CHARSET=punycode",
    ):
        begun = time.monotonic()
        answer = alice.post("/v1/runs", content=body, headers={"Content-Type": kind})
        assert answer.status_code in {415, 422}
        assert time.monotonic() - begun < 5


def test_much_output(served: Served, alice: httpx2.Client) -> None:
    """What a script prints is bounded in what it costs the service, too, however often it is done."""
    script = spec("head -c 30000000 /dev/zero | tr '\\0' x; head -c 3000000 /dev/zero >/output/f")
    for _ in range(3):
        alice.post("/v1/runs", json=script)
    before = served.rss()
    for headers in ({}, {"Accept": "text/event-stream"}) * 4:
        answer = alice.post("/v1/runs", json=script, headers=headers)
        assert len(answer.content) < 10_000_000
    assert served.rss() - before < FLAT_BYTES


def test_idle_connections(served: Served, alice: httpx2.Client) -> None:
    """Hundreds of connections that say nothing keep nobody else away, and their descriptors come back."""
    process = psutil.Process(served.process.pid)
    before = process.num_fds()
    held = [served.connect() for _ in range(300)]
    assert alice.post("/v1/runs", json=spec("true")).status_code == 200
    for connection in held:
        connection.close()
    until(lambda: process.num_fds() <= before + 3)


def test_many_uploads_at_once(served: Served) -> None:
    """Uploads that are unpacked at the same time leave room for those who only ask, and nothing on the disk."""
    import threading

    workspace = tar_of({"a.sh": "true", **{f"f{i}": b"" for i in range(3000)}})
    statuses: list[int] = []

    def upload() -> None:
        with served.client(ALICE) as client:
            statuses.append(client.post("/v1/runs", files=form({"script": "a.sh"}, workspace)).status_code)

    threads = [threading.Thread(target=upload) for _ in range(10)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    with served.client() as nobody:
        while any(thread.is_alive() for thread in threads):
            begun = time.monotonic()
            assert nobody.get("/healthz").status_code == 200
            slowest = max(slowest, time.monotonic() - begun)
            time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert statuses == [200] * 10
    assert slowest < 3
    until(lambda: not served.uploads())
