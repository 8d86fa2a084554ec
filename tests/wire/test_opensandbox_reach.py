"""The way to a sandbox's execd: when it is there, where it is, and where nobody goes whatever the service says."""

from __future__ import annotations

import ipaddress
import logging
import math
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import pytest
from tests.engines.docker import certificates
from tests.engines.docker.certificates import Certificates
from tests.wire.engine import DEFAULT, Engine, Handler, Peer, Raw, Reply, Request, Word, serving
from tests.wire.opensandbox import (
    A_RUN,
    COMMAND,
    DELETE,
    DOWNLOAD,
    ENDPOINT,
    INSIDE,
    KEY,
    LOOK,
    PING,
    PROXY,
    SANDBOXES,
    Box,
    OpenSandbox,
    no,
)
from tests.wire.opensandbox_runs import failure, run, sandbox
from tests.wire.runs import SPEC

import cloche
from cloche._kit.http import HttpClient, NotAllowed, Server
from cloche._kit.streams import GuardedBackend, IPAddress, NotAllowedError
from cloche.backends.opensandbox import box as boxes
from cloche.backends.opensandbox import client, execd

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried as often as ever, with shorter pauses between."""
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.02))
    monkeypatch.setattr(boxes, "LOOK_S", 0.1)


def need(host: str) -> None:
    """Not every machine has IPv6."""
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as exc:
        pytest.skip(f"nobody can listen at {host}: {exc}")


@contextmanager
def trap(host: str = "127.0.0.1") -> Iterator[int]:
    """A port to which nobody may connect."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        listener.settimeout(0)
        yield listener.getsockname()[1]
        with pytest.raises(BlockingIOError):
            listener.accept()


def below(path: str) -> list[str]:
    """What a healthy run asks of an execd that is below a path."""
    return [said.replace(" ", f" {path}") for said in INSIDE]


def at(endpoint: object, **more: object) -> Reply:
    """Where the service says that execd is."""
    return Reply(200, {"endpoint": endpoint, **more})


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Names lead to these addresses: at the first question, at the next one, and at all after the last. The names that were
    asked for.
    """
    asked: list[str] = []

    def getaddrinfo(host: str | bytes, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(host.decode() if isinstance(host, bytes) else host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


# --- not there yet ----------------------------------------------------------------------------------------------------


NOT_YET: dict[str, Word] = {
    "404": no(404, "DOCKER::SANDBOX_NOT_FOUND", "not found"),
    "500": no(500, "DOCKER::NETWORK_MODE_ENDPOINT_UNAVAILABLE", "no address yet"),
    "503": Reply(503, b"busy"),
    "cut": Raw(),
    "html": Reply(200, b"<html>"),
}


@pytest.mark.parametrize("how", NOT_YET)
async def test_endpoint_comes_later(service: OpenSandbox, how: str) -> None:
    """A service that cannot tell at first where a sandbox is, is asked again."""
    service.engine.on(ENDPOINT, *[NOT_YET[how]] * 6, DEFAULT)
    started = time.monotonic()
    assert (await run(service)).stdout == "hi"
    assert len(service.engine.asked(ENDPOINT)) == 7
    assert time.monotonic() - started < 2
    assert len(service.execd.asked(COMMAND)) == 1


@pytest.mark.parametrize(
    "word",
    [
        Reply(502, b"no upstream"),
        Reply(503),
        Reply(404),
        Reply(500),
        Raw(),
        Raw(b"HTTP/1.1 2"),
        Raw(b"SSH-2.0-x\r\n"),
        Raw(0.3),
    ],
    ids=["502", "503", "404", "500", "cut", "head", "ssh", "slow"],
)
async def test_execd_comes_later(service: OpenSandbox, word: Word, monkeypatch: pytest.MonkeyPatch) -> None:
    """An execd that is not up yet is asked again, with pauses of a fifth of a second at most, and nothing is asked twice of the
    service.
    """
    monkeypatch.setattr(execd, "PING_S", 0.1)
    for path in ("", PROXY):
        service.execd.on(f"GET {path}/ping", word, word, word, word, DEFAULT)
    started = time.monotonic()
    assert (await run(service)).stdout == "hi"
    assert time.monotonic() - started < 2
    assert len(service.engine.asked(ENDPOINT)) == 1


async def test_nobody_listens_yet(service: OpenSandbox) -> None:
    """A port at which nobody listens yet is tried until somebody does, in steps that are short at first."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    service.engine.on(ENDPOINT, at("127.0.0.1:{1}".format(*listener.getsockname())))
    late, started = Engine(), list[float]()
    late.on("*", passed_on(service))
    async with anyio.create_task_group() as group:

        async def later() -> None:
            await service.engine.wait_for(ENDPOINT)
            await anyio.sleep(0.4)
            await late.listen(group, listener)
            started.append(time.monotonic())

        async with sandbox(service) as opened:
            group.start_soon(later)
            assert (await opened.run(SPEC)).stdout == "hi"
            assert time.monotonic() - started[0] < 0.4
        late.vanish()


