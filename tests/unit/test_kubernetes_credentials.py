"""Tokens and certificates that change while cloche runs, and the plugins that make them."""

from __future__ import annotations

import functools
import json
import os
import ssl
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

import cloche
from cloche.backends.kubernetes import credentials
from cloche.backends.kubernetes.credentials import (
    ClientCertificate,
    Identity,
    Plugin,
    PluginCredentials,
    Renewed,
    WrittenCredentials,
    check,
    impersonation,
    not_after,
    read_token,
    reread,
)

# Made for these tests, by an authority that exists nowhere else; KEY belongs to CLIENT and to EXPIRED.
CLIENT = """\
-----BEGIN CERTIFICATE-----
MIIBXTCCAQSgAwIBAgIBAzAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAd0ZXN0LWNh
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAOMQwwCgYDVQQDDANk
ZXYwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARXtSocWZrKNd6mbk+1bPt7SdNM
b6mqxSXZPZIPcgOYTxufSRppzI5HZ4/+7X6HPngkFn8T0bgQIA1WaLWN2GEso00w
SzAJBgNVHRMEAjAAMB0GA1UdDgQWBBR3JvUcDjqsuugyHYYHc/KKGHdSRDAfBgNV
HSMEGDAWgBScos+E9HZJN96COkZectLgp1E4vTAKBggqhkjOPQQDAgNHADBEAiBg
Y9WYjr7dWc6jds4NMRVd3NUtydT7fxtmSS6DMWATWwIgQU1SdTjgrNfc8UIwdbsC
SkTN0WsDUcOy1tY16f6PBDI=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgGK/YZ/ECMAMdjWW2
AgFqusateFeU0aTfkxXIgtRpGrOhRANCAARXtSocWZrKNd6mbk+1bPt7SdNMb6mq
xSXZPZIPcgOYTxufSRppzI5HZ4/+7X6HPngkFn8T0bgQIA1WaLWN2GEs
-----END PRIVATE KEY-----
"""
EXPIRED = """\
-----BEGIN CERTIFICATE-----
MIIBXDCCAQKgAwIBAgIBBDAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAd0ZXN0LWNh
MB4XDTIwMDEwMTAwMDAwMFoXDTIxMDEwMTAwMDAwMFowDjEMMAoGA1UEAwwDZGV2
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEV7UqHFmayjXepm5PtWz7e0nTTG+p
qsUl2T2SD3IDmE8bn0kaacyOR2eP/u1+hz54JBZ/E9G4ECANVmi1jdhhLKNNMEsw
CQYDVR0TBAIwADAdBgNVHQ4EFgQUdyb1HA46rLroMh2GB3Pyihh3UkQwHwYDVR0j
BBgwFoAUnKLPhPR2STfegjpGXnLS4KdROL0wCgYIKoZIzj0EAwIDSAAwRQIgDeP3
bzeYUE2ObS+v1qxtU9zB1IwqhKyiT5aKtA14wigCIQC72qq/WU79YBi0MbJVjnWe
XeoQmKkrkwI7D0iz3ofiKA==
-----END CERTIFICATE-----
"""
OTHER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgk217bV4C6o2Lmt6B
YwtZvY5A+WiVTxrRL52x7NHUsK2hRANCAASh07R2O1onN9mU8p9DZ+fZWyfsMhLN
aiWRsRr/n3Em0MlPp8HMmhdQJI/CVhyGGZXTaGohneYs8DeIR1yddJ64
-----END PRIVATE KEY-----
"""
ENCRYPTED_KEY = """\
-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,489A323738E43126CAC1EC9B96666CF1

