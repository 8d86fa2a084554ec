"""What a cluster must let us do, and what is said when it does not, or is none."""

from __future__ import annotations

import gc
import math
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.engines.docker import certificates
from tests.engines.docker.certificates import Certificates
from tests.wire.engine import DEFAULT, Peer, Raw, Reply, Request, Word, serving
from tests.wire.kubernetes import CORE, FINISHED, PARTIAL, REVIEW, RULES, STREAM, Kubernetes, chunk, status

import cloche
from cloche._kit.http import HttpFailure, TlsFailure
from cloche.backends.kubernetes import client as clients
from cloche.backends.kubernetes.backend import KubernetesBackend
from cloche.backends.kubernetes.client import KubernetesClient, Refused
from cloche.backends.kubernetes.credentials import ClientCertificate, Renewed, WrittenCredentials, reread
from cloche.backends.kubernetes.kubeconfig import Access
from cloche.isolation import Isolation, Posture

pytestmark = pytest.mark.anyio


async def probe(cluster: Kubernetes, **settings: Any) -> Posture:
    backend = KubernetesBackend(cluster.settings(**settings), f"o{secrets.token_hex(8)}")
    try:
        return await backend.probe()
    finally:
        await backend.aclose()


async def test_available(cluster: Kubernetes) -> None:
    """A cluster that grants all rights is available, says what it is, and is asked two things for that."""
    posture = await probe(cluster, kube_runtime_class="gvisor")
    assert posture.available
    assert posture.isolation is Isolation.CONTAINER
    assert posture.engine == "Kubernetes v1.37.2, runtime class gvisor"
    assert cluster.asked() == ["POST /rules", "GET /version"]


@pytest.mark.parametrize("tells_all", [True, False])
async def test_missing_rights(cluster: Kubernetes, *, tells_all: bool) -> None:
    """Rights that are missing are named, all of them, with the Role that has them, and none that is there."""
    cluster.denied = {"create jobs", "get pods/log"}
    cluster.tells_all = tells_all
    posture = await probe(cluster)
    assert not posture.available
    assert "may not create jobs, get pods/log." in posture.reason
    assert "namespace boxes" in posture.reason
    assert "deploy/kubernetes" in posture.hint


async def test_rights_that_come_late(cluster: Kubernetes) -> None:
    """A server that has just been started, and so knows of nobody's rights, is asked again before anything is concluded."""
    nothing = {"status": {"resourceRules": [], "nonResourceRules": [], "incomplete": False}}
    cluster.engine.on(RULES, Reply(201, nothing), DEFAULT)
    assert (await probe(cluster)).available


async def test_not_all_told(cluster: Kubernetes) -> None:
    """Rights of which a cluster does not tell are asked about one by one, and only those."""
    cluster.tells_all = False
    assert (await probe(cluster)).available
    assert cluster.asked().count("POST /review") == 13 - 4


async def test_may_not_ask(cluster: Kubernetes) -> None:
    """Who may not even ask for his rights is let in when he may list ConfigMaps, without their contents."""
    for route in (RULES, REVIEW):
        cluster.engine.on(route, status(403, "Forbidden", "no reviews here"))
    assert (await probe(cluster)).available
    (look,) = cluster.engine.asked(f"GET {CORE}/configmaps")
    assert look.query == {"limit": "1"}
    assert PARTIAL in look.headers["accept"]


async def test_may_nothing(cluster: Kubernetes) -> None:
    """Who may not do that either has no rights: the server's words say so."""
    for route in (RULES, REVIEW, f"GET {CORE}/configmaps"):
        cluster.engine.on(route, status(403, "Forbidden", 'User "nobody" cannot do anything'))
    posture = await probe(cluster)
    assert not posture.available
    assert 'User "nobody"' in posture.reason
    assert "Role" in posture.hint


async def test_unknown_user(cluster: Kubernetes) -> None:
    """Credentials that are refused, twice, are told as that."""
    cluster.engine.on("*", status(401, "Unauthorized", "Unauthorized"))
    posture = await probe(cluster)
    assert "does not know who we are" in posture.reason
    assert "credentials" in posture.hint
    assert len(cluster.engine.requests) == 2


async def test_version_is_secret(cluster: Kubernetes) -> None:
    """A cluster that does not tell its version is one all the same."""
    cluster.engine.on("GET /version", status(403, "Forbidden", "no"))
    assert (await probe(cluster)).engine == "Kubernetes"