def ends(box: Box) -> None:
    box.state, box.message = "Failed", "exited with 127: no such program: tail"


def terminates(box: Box) -> None:
    box.state, box.reason = "Terminated", "it was too late"


DEAD: dict[str, tuple[Callable[[OpenSandbox, Box], object], str]] = {
    "failed": (lambda service, box: ends(box), "no such program: tail"),
    "terminated": (lambda service, box: terminates(box), "it was too late"),
    "gone": (lambda service, box: service.boxes.pop(box.id), "was removed before it was ready"),
}


@pytest.mark.parametrize("how", DEAD)
@pytest.mark.parametrize("route", ["endpoint", "ping"])
async def test_dead_before_it_is_ready(service: OpenSandbox, how: str, route: str) -> None:
    """A sandbox that dies before its execd is there is an error with the service's words, long before the start is overdue, and
    is deleted.
    """
    act, words = DEAD[how]

    async def die(request: Request, peer: Peer) -> Reply | Raw:
        (box,) = service.made
        if box.state == "Running" and box.id in service.boxes:
            act(service, box)
        return no(500, "X", "no address") if route == "endpoint" else Raw()

    if route == "endpoint":
        service.engine.on(ENDPOINT, die)
    else:
        service.execd.on("GET *", die)
    started = time.monotonic()
    error = await failure(service)
    assert error.code == "backend-unavailable"
    assert words in error.message
    assert time.monotonic() - started < 2
    assert len(service.engine.asked(DELETE)) == 1
    assert not service.execd.asked(COMMAND)


@pytest.mark.parametrize("state", ["Pending", "Something"])
async def test_never_ready(service: OpenSandbox, state: str) -> None:
    """A sandbox that is not dead, and whose execd never comes, is start-timeout, with what was tried, and is deleted."""

    def stays(box: Box) -> None:
        box.state = state

    service.places = stays
    service.execd.on("GET *", Reply(503, b"not yet"))
    started = time.monotonic()
    error = await failure(service, start_timeout=0.7)
    assert (error.code, error.retryable) == ("start-timeout", True)
    assert "not yet" in error.message
    assert state in error.message
    assert time.monotonic() - started < 2.5


async def test_service_hangs(service: OpenSandbox) -> None:
    """A service that does not answer the question where a sandbox is, is start-timeout when the start is overdue."""
    service.engine.on(ENDPOINT, Raw(math.inf))
    started = time.monotonic()
    error = await failure(service, start_timeout=0.6)
    assert error.code == "start-timeout"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("word", [no(401, "INVALID_API_KEY", "no more"), no(403, "X", "no more")], ids=["401", "403"])
async def test_key_is_taken_away(service: OpenSandbox, word: Reply) -> None:
    """A service that does not take the key any more is permission-denied at once."""
    service.engine.on(ENDPOINT, word)
    error = await failure(service)
    assert error.code == "permission-denied"
    assert "CLOCHE_OPENSANDBOX_API_KEY" in error.hint