FGW5NvPGHXyX2cl3yghyny+ei2RfOE7U+T7465CgNpoh+BcoD8MzV1y/jWfCRxeK
0nSGvbJfoAt3S6mV2UyFo/Z3WWxYvYNN8gcvqxCo2ztmOqxefKSd+F01GV6JK8+V
mLLn8l9bqeYvrivNmNCR/iRLF7JNeANtD2BQ/glT4LI=
-----END EC PRIVATE KEY-----
"""
V1 = "client.authentication.k8s.io/v1"
PAIR = ClientCertificate(CLIENT.encode(), KEY.encode())


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# --- files ------------------------------------------------------------------------------------------------------------


def from_file(path: Path, clock: Clock) -> WrittenCredentials:
    return WrittenCredentials(token=reread(functools.partial(read_token, path, "The token"), clock))


async def token(found: WrittenCredentials | PluginCredentials, *, after_refusal: bool = False) -> str:
    identity = await found.identity(after_refusal=after_refusal)
    return identity.headers["Authorization"].removeprefix("Bearer ")


async def test_a_token_is_read_again(tmp_path: Path) -> None:
    """A token in a file is taken from memory for 30 s, and then from the file."""
    clock, path = Clock(), tmp_path / "token"
    path.write_text("one\n")
    found = from_file(path, clock)
    assert await token(found) == "one"
    path.write_text("two")
    clock.now += 29.9
    assert await token(found) == "one"
    clock.now += 0.2
    assert await token(found) == "two"


async def test_a_refused_token_is_read_at_once(tmp_path: Path) -> None:
    """After a 401 the file is read whatever the time, and what it says holds for 30 s again."""
    clock, path = Clock(), tmp_path / "token"
    path.write_text("one")
    found = from_file(path, clock)
    assert await token(found) == "one"
    path.write_text("two")
    assert await token(found, after_refusal=True) == "two"
    path.write_text("three")
    clock.now += 29
    assert await token(found) == "two"


@pytest.mark.parametrize(
    "text",
    [None, "", " \n", "hush hush", "a\x00b", "\u00e4", "x" * (2**20 + 1)],
    ids=["none", "empty", "white", "two", "nul", "umlaut", "large"],
)
async def test_no_token(tmp_path: Path, text: str | None) -> None:
    """A file that is missing, empty, too large, or holds no token is an error with its path, and without its text."""
    path = tmp_path / "token"
    if text is not None:
        path.write_text(text)
    with pytest.raises(cloche.BackendUnavailable) as caught:
        await token(from_file(path, Clock()))
    assert str(path) in caught.value.message
    assert "hush" not in str(caught.value)


async def test_a_token_that_vanishes(tmp_path: Path) -> None:
    """A token that was never refused is used on when its file is gone; one that was refused is not."""
    clock, path = Clock(), tmp_path / "token"
    path.write_text("one")
    found = from_file(path, clock)
    assert await token(found) == "one"
    path.unlink()
    clock.now += 31
    assert await token(found) == "one"
    with pytest.raises(cloche.BackendUnavailable, match="token"):
        await token(found, after_refusal=True)
    with pytest.raises(cloche.BackendUnavailable, match="token"):
        await token(found)
    path.write_text("two")
    assert await token(found) == "two"


async def test_a_token_that_was_refused_and_vanishes(tmp_path: Path) -> None:
    """A refused token that the file still held is not used on when the file goes."""
    clock, path = Clock(), tmp_path / "token"
    path.write_text("one")
    found = from_file(path, clock)
    await token(found)
    assert await token(found, after_refusal=True) == "one"
    path.unlink()
    clock.now += 31
    with pytest.raises(cloche.BackendUnavailable):
        await token(found)


async def test_a_kept_token_is_not_looked_for_each_time(tmp_path: Path) -> None:
    """While its file is gone, the file is looked for every 5 s."""
    clock, path = Clock(), tmp_path / "token"
    path.write_text("one")
    found = from_file(path, clock)
    await token(found)
    path.unlink()
    clock.now += 31
    await token(found)
    path.write_text("two")
    assert await token(found) == "one"
    clock.now += 5
    assert await token(found) == "two"


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("refused", [False, True])
async def test_one_fetch_for_all(*, fails: bool, refused: bool) -> None:
    """Those who ask while a value is fetched get the outcome of that fetch, be it good or bad."""
    fetches, outcomes, gate = 0, list[str](), anyio.Event()

    async def fetch() -> tuple[str, float]:
        nonlocal fetches
        fetches += 1
        await gate.wait()
        if fails:
            raise cloche.BackendUnavailable("It is broken.")
        return "value", 30.0

    found = Renewed(fetch, Clock())

    async def ask() -> None:
        try:
            outcomes.append(await found.get(after_refusal=refused))
        except cloche.BackendUnavailable as exc:
            outcomes.append(exc.message)

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    assert outcomes == ["It is broken." if fails else "value"] * 5
    assert fetches == 1


async def test_a_fetch_that_is_cancelled() -> None:
    """When the one who fetches is cancelled, the next in line fetches."""
    fetches = 0

    async def fetch() -> tuple[str, float]:
        nonlocal fetches
        fetches += 1
        if fetches == 1:
            await anyio.sleep_forever()
        return "value", 30.0

    found = Renewed(fetch, Clock())
    got = []

    async def ask() -> None:
        got.append(await found.get(after_refusal=False))

    async with anyio.create_task_group() as outer, anyio.create_task_group() as first:
        first.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        outer.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        first.cancel_scope.cancel()
    assert got == ["value"]


# --- plugins ----------------------------------------------------------------------------------------------------------


def program(folder: Path, body: str) -> str:
    path = folder / "plugin"
    path.write_text(f"#!/bin/sh\necho run >>{folder}/runs\n{body}\n")
    path.chmod(0o755)
    return str(path)


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


def says(status: Any, version: str = V1) -> str:
    answer = json.dumps({"apiVersion": version, "kind": "ExecCredential", "status": status})
    return f"cat <<'EOF'\n{answer}\nEOF"


def plugin(folder: Path, body: str, **more: Any) -> Plugin:
    return Plugin(program(folder, body), V1, "user 'dev' of /kube/config", **more)


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


async def test_a_plugin(tmp_path: Path) -> None:
    """A plugin's token and certificate are taken, beside the headers that are written."""
    status = {"token": "tok", "clientCertificateData": CLIENT, "clientKeyData": KEY}
    found = PluginCredentials(plugin(tmp_path, says(status)), {"Impersonate-User": "other"})
    identity = await found.identity()
    assert identity.headers == {"Impersonate-User": "other", "Authorization": "Bearer tok"}
    assert identity.certificate == PAIR