@pytest.mark.parametrize(
    "word",
    [
        Reply(200, b"<html><body>Welcome to nginx!</body></html>"),
        Reply(201, b""),
        Reply(302, b"", {"Location": "https://login.example.com/"}),
        Reply(404, b"404 page not found"),
        Reply(400, b"Client sent an HTTP request to an HTTPS server."),
        Raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
        Raw(),
    ],
    ids=["html", "empty", "redirect", "404", "https", "ssh", "short", "cut"],
)
async def test_no_api_server(cluster: Kubernetes, word: Word) -> None:
    """What is no API server is unavailable within seconds, with a hint; no redirect is followed."""
    cluster.engine.on("*", word)
    started = time.monotonic()
    posture = await probe(cluster)
    assert not posture.available
    assert posture.reason
    assert posture.hint
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    "body", [b"[]", b"7", b"{}", b'{"status": 7}', b'{"status": {"resourceRules": [7, {"verbs": "*"}]}}']
)
async def test_rights_in_another_form(cluster: Kubernetes, body: bytes) -> None:
    """Rights that are told in another form are none."""
    cluster.engine.on(RULES, Reply(201, body))
    posture = await probe(cluster)
    assert not posture.available
    assert "create jobs" in posture.reason


async def test_rights_for_some_names(cluster: Kubernetes) -> None:
    """A right for things of some names only is none; one for everything is one."""
    rule = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}
    cluster.engine.on(RULES, Reply(201, {"status": {"resourceRules": [{**rule, "resourceNames": ["a"]}]}}))
    assert not (await probe(cluster)).available
    cluster.engine.on(RULES, Reply(201, {"status": {"resourceRules": [rule]}}))
    assert (await probe(cluster)).available


async def test_nobody_there(cluster: Kubernetes) -> None:
    """An API server that cannot be reached is told within a second: nobody waits for one that may not be there at all."""
    cluster.engine.vanish()
    started = time.monotonic()
    posture = await probe(cluster)
    assert not posture.available
    assert "cannot be reached" in posture.reason
    assert "KUBECONFIG" in posture.hint
    assert time.monotonic() - started < 1