async def test_looks_are_few(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """While execd is not there the service is asked for the sandbox's state three times a second at most."""
    monkeypatch.undo()
    service.execd.on("GET *", Raw())
    await failure(service, start_timeout=1.5)
    assert 2 <= len(service.engine.asked(LOOK)) <= 6


# --- which way --------------------------------------------------------------------------------------------------------


async def test_suffix(service: OpenSandbox) -> None:
    """Where execd's own port is told, with a way from execd to itself, that way is not taken."""
    await run(service)
    assert [str(request) for request in service.to_execd()] == INSIDE
    assert not any(PROXY in request.target for request in service.to_execd())


@pytest.mark.parametrize("word", [Reply(404, b"no route"), Raw(), Reply(502)], ids=["404", "cut", "502"])
async def test_suffix_is_needed(service: OpenSandbox, word: Word) -> None:
    """A service that needs that way is gone by it, at the first try; the sandbox is asked all by it then."""
    service.execd.on(PING, word)
    assert (await run(service)).stdout == "hi"
    first, *others = service.to_execd()
    assert str(first) == PING
    assert [str(request) for request in others] == below(PROXY)


async def test_path(service: OpenSandbox) -> None:
    """An address may have a path, which stands before all that execd is asked."""
    service.engine.on(ENDPOINT, at(f"http://{service.execd_address}/in/sb-1{PROXY}/"))

    async def inside(request: Request, peer: Peer) -> Reply | Raw:
        assert request.path.startswith("/in/sb-1/")
        return await service.proxy(
            Request(request.line.replace("/in/sb-1", PROXY), request.headers, request.body), peer
        )

    service.execd.on("* /in/sb-1/*", inside)
    assert (await run(service)).stdout == "hi"
    assert [str(request) for request in service.to_execd()] == below("/in/sb-1")


async def test_proxied(service: OpenSandbox) -> None:
    """Where the user wants it the service itself is gone through, with the key and the token, and nothing else is dialled."""
    async with sandbox(service, opensandbox_server_proxy=True) as opened:
        before = len(service.asked())
        assert (await opened.run(SPEC, wait_cleanup=True)).stdout == "hi"
        asked = service.asked()[before:]
    create, endpoint, *_, delete = A_RUN
    assert asked == [create, endpoint, *below(f"{SANDBOXES}/SANDBOX{PROXY}"), delete]
    assert [request.query for request in service.engine.asked(ENDPOINT)] == [{"use_server_proxy": "true"}]
    assert not service.to_execd()
    (box,) = service.made
    assert {request.headers["open-sandbox-api-key"] for request in service.requests} == {KEY}
    inside = [request.headers.get("x-execd-access-token", "") for request in service.requests if PROXY in request.path]
    assert sorted(inside) == ["", *[box.token] * 4]
    assert not any(
        "x-execd-access-token" in request.headers for request in service.requests if PROXY not in request.path
    )


async def test_not_proxied(service: OpenSandbox) -> None:
    """Without that wish the service is not asked for a way through itself."""
    await run(service)
    assert [request.query for request in service.engine.asked(ENDPOINT)] == [{}]


@pytest.mark.parametrize(
    "said", ["127.0.0.1:{}", "https://127.0.0.2:{}/x", "localhost:{}/v1/sandboxes/x/proxy/44772", "", "a b"]
)
async def test_proxied_to_somewhere_else(service: OpenSandbox, said: str) -> None:
    """Where the service is to be gone through, it is: whatever address it says that it has. What it wants to see it gets."""
    with trap() as port:
        service.engine.on(ENDPOINT, at(said.format(port), headers={"X-Extra": "1"}))
        assert (await run(service, opensandbox_server_proxy=True)).stdout == "hi"
    assert len([request for request in service.to_service() if request.headers.get("x-extra") == "1"]) == len(INSIDE)


async def test_same_host_and_port_with_tls_is_another_origin(service: OpenSandbox) -> None:
    """Execd at an address that begins with https is spoken to with TLS, and one without TLS is told as that, at once."""
    service.engine.on(ENDPOINT, at(f"https://{service.execd_address}"))
    started = time.monotonic()
    error = await failure(service)
    assert error.code == "backend-unavailable"
    assert "TLS" in error.message
    assert not service.to_execd()
    assert time.monotonic() - started < 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.make(tmp_path_factory.mktemp("tls"))


async def test_execd_with_tls(service: OpenSandbox, made: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with TLS works where the certificate is one that the user trusts, also if the service has none."""
    monkeypatch.setenv("SSL_CERT_FILE", str(made.ca))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(made.server_cert, made.server_key)
    async with forwarding(service, tls=tls) as front:
        service.engine.on(ENDPOINT, at(f"https://{front.address.removeprefix('tcp://')}"))
        assert (await run(service)).stdout == "hi"
        assert len(front.requests) == len(INSIDE)


@asynccontextmanager
async def forwarding(
    service: OpenSandbox, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Engine]:
    """Execd at another address."""
    async with serving(tcp=True, host=host, tls=tls) as front:
        front.on("*", passed_on(service))
        yield front


def passed_on(service: OpenSandbox) -> Handler:
    """What execd says."""

    async def forward(request: Request, peer: Peer) -> Reply | Raw:
        word = service.execd.word(request)
        return word if isinstance(word, Reply | Raw) else await word(request, peer)

    return forward


# --- where nobody goes ------------------------------------------------------------------------------------------------


FORBIDDEN = {
    "loopback": ("127.0.0.2", "127.0.0.2", "127.0.0.2"),
    "name": ("localhost", "127.0.0.1", "localhost"),
    "name-in-other-letters": ("LocalHost", "127.0.0.1", "localhost"),
    "decimal": ("2130706433", "127.0.0.1", "2130706433"),
    "hex": ("0x7f000001", "127.0.0.1", "0x7f000001"),
    "short": ("127.1", "127.0.0.1", "127.1"),
    "mapped": ("[::ffff:127.0.0.1]", "127.0.0.1", "::ffff:127.0.0.1"),
    "mapped-hex": ("[::ffff:7f00:1]", "127.0.0.1", "::ffff:7f00:1"),
    "ipv6": ("[::1]", "::1", "::1"),
    "everywhere": ("0.0.0.0", "127.0.0.1", "0.0.0.0"),
    "everywhere-short": ("0", "127.0.0.1", "0"),
    "everywhere-ipv6": ("[::]", "::1", "::"),
}


@pytest.mark.parametrize("how", FORBIDDEN)
async def test_not_one_connection(service: OpenSandbox, how: str) -> None:
    """A service that sends us to another address than its own, however that is written, gets not one connection there: the run
    is denied at once, with the host that the user would have to allow, and the sandbox is deleted.
    """
    host, listening, said = FORBIDDEN[how]
    need(listening)
    with trap(listening) as port:
        service.engine.on(ENDPOINT, at(f"{host}:{port}{PROXY}"))
        started = time.monotonic()
        error = await failure(service, start_timeout=3)
        assert time.monotonic() - started < 2
    assert (error.code, error.retryable) == ("permission-denied", False)
    assert said in error.message.lower()
    assert "CLOCHE_SSRF_WHITELIST" in error.hint
    assert said in error.hint.lower()
    assert len(service.made) == len(service.engine.asked(DELETE)) == 1
    assert not service.to_execd()


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "[fd00:ec2::254]",
        "[fe80::1]",
        "168.63.129.16",
        "100.100.100.200",
        "10.0.0.1",
        "192.168.0.1",
        "8.8.8.8",
    ],
)
async def test_machines_secrets(service: OpenSandbox, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the addresses at which clouds give away secrets, nor private ones, nor any other, are dialled unless allowed."""
    dialled: list[str] = []
    known = anyio.connect_tcp

    async def connect_tcp(remote_host: str, *args: Any, **more: Any) -> Any:
        dialled.append(remote_host)
        return await known(remote_host, *args, **more)

    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
    service.engine.on(ENDPOINT, at(f"{host}:80/latest/meta-data"))
    error = await failure(service)
    assert error.code == "permission-denied"
    assert host.strip("[]") in error.hint
    assert set(dialled) == {"127.0.0.1"}


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
async def test_name_that_leads_inside(service: OpenSandbox, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads to the loopback is not gone to either, also below a name of which all hosts are allowed."""
    asked = resolving(monkeypatch, [address])
    with trap() as port:
        service.engine.on(ENDPOINT, at(f"sb-1.boxes.example:{port}"))
        error = await failure(service, ssrf_whitelist="*.boxes.example,*", start_timeout=3)
    assert error.code == "permission-denied"
    assert f"sb-1.boxes.example ({address})" in error.message
    assert asked == ["sb-1.boxes.example"]


ALLOWED = {
    "address": ("127.0.0.2", "127.0.0.2", "127.0.0.2"),
    "network": ("127.0.0.2", "127.0.0.2", "127.0.0.0/30"),
    "name": ("localhost", "127.0.0.1", "localhost"),
    "name-in-other-letters": ("LOCALHOST", "127.0.0.1", "LocalHost"),
    "network-of-a-name": ("localhost", "127.0.0.1", "127.0.0.0/8,::1"),
    "network-of-a-mapped-one": ("[::ffff:127.0.0.1]", "127.0.0.1", "127.0.0.0/8"),
    "ipv6": ("[::1]", "::1", "::1"),
    "one-of-many": ("127.0.0.2", "127.0.0.2", "10.0.0.0/8,other.example,127.0.0.2/32"),
}


@pytest.mark.parametrize("how", ALLOWED)
async def test_allowed(service: OpenSandbox, how: str) -> None:
    """What the user allows, by host, address or network, is gone to; the key does not go there."""
    host, listening, entry = ALLOWED[how]
    need(listening)
    async with forwarding(service, listening) as front:
        service.engine.on(ENDPOINT, at(f"{host}:{front.address.rpartition(':')[2]}"))
        assert (await run(service, ssrf_whitelist=entry)).stdout == "hi"
        assert len(front.requests) == len(INSIDE)
        assert not any("open-sandbox-api-key" in request.headers for request in front.requests)


@pytest.mark.parametrize("entry", ["127.0.0.3", "127.0.0.4/30", "other.example", "127.0.0.2.example", "*"])
async def test_others_are_allowed(service: OpenSandbox, entry: str) -> None:
    """What else is allowed opens nothing."""
    with trap("127.0.0.2") as port:
        service.engine.on(ENDPOINT, at(f"127.0.0.2:{port}"))
        assert (await failure(service, ssrf_whitelist=entry, start_timeout=3)).code == "permission-denied"


@pytest.mark.parametrize("route", ["GET /ping", "GET /files/download", "POST /files/upload", "POST /command"])
@pytest.mark.parametrize("status", [302, 307])
async def test_redirects(service: OpenSandbox, route: str, status: int) -> None:
    """Where execd sends us elsewhere nobody follows, at whatever request."""
    with trap() as port:
        method, path = route.split(" ")
        for before in ("", PROXY):
            service.execd.on(f"{method} {before}{path}", Reply(status, b"", {"Location": f"http://127.0.0.1:{port}/x"}))
        async with cloche.Sandbox(service.settings(start_timeout=0.7)) as opened:
            try:
                await opened.run(SPEC)
                code = ""
            except cloche.ClocheError as exc:
                code = exc.code
    assert code == {"/ping": "start-timeout", "/files/download": "permission-denied"}.get(path, "backend-unavailable")
    assert not service.boxes


async def test_proxy_of_the_environment(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment is not gone through: what is allowed is asked of the address that is dialled."""
    with trap() as port:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        assert (await run(service)).stdout == "hi"


# --- names that change ------------------------------------------------------------------------------------------------


def guarded(allowed: list[str]) -> Callable[[str, IPAddress], bool]:
    """Whether an address is one of these."""
    return lambda _, address: address in {ipaddress.ip_address(text) for text in allowed}


async def test_rebinding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads to an allowed address at first, and to a forbidden one a moment later, is asked for once, and the address
    that was looked at is the one that is dialled.
    """
    asked = resolving(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    async with serving(tcp=True) as engine:
        port = int(engine.address.rpartition(":")[2])
        with socket.create_server(("127.0.0.2", port)) as other:
            other.settimeout(0)
            stream = await GuardedBackend(guarded(["127.0.0.1"])).connect_tcp("box.example", port, timeout=5)
            assert stream.get_extra_info("server_addr")[0] == "127.0.0.1"
            await stream.aclose()
            with pytest.raises(NotAllowedError) as caught:
                await GuardedBackend(guarded(["127.0.0.1"])).connect_tcp("box.example", port, timeout=5)
            with pytest.raises(BlockingIOError):
                other.accept()
    assert (caught.value.host, caught.value.address) == ("box.example", "127.0.0.2")
    assert asked == ["box.example"] * 2


async def test_rebinding_between_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where a connection is made anew for a later request: each connection is looked at."""
    resolving(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    async with serving(tcp=True) as engine:
        engine.on("*", Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"))
        port = engine.address.rpartition(":")[2]
        http = HttpClient(Server(f"http://box.example:{port}"), allowed=guarded(["127.0.0.1"]))
        await http.request("GET", "/", timeout_s=5, max_bytes=10)
        with pytest.raises(NotAllowed, match=r"box\.example \(127\.0\.0\.2\)"):
            await http.request("GET", "/", timeout_s=5, max_bytes=10)
        await http.aclose()
        assert len(engine.requests) == 1


async def test_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name's addresses only those that are allowed are dialled, one after the other."""
    resolving(monkeypatch, ["127.0.0.2", "127.0.0.3", "::1", "127.0.0.1"])
    with trap("127.0.0.2") as port:
        with socket.create_server(("127.0.0.1", port)):
            guard = GuardedBackend(guarded(["127.0.0.3", "127.0.0.1"]))
            stream = await guard.connect_tcp("box.example", port, timeout=5)  # nobody listens at the first of the two
            assert stream.get_extra_info("server_addr")[0] == "127.0.0.1"
            await stream.aclose()
        with pytest.raises(NotAllowedError) as caught:
            await GuardedBackend(guarded(["10.0.0.1"])).connect_tcp("box.example", port, timeout=5)
    assert caught.value.address == "127.0.0.2, 127.0.0.3, ::1, 127.0.0.1"


async def test_rebinding_of_a_run(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox whose name turns to a forbidden address while it is fed is not followed there."""
    resolving(monkeypatch, ["127.0.0.2"], ["127.0.0.1"])
    async with forwarding(service, "127.0.0.2") as front:
        port = int(front.address.rpartition(":")[2])
        front.on("GET /files/download", Raw(b"HTTP/1.1 404 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"))
        with socket.create_server(("127.0.0.1", port)) as other:
            other.settimeout(0)
            service.engine.on(ENDPOINT, at(f"box.example:{port}"))
            error = await failure(service, ssrf_whitelist="127.0.0.2")
            with pytest.raises(BlockingIOError):
                other.accept()
    assert error.code in {"permission-denied", "backend-unavailable"}
    assert "box.example (127.0.0.1)" in error.message
    assert {str(request) for request in front.requests} <= {PING, DOWNLOAD}


# --- addresses that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint",
    [
        *(
            "",
            "/",
            "http://",
            "://x",
            "ftp://127.0.0.1:1",
            "file:///etc/passwd",
            "a b:1",
            "127.0.0.1:0",
            "127.0.0.1:99999",
        ),
        *(
            "127.0.0.1:x",
            "127.0.0.1:-1",
            "u:p@127.0.0.1:1",
            "http://u@127.0.0.1:1",
            "127.0.0.1:1/../x",
            "127.0.0.1:1/./x",
        ),
        *("127.0.0.1:1?x=1", "127.0.0.1:1#x", "127.0.0.1:1/a\r\nX: y", "127.0.0.1\\@x:1", "127.0.0.1:1\n", "[::1", "."),
        *(
            "127.0.0.1:1/" + "a" * 3000,
            "127.0.0.1:1/\u00e4",
            "b\u00f6x.example:1",
            "127.0.0.1:\u0661",
            7,
            None,
            ["x"],
            {},
        ),
        *("unix:///var/run/docker.sock", "[127.0.0.1]:1", "[:]:1", "127.0.0.1%0d%0a:1", "0177.0.0.1:1"),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_no_address(service: OpenSandbox, endpoint: object) -> None:
    """What is no address of a sandbox is a protocol-error at once, whatever else it is, and the sandbox is deleted."""
    service.engine.on(ENDPOINT, at(endpoint))
    started = time.monotonic()
    error = await failure(service)
    assert (error.code, error.retryable) == ("protocol-error", False)
    assert "eip" in error.hint
    assert len(error.message) < 300
    assert time.monotonic() - started < 1
    assert not service.to_execd()
    assert len(service.engine.asked(DELETE)) == 1


@pytest.mark.parametrize("body", [b"[]", b"7", b"null", b'"127.0.0.1:1"', b"{}"])
async def test_no_answer_with_an_address(service: OpenSandbox, body: bytes) -> None:
    """The same where the answer has another form."""
    service.engine.on(ENDPOINT, Reply(200, body))
    assert (await failure(service)).code == "protocol-error"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "elsewhere"},
        {"content-length": "5"},
        {"Transfer-Encoding": "chunked"},
        {"Connection": "close"},
        {"X": "a\r\nY: b"},
        {"X\r\nY": "b"},
        {"X: y": "b"},
        {"": "b"},
        {"X": 7},
        {"X": None},
        {"X": "\u00e4"},
        {"X": "a\0b"},
        {f"X-{n}": "y" for n in range(17)},
        {"X": "y" * 5000},
        {"X" * 65: "y"},
    ],
    ids=lambda headers: repr(headers)[:30],
)
async def test_no_headers(service: OpenSandbox, headers: dict[str, Any]) -> None:
    """Headers that no request can carry, or that would change where it ends, are a protocol-error, and reach nobody."""
    service.engine.on(ENDPOINT, at(service.execd_address, headers=headers))
    error = await failure(service)
    assert error.code == "protocol-error"
    assert not service.to_execd()


@pytest.mark.parametrize("name", ["X-EXECD-ACCESS-TOKEN", "x-execd-access-token"])
async def test_token_of_the_service(service: OpenSandbox, name: str) -> None:
    """A service that says itself what token an execd wants is believed, and no other one is sent."""

    def given(box: Box) -> None:
        box.body["env"]["EXECD_ACCESS_TOKEN"] = "theirs"

    service.places = given
    service.engine.on(ENDPOINT, at(service.execd_address, headers={name: "theirs"}))
    assert (await run(service)).stdout == "hi"
    assert sorted(service.tokens()) == ["", *["theirs"] * 4]


async def test_key_is_not_asked_out_of_us(service: OpenSandbox) -> None:
    """A service that names the key's own header for an execd gets its own text there, not the key."""
    service.engine.on(ENDPOINT, at(service.execd_address, headers={"OPEN-SANDBOX-API-KEY": "theirs"}))
    assert (await run(service)).stdout == "hi"
    assert [request.headers["open-sandbox-api-key"] for request in service.to_execd()] == ["theirs"] * len(INSIDE)


async def test_nothing_of_it_in_the_log(service: OpenSandbox, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the key, nor a sandbox's token, nor a header of its endpoint is logged, however much is logged."""
    service.engine.on(ENDPOINT, at(service.execd_address, headers={"OpenSandbox-Secure-Access": "psst"}))
    service.execd.on(PING, Reply(500), DEFAULT)
    with caplog.at_level(logging.DEBUG):
        await run(service)
    (box,) = service.made
    for secret in (KEY, box.token, "psst"):
        assert secret not in caplog.text