async def test_a_plugin_that_makes_a_certificate_only(tmp_path: Path) -> None:
    """Without a token there is no header."""
    found = PluginCredentials(plugin(tmp_path, says({"clientCertificateData": CLIENT, "clientKeyData": KEY})))
    assert await found.identity() == Identity({}, PAIR)


async def test_what_a_plugin_is_told(tmp_path: Path) -> None:
    """A plugin gets its arguments, our environment and its own variables, and reads that it has nobody to ask."""
    body = f"""\
printf '%s\\n' "$KUBERNETES_EXEC_INFO" "$1|$2" "$MINE" "$HOME" >{tmp_path}/told
read -r line && echo "there is a stdin" >>{tmp_path}/told
{says({"token": "tok"})}"""
    cluster = {"server": "https://h", "config": {"a": [1]}}
    made = plugin(tmp_path, body, args=("a b", "$x"), env={"MINE": "yes"}, cluster=cluster)
    assert await token(PluginCredentials(made)) == "tok"
    info, args, mine, home = (tmp_path / "told").read_text().splitlines()
    assert json.loads(info) == {
        "apiVersion": V1,
        "kind": "ExecCredential",
        "spec": {"interactive": False, "cluster": cluster},
    }
    assert (args, mine, home) == ("a b|$x", "yes", os.environ.get("HOME", ""))


async def test_a_plugin_in_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without a slash is looked for in PATH."""
    program(tmp_path, says({"token": "tok"}))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert await token(PluginCredentials(Plugin("plugin", V1, "user 'dev'"))) == "tok"


@pytest.mark.parametrize("mode", [None, 0o644])
async def test_a_plugin_that_is_not_there(tmp_path: Path, mode: int | None) -> None:
    """A plugin that is missing, or no program, is named, with the kubeconfig's own words on how to install it."""
    path = tmp_path / "plugin"
    if mode is not None:
        path.write_text("")
        path.chmod(mode)
    made = Plugin(str(path), V1, "user 'dev' of /kube/config", install_hint="brew install it")
    with pytest.raises(cloche.BackendUnavailable, match="not there") as caught:
        await PluginCredentials(made).identity()
    assert str(path) in caught.value.message
    assert "user 'dev' of /kube/config" in caught.value.message
    assert caught.value.hint == "brew install it"


async def test_a_plugin_without_an_end(tmp_path: Path) -> None:
    """Credentials without an end are kept until they are refused."""
    clock = Clock(time.time())
    found = PluginCredentials(plugin(tmp_path, says({"token": "tok"})), clock=clock)
    await token(found)
    clock.now += 10**9
    await token(found)
    assert runs(tmp_path) == 1
    await token(found, after_refusal=True)
    assert runs(tmp_path) == 2


@pytest.mark.parametrize(
    ("life_s", "kept_s"), [(3600, 3539), (61, 0.5), (60, 59), (10, 9)], ids=["hour", "61 s", "60 s", "10 s"]
)
async def test_a_plugin_with_an_end(tmp_path: Path, life_s: float, kept_s: float) -> None:
    """Credentials are renewed a minute before their end, or at it when they live no longer than that."""
    clock = Clock(1_800_000_000)
    status = {"token": "tok", "expirationTimestamp": at(clock.now + life_s)}
    found = PluginCredentials(plugin(tmp_path, says(status)), clock=clock)
    await token(found)
    clock.now += kept_s
    await token(found)
    assert runs(tmp_path) == 1
    clock.now += 1.5
    await token(found)
    assert runs(tmp_path) == 2