async def test_too_slow(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer, or drips, is given up after its time, and is asked no more than twice."""
    monkeypatch.setattr(clients, "QUICK_S", 0.3)
    head = b"HTTP/1.1 201 Created\r\nContent-Length: 9999\r\n\r\n"
    for word in (Raw(math.inf), Raw(head, *[step for _ in range(100) for step in (b" ", 0.05)])):
        cluster.engine.on("*", word)
        before, started = len(cluster.engine.requests), time.monotonic()
        posture = await probe(cluster)
        assert "in time" in posture.reason
        assert time.monotonic() - started < 1.5
        assert len(cluster.engine.requests) - before == 2


async def test_too_long(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer without an end is not read to it."""
    monkeypatch.setattr(clients, "MAX_ANSWER_BYTES", 2**20)
    sent = 0

    async def flood(request: Request, peer: Peer) -> Raw:
        nonlocal sent
        await peer.send(b"HTTP/1.1 201 Created\r\nContent-Length: 999999999\r\n\r\n")
        while sent < 200 * 2**20:
            await peer.send(bytes(2**16))
            sent += 2**16
        return Raw()

    cluster.engine.on("*", flood)
    posture = await probe(cluster)
    assert "larger than" in posture.reason
    assert sent < 2 * 16 * 2**20


async def test_too_long_is_asked_for_once(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was too large once is not asked for again: it will not be smaller."""
    monkeypatch.setattr(clients, "MAX_ANSWER_BYTES", 2**16)
    client = KubernetesClient(cluster.access(), "boxes")
    await client.version()
    cluster.engine.on(f"GET {CORE}/configmaps", Reply(200, bytes(2**17)))
    with pytest.raises(HttpFailure, match="larger"):
        await client.look()
    await client.aclose()
    assert len(cluster.engine.asked(f"GET {CORE}/configmaps")) == 1


async def test_probed_again(cluster: Kubernetes) -> None:
    """A backend that is probed again, since the first time failed, keeps no connection of the first time."""
    cluster.engine.on(RULES, status(401, "Unauthorized", "no"), status(401, "Unauthorized", "no"), DEFAULT)
    backend = KubernetesBackend(cluster.settings(), f"o{secrets.token_hex(8)}")
    assert not (await backend.probe()).available
    assert (await backend.probe()).available
    await backend.aclose()
    await anyio.sleep(0.02)
    try:
        assert not cluster.engine._connections
    finally:
        cluster.engine.cut()
        await anyio.sleep(0.02)
        gc.collect()


@pytest.mark.parametrize(
    "date",
    [
        *("", "yesterday", "Thu, 99 Jan 1970 00:00:00 GMT", "7", "Thu, 01 Jan 2026 00:00:00 +9999999999"),
        "Thu, 01 Jan 99999999999999999999 00:00:00 GMT",
    ],
)
async def test_odd_time(cluster: Kubernetes, date: str) -> None:
    """A server that tells no time, or none that can be, is taken to have ours."""
    cluster.engine.clock_offset_s = None
    cluster.engine.on("GET /version", Reply(200, {}, {"Date": date} if date else {}))
    client = KubernetesClient(cluster.access(), "boxes")
    try:
        await client.version()
        assert abs(client.server_time() - time.time()) < 1
    finally:
        await client.aclose()


# --- over TLS ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.make(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of another authority."""
    return certificates.make(tmp_path_factory.mktemp("other"))


def context(made: Certificates, *trusted: Certificates) -> ssl.SSLContext:
    """Of a server that asks for a certificate, and does without."""
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.load_cert_chain(made.server_cert, made.server_key)
    for one in trusted:
        found.load_verify_locations(one.ca)
    found.verify_mode = ssl.CERT_OPTIONAL if trusted else ssl.CERT_NONE
    return found


@asynccontextmanager
async def over_tls(tls: ssl.SSLContext, folder: Path) -> AsyncIterator[Kubernetes]:
    async with serving(tcp=True, tls=tls) as engine, anyio.create_task_group() as group:
        cluster = Kubernetes(engine, folder, group)
        cluster.base = cluster.base.replace("http:", "https:")
        yield cluster
        group.cancel_scope.cancel()


@asynccontextmanager
async def speaking(access: Access) -> AsyncIterator[KubernetesClient]:
    client = KubernetesClient(access, "boxes")
    try:
        yield client
    finally:
        await client.aclose()


def pair(made: Certificates) -> ClientCertificate:
    return ClientCertificate((made.client / "cert.pem").read_bytes(), (made.client / "key.pem").read_bytes())


async def test_tls(made: Certificates, tmp_path: Path) -> None:
    """A server whose certificate the authority vouches for is spoken to with the token."""
    async with over_tls(context(made), tmp_path) as cluster:
        credentials = WrittenCredentials({"Authorization": "Bearer psst"})
        async with speaking(Access(cluster.base, "here", credentials, authority=made.ca.read_text())) as client:
            await client.look()
        assert [request.headers["authorization"] for request in cluster.engine.requests] == ["Bearer psst"]


@pytest.mark.parametrize("how", ["authority", "name", "plain"])
async def test_tls_fails(made: Certificates, others: Certificates, tmp_path: Path, how: str) -> None:
    """A server of another authority, of another name, or without TLS, is not spoken to: no token reaches it."""
    async with over_tls(context(made), tmp_path) as cluster:
        authority = (others if how == "authority" else made).ca.read_text()
        name = "elsewhere.example.com" if how == "name" else None
        async with serving(tcp=True) as plain:
            base = f"https{plain.address.removeprefix('tcp')}" if how == "plain" else cluster.base
            access = Access(base, "here", WrittenCredentials({"Authorization": "Bearer psst"}), name, authority)
            async with speaking(access) as client:
                started = time.monotonic()
                with pytest.raises(TlsFailure):
                    await client.look()
                assert time.monotonic() - started < 2
            assert not cluster.engine.requests
            assert not plain.requests


async def test_tls_name(made: Certificates, tmp_path: Path) -> None:
    """A server may be asked to bear another name than its address has."""
    async with over_tls(context(made), tmp_path) as cluster:
        access = Access(cluster.base.replace("127.0.0.1", "127.0.0.2"), "here", WrittenCredentials(), "localhost")
        stop = cluster.engine._stop_listening
        listener = socket.create_server(("127.0.0.2", int(cluster.base.rpartition(":")[2])))
        await cluster.engine.listen(cluster.group, listener, context(made))
        stop()
        for name in ("localhost", None):
            named = Access(access.base, "here", WrittenCredentials(), name, made.ca.read_text())
            async with speaking(named) as client:
                if name is None:
                    with pytest.raises(TlsFailure):
                        await client.look()
                else:
                    await client.look()


async def test_tls_in_a_probe(made: Certificates, others: Certificates, tmp_path: Path) -> None:
    """A probe says that it was TLS that failed, and where to look."""
    async with over_tls(context(made), tmp_path) as cluster:
        config = (tmp_path / "kubeconfig").read_text()
        server = f'"server": "{cluster.base}", "certificate-authority": "{others.ca}"'
        text = config.replace(f'"server": "{cluster.base.replace("https", "http")}"', server)
        (tmp_path / "kubeconfig").write_text(text)
        posture = await probe(cluster)
    assert not posture.available
    assert "TLS" in posture.reason
    assert "certificate authority" in posture.hint


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("old")
    return path


def reading(path: Path) -> Renewed[str]:
    return reread(path.read_text)


async def test_token_is_replaced(cluster: Kubernetes, token: Path) -> None:
    """A token that is refused is read again, and the request made once more with what is there now, be it a call or a stream."""

    async def guard(request: Request, peer: Peer) -> Reply | Raw:
        if request.headers["authorization"] != f"Bearer {token.read_text()}":
            return status(401, "Unauthorized", "Unauthorized")
        return await cluster.pods_of(request, peer)

    cluster.engine.on(f"GET {CORE}/pods", guard)
    async with speaking(cluster.access(WrittenCredentials(token=reading(token)))) as client:
        await client.pods("a=b")
        token.write_text("new")
        await client.pods("a=b")
        token.write_text("newer")
        cluster.on_watch = [Reply(200, b'{"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "7"}}}\n')]
        assert [at async for _, _, at in client.watch_pods("a=b", "1")] == ["7"]
    sent = [request.headers["authorization"].removeprefix("Bearer ") for request in cluster.engine.requests]
    assert sent == ["old", "old", "new", "new", "newer"]


async def test_token_that_stays_refused(cluster: Kubernetes, token: Path) -> None:
    """A token that is refused a second time is told as refused, without further tries."""
    cluster.engine.on("*", status(401, "Unauthorized", "Unauthorized"))
    async with speaking(cluster.access(WrittenCredentials(token=reading(token)))) as client:
        with pytest.raises(Refused) as caught:
            await client.look()
    assert caught.value.code == 401
    assert len(cluster.engine.requests) == 2


async def test_token_is_gone(cluster: Kubernetes, tmp_path: Path) -> None:
    """A token that cannot be read is an error of its own, and nothing is asked without it."""

    def nothing() -> str:
        raise cloche.BackendUnavailable("The token is gone.")

    async with speaking(cluster.access(WrittenCredentials(token=reread(nothing)))) as client:
        with pytest.raises(cloche.BackendUnavailable, match="The token is gone"):
            await client.look()
    assert not cluster.engine.requests


async def test_certificate_is_replaced(made: Certificates, others: Certificates, tmp_path: Path) -> None:
    """A certificate that changes is shown on new connections, while what is read over the old ones goes on."""
    shown: list[int] = []
    certificate = pair(made)

    async def note(request: Request, peer: Peer) -> Reply:
        found = peer.certificate()
        assert found is not None
        shown.append(int(found["serialNumber"], 16))
        return Reply(200, {"items": []})

    async def slow_log(request: Request, peer: Peer) -> Raw:
        return Raw(STREAM, chunk(b"begin "), 0.3, chunk(b"end"), FINISHED)

    async with over_tls(context(made, made, others), tmp_path) as cluster:
        cluster.engine.on(f"GET {CORE}/configmaps", note)
        cluster.engine.on("GET */log", slow_log)

        async def give() -> tuple[ClientCertificate, float]:
            return certificate, 0.0

        credentials = WrittenCredentials(certificate=Renewed(give))
        async with speaking(Access(cluster.base, "here", credentials, authority=made.ca.read_text())) as client:
            await client.look()
            async with client.log("p") as stream:
                assert not isinstance(stream, Refused)
                chunks = stream.chunks()
                assert await anext(aiter(chunks)) == b"begin "
                certificate = pair(others)
                await client.look()
                rest = b"".join([chunk async for chunk in chunks])
                assert rest == b"end"
            await client.look()
    assert shown[0] != shown[1] == shown[2]


async def test_headers_of_a_user(cluster: Kubernetes) -> None:
    """Impersonation stands on every request, also on streams."""
    async with speaking(cluster.access(WrittenCredentials({"Impersonate-User": "dev"}))) as client:
        await client.look()
        async with client.log("p"):
            pass
    assert [request.headers["impersonate-user"] for request in cluster.engine.requests] == ["dev", "dev"]