async def test_a_plugin_with_old_credentials(tmp_path: Path) -> None:
    """Credentials that are over already are used once: our clock may be wrong."""
    clock = Clock(1_800_000_000)
    status = {"token": "tok", "expirationTimestamp": at(clock.now - 10)}
    found = PluginCredentials(plugin(tmp_path, says(status)), clock=clock)
    assert await token(found) == await token(found) == "tok"
    assert runs(tmp_path) == 2


async def test_one_run_for_all(tmp_path: Path) -> None:
    """However many ask at a time, the plugin runs once."""
    found = PluginCredentials(plugin(tmp_path, "sleep 0.1\n" + says({"token": "tok"})))
    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(found.identity)
    assert runs(tmp_path) == 1


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("echo 'hush-1' ; echo 'please log in' >&2; exit 3", r"failed with status 3\. It said: please log in"),
        ("echo hush-1", "no JSON"),
        ("echo '[\"hush-1\"]'", "no ExecCredential"),
        ('echo \'{"kind": "Secret", "x": "hush-1"}\'', "no ExecCredential"),
        ("printf '%0200000d' 0 | tr 0 '['", "no JSON"),
        (says({"token": "hush-1"}, "client.authentication.k8s.io/v1beta1"), "version"),
        (says(None), "without status"),
        (says({}), "neither"),
        (says({"token": ""}), "neither"),
        (says({"token": 7}), "token that is no text"),
        (says({"token": "hush-1\r\nX: y"}), "characters"),
        (says({"clientCertificateData": CLIENT}), "only one"),
        (says({"token": "hush-1", "clientKeyData": KEY}), "only one"),
        (says({"clientCertificateData": CLIENT, "clientKeyData": OTHER_KEY}), "does not fit its key"),
        (says({"clientCertificateData": EXPIRED, "clientKeyData": KEY}), "expired at 2021-01-01"),
        (says({"token": "hush-1", "expirationTimestamp": "tomorrow"}), "RFC 3339"),
        (says({"token": "hush-1", "expirationTimestamp": "2030-01-01T00:00:00"}), "RFC 3339"),
        ("head -c 1100000 /dev/zero; sleep 60", "more than 1048576 bytes"),
    ],
)
async def test_a_plugin_that_fails(tmp_path: Path, body: str, match: str) -> None:
    """What is wrong with a plugin's answer is said, with the plugin's name and without what it wrote to stdout."""
    found = PluginCredentials(plugin(tmp_path, body))
    with pytest.raises(cloche.BackendUnavailable, match=match) as caught:
        await found.identity()
    assert str(tmp_path / "plugin") in caught.value.message
    assert "hush" not in str(caught.value)
    assert "PRIVATE" not in str(caught.value)


async def test_a_plugin_that_is_no_program(tmp_path: Path) -> None:
    """A file that the system cannot execute is an error of cloche's."""
    path = tmp_path / "plugin"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)
    with pytest.raises(cloche.BackendUnavailable, match="could not be started"):
        await PluginCredentials(Plugin(str(path), V1, "user 'dev'")).identity()


@pytest.mark.parametrize("more", [{"args": ("a\0b",)}, {"env": {"A": "b\0"}}, {"args": ("x" * 2**20,) * 4}])
async def test_arguments_that_cannot_be(tmp_path: Path, more: dict[str, Any]) -> None:
    """Arguments and variables that no program can be given are an error of cloche's."""
    with pytest.raises(cloche.BackendUnavailable, match="could not be started"):
        await PluginCredentials(plugin(tmp_path, "", **more)).identity()


async def test_a_plugin_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that does not end is ended in time, with what it started, and its last words are shown."""
    monkeypatch.setattr(credentials, "PLUGIN_S", 0.3)
    found = PluginCredentials(plugin(tmp_path, f"echo 'open a browser' >&2; sleep 60 & echo $! >{tmp_path}/pid; wait"))
    with pytest.raises(cloche.BackendUnavailable, match=r"did not end within 0\.3 s\. It said: open a browser"):
        await found.identity()
    await gone(int((tmp_path / "pid").read_text()))


async def test_a_plugin_and_a_cancelled_caller(tmp_path: Path) -> None:
    """When nobody waits any more, the plugin does not go on."""
    found = PluginCredentials(plugin(tmp_path, f"echo $$ >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 60"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.identity)
        while not (tmp_path / "pid").exists():  # noqa: ASYNC110 (another process makes it)
            await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    await gone(int((tmp_path / "pid").read_text()))


async def gone(pid: int) -> None:
    with anyio.fail_after(2):
        while True:
            try:
                os.kill(pid, 0)
                if sys.platform == "linux" and ") Z " in Path(f"/proc/{pid}/stat").read_text():
                    return  # whoever adopted it has not looked yet
            except (ProcessLookupError, FileNotFoundError):
                return
            await anyio.sleep(0.01)


async def test_the_longest_complaint(tmp_path: Path) -> None:
    """Of a long complaint the end is shown, on one line; it fills no pipe."""
    body = "head -c 200000 /dev/zero | tr '\\0' x >&2; printf '\\nthe\\033[1m end\\n' >&2; exit 1"
    with pytest.raises(cloche.BackendUnavailable) as caught:
        await PluginCredentials(plugin(tmp_path, body)).identity()
    assert caught.value.message.endswith("the [1m end")
    assert len(caught.value.message) < 1000


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_key_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, in_memory: bool) -> None:
    """A key is on no disk after it was loaded, or could not be, whether the system has files in memory or not."""
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    credentials.load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), PAIR)
    with pytest.raises(ssl.SSLError):
        credentials.load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ClientCertificate(CLIENT.encode(), b"nonsense"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("certificate", "key", "match"),
    [
        (CLIENT, OTHER_KEY, "does not fit its key"),
        (CLIENT, ENCRYPTED_KEY, "encrypted"),
        (CLIENT, CLIENT, "PEM"),
        (KEY, KEY, "PEM"),
        ("", "", "PEM"),
        ("nonsense", KEY, "PEM"),
        (EXPIRED, KEY, "expired at 2021-01-01 00:00 UTC"),
    ],
)
def test_certificates_that_cannot_be_used(certificate: str, key: str, match: str) -> None:
    """What is wrong with a certificate or its key is said, nothing of the key is, and no password is asked for."""
    with pytest.raises(cloche.BackendUnavailable, match=match) as caught:
        check(ClientCertificate(certificate.encode(), key.encode()), "The certificate of dev")
    assert caught.value.message.startswith("The certificate of dev")
    assert "PRIVATE" not in str(caught.value)


def test_the_end_of_a_certificate() -> None:
    """The end of a certificate's life is read in both forms of time; of what is no certificate there is none."""
    assert not_after(CLIENT.encode()) == datetime(2120, 1, 1, tzinfo=UTC)
    assert not_after(b"# a comment\n" + EXPIRED.encode() + CLIENT.encode()) == datetime(2021, 1, 1, tzinfo=UTC)
    head, tail = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    for text in ("", KEY, head + tail, f"{head}\n####\n{tail}", f"{head}\nMIIB\n{tail}", CLIENT[:120] + "\n" + tail):
        assert not_after(text.encode()) is None


def test_secrets_have_no_repr() -> None:
    """Neither tokens, nor keys, nor the arguments of a plugin are in a repr."""
    made = Plugin("plugin", V1, "user 'dev'", ("hush",), {"A": "hush"}, {"config": "hush"})
    for value in (Identity({"Authorization": "Bearer hush"}, PAIR), PAIR, made):
        assert "hush" not in repr(value)
        assert "BEGIN" not in repr(value)


# --- other users ------------------------------------------------------------------------------------------------------


def test_impersonation() -> None:
    """Each value has a header of its own, with one name whatever its case; keys are encoded as Kubernetes reads them."""
    headers = impersonation("jane", "42", ("a", "b", "c"), {"Acme.com/Project": ("x",), "scopes": ("v", "w")})
    assert sorted((name.lower(), value) for name, value in headers.items()) == [
        ("impersonate-extra-acme.com%2fproject", "x"),
        ("impersonate-extra-scopes", "v"),
        ("impersonate-extra-scopes", "w"),
        ("impersonate-group", "a"),
        ("impersonate-group", "b"),
        ("impersonate-group", "c"),
        ("impersonate-uid", "42"),
        ("impersonate-user", "jane"),
    ]
    assert impersonation("", "", (), {}) == {}


@pytest.mark.parametrize("groups", [("",), ("a\nb",), (" a",), ("\u00e4",), ("g",) * 2049])
def test_values_that_no_header_carries(groups: tuple[str, ...]) -> None:
    """A value that would break a header is refused."""
    with pytest.raises(ValueError, match=r"header|many"):
        impersonation("jane", "", groups, {})
