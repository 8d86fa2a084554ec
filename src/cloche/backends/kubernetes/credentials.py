"""As whom to speak to an API server: tokens and certificates that change while we run, and the programs that make them.

The formats are those of kubernetes.io, "Authenticating" (client-go credential plugins), "Client Authentication (v1)" and
"User Impersonation"; checked with kubernetes/website at 00cce41. No secret is in a message, a log or a repr.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import anyio
import anyio.abc
import anyio.to_thread

from cloche.errors import BackendUnavailable

MAX_FILE_BYTES = 2**20
KEPT_S = 30.0
"""How long what a file says is taken to hold. A bound token is replaced when a fifth of its life is left, which is ten minutes
at the least (kubernetes.io, "Configure Service Accounts for Pods": launch a Pod using service account token projection)."""
AGAIN_S = 5.0
"""A file or program that failed, while what it gave before was never refused, is asked again after so long."""
PLUGIN_S = 60.0
"""A plugin may ask a keyring, or a cloud for a token. It cannot ask a person: it has no terminal."""
MAX_PLUGIN_BYTES = 2**20
COMPLAINT_BYTES = 500
"""How much of the end of a plugin's stderr is shown when it fails."""
EARLY_S = 60.0
"""Credentials that live longer than this are renewed this long before their end: clocks differ."""
API_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")

_END_S = 2.0  # for the kernel to end what was killed
_WORD = "Impersonate"  # with which the names of all headers of that kind begin
_TOKEN = re.compile(r"[\x21-\x7e]+")
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
_log = logging.getLogger("cloche.kubernetes")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A certificate (and those between it and its authority), and its key, both as PEM."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a request comes from: its headers, and what the connection shows."""

    headers: Mapping[str, str] = field(repr=False)
    """Authorization and Impersonate-…; see :func:`impersonation`."""
    certificate: ClientCertificate | None = None


class Credentials(Protocol):
    """Where identities come from."""

    async def identity(self, *, after_refusal: bool = False) -> Identity:
        """As whom to speak now. ``after_refusal``: the last identity met 401; whatever is cached is fetched anew.

        Raises:
            BackendUnavailable: a file or a program does not give what it should.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Held(Generic[T]):
    value: T
    until: float


class Renewed(Generic[T]):
    """A value that is fetched anew when it is old, or was refused. Those who ask meanwhile wait for the one fetch.

    ``fetch`` gives the value and how many seconds it holds. When it fails, the value before is kept, unless it was refused.
    ``clock`` gives seconds.
    """

    def __init__(
        self, fetch: Callable[[], Awaitable[tuple[T, float]]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fetch, self._clock = fetch, clock
        self._lock = anyio.Lock()
        self._held: _Held[T] | None = None
        self._refused: T | None = None
        self._failure: BackendUnavailable | None = None
        self._fetches = 0

    async def get(self, *, after_refusal: bool) -> T:
        """The value.

        Raises:
            BackendUnavailable: it cannot be had.
        """
        held, seen = self._held, self._fetches
        if held is not None and not after_refusal and self._clock() < held.until:
            return held.value
        async with self._lock:
            if self._fetches == seen:
                await self._renew(after_refusal=after_refusal)
            held, failure = self._held, self._failure
        if held is not None:
            return held.value
        assert failure is not None
        raise BackendUnavailable(failure.message, hint=failure.hint) from failure

    async def _renew(self, *, after_refusal: bool) -> None:
        before = self._held
        if after_refusal and before is not None:
            self._refused = before.value
        try:
            value, holds_s = await self._fetch()
        except BackendUnavailable as exc:
            if before is not None and before.value != self._refused:
                _log.warning("%s What it gave before is still used.", exc.message)
                self._held = _Held(before.value, self._clock() + AGAIN_S)
            else:
                self._held, self._failure = None, exc
        else:
            self._held = _Held(value, self._clock() + holds_s)
        self._fetches += 1


def reread(read: Callable[[], T], clock: Callable[[], float] = time.monotonic) -> Renewed[T]:
    """What ``read`` gives, which blocks: called in a thread, at most every 30 s, and at once after a refusal."""

    async def fetch() -> tuple[T, float]:
        return await anyio.to_thread.run_sync(read), KEPT_S

    return Renewed(fetch, clock)


class WrittenCredentials:
    """Credentials that stand somewhere: the headers as they are, the token and the certificate in files that may change."""

    def __init__(
        self,
        headers: Mapping[str, str] | None = None,
        token: Renewed[str] | None = None,
        certificate: Renewed[ClientCertificate] | None = None,
    ) -> None:
        self._headers = dict(headers or {})
        self._token, self._certificate = token, certificate

    async def identity(self, *, after_refusal: bool = False) -> Identity:
        """See :class:`Credentials`."""
        headers = dict(self._headers)
        if self._token is not None:
            headers["Authorization"] = f"Bearer {await self._token.get(after_refusal=after_refusal)}"
        if self._certificate is None:
            return Identity(headers)
        return Identity(headers, await self._certificate.get(after_refusal=after_refusal))


@dataclass(frozen=True, slots=True)
class Plugin:
    """A program that makes credentials, as ``exec`` of a kubeconfig's user names it."""

    command: str
    """A path, or a name to be looked for in PATH."""
    api_version: str
    where: str
    """For people: whose plugin it is."""
    args: tuple[str, ...] = field(default=(), repr=False)
    env: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """Added to our own environment."""
    cluster: Mapping[str, Any] | None = field(default=None, repr=False)
    """``spec.cluster`` of what it is told, when it wants to know."""
    install_hint: str = ""

    def broken(self, words: str, *, complaint: str = "") -> BackendUnavailable:
        """Our error for a plugin that ``words``."""
        said = f" It said: {complaint}" if complaint else ""
        return BackendUnavailable(
            f"The credential plugin {self.command} ({self.where}) {words}.{said}",
            hint="Run a kubectl command with the same context: it starts the same plugin, and you can answer what it asks.",
        )


@dataclass(frozen=True, slots=True)
class _Made:
    token: str | None = field(repr=False)
    certificate: ClientCertificate | None


class PluginCredentials:
    """Credentials that a program makes. They are kept until their end, or for good when they have none.

    ``headers`` are sent beside those that are made, ``certificate`` is shown unless the program makes one. ``clock`` gives
    seconds since 1970.
    """

    def __init__(
        self,
        plugin: Plugin,
        headers: Mapping[str, str] | None = None,
        certificate: Renewed[ClientCertificate] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plugin, self._clock = plugin, clock
        self._written = WrittenCredentials(headers, certificate=certificate)
        self._made = Renewed(self._make, clock)

    async def identity(self, *, after_refusal: bool = False) -> Identity:
        """See :class:`Credentials`."""
        made = await self._made.get(after_refusal=after_refusal)
        written = await self._written.identity(after_refusal=after_refusal)
        headers = dict(written.headers)
        if made.token is not None:
            headers["Authorization"] = f"Bearer {made.token}"
        return Identity(headers, made.certificate or written.certificate)

    async def _make(self) -> tuple[_Made, float]:
        made, expires = _parse(self._plugin, await _ask(self._plugin))
        if made.certificate is not None:
            await anyio.to_thread.run_sync(check, made.certificate, f"The certificate of {self._plugin.command}")
        if expires is None:
            return made, float("inf")
        life_s = expires - self._clock()
        return made, life_s - EARLY_S if life_s > EARLY_S else life_s


async def _ask(plugin: Plugin) -> bytes:
    """What the plugin writes. Started anew each time, ended after PLUGIN_S."""
    program = await anyio.to_thread.run_sync(shutil.which, plugin.command)
    if program is None:
        raise BackendUnavailable(
            f"The credential plugin {plugin.command} ({plugin.where}) is not there, or is no program.",
            hint=plugin.install_hint or "Install it, and check that it is in the PATH of this process.",
        )
    spec: dict[str, Any] = {"interactive": False}
    if plugin.cluster is not None:
        spec["cluster"] = plugin.cluster
    try:
        told = json.dumps({"kind": "ExecCredential", "apiVersion": plugin.api_version, "spec": spec}, default=str)
        process = await anyio.open_process(
            [program, *plugin.args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **plugin.env, "KUBERNETES_EXEC_INFO": told},
            start_new_session=True,
        )
    except (OSError, ValueError, RecursionError) as exc:
        words = exc.strerror if isinstance(exc, OSError) and exc.strerror else "its arguments cannot be passed on"
        raise plugin.broken(f"could not be started: {words}") from None
    assert process.stdout is not None
    assert process.stderr is not None
    output, complaint, ended = bytearray(), bytearray(), False
    try:
        with anyio.move_on_after(PLUGIN_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_keep_tail, process.stderr, complaint)
                async for chunk in process.stdout:
                    output += chunk
                    if len(output) > MAX_PLUGIN_BYTES:
                        tasks.cancel_scope.cancel()
                        break
            if len(output) <= MAX_PLUGIN_BYTES:
                await process.wait()
                ended = True
    finally:
        await _end(process, killed=not ended)
    words = re.sub(r"[^\x20-\x7e]+", " ", complaint.decode(errors="replace")).strip()
    if len(output) > MAX_PLUGIN_BYTES:
        raise plugin.broken(f"writes more than {MAX_PLUGIN_BYTES} bytes")
    if not ended:
        raise plugin.broken(f"did not end within {PLUGIN_S:g} s", complaint=words)
    if process.returncode != 0:
        raise plugin.broken(f"failed with status {process.returncode}", complaint=words)
    return bytes(output)


async def _keep_tail(stream: anyio.abc.ByteReceiveStream, into: bytearray) -> None:
    async for chunk in stream:
        into += chunk
        del into[:-COMPLAINT_BYTES]


async def _end(process: anyio.abc.Process, *, killed: bool) -> None:
    """No process of the plugin's session is left, if it did not end by itself; and no descriptor of ours."""
    if killed:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    with anyio.move_on_after(_END_S, shield=True):
        await process.wait()
    if process.returncode is not None:
        with anyio.CancelScope(shield=True):
            await process.aclose()


def _parse(plugin: Plugin, output: bytes) -> tuple[_Made, float | None]:
    """What was made, and its end in seconds since 1970; None: it has none."""
    try:
        answer: Any = json.loads(output)
    except (ValueError, RecursionError):
        raise plugin.broken("gives no JSON") from None
    if not isinstance(answer, dict) or cast("dict[str, Any]", answer).get("kind") != "ExecCredential":
        raise plugin.broken("gives no ExecCredential")
    credential = cast("dict[str, Any]", answer)
    if credential.get("apiVersion") != plugin.api_version:
        raise plugin.broken(f"does not answer in the version that the kubeconfig names, {plugin.api_version}")
    status = credential.get("status")
    if not isinstance(status, dict):
        raise plugin.broken("gives an ExecCredential without status")
    given = cast("dict[str, Any]", status)

    def text(name: str) -> str | None:
        value = given.get(name)
        if value is not None and not isinstance(value, str):
            raise plugin.broken(f"gives a {name} that is no text")
        return value or None

    token, certificate, key = text("token"), text("clientCertificateData"), text("clientKeyData")
    if token is None and certificate is None and key is None:
        raise plugin.broken("gives neither a token nor a certificate")
    if token is not None and _TOKEN.fullmatch(token) is None:
        raise plugin.broken("gives a token with characters that no token has")
    if (certificate is None) != (key is None):
        raise plugin.broken("gives only one of certificate and key")
    pair = ClientCertificate(certificate.encode(), key.encode()) if certificate and key else None
    end = text("expirationTimestamp")
    if end is None:
        return _Made(token, pair), None
    try:
        moment = datetime.fromisoformat(end)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise plugin.broken("gives an expirationTimestamp that is no time as of RFC 3339")
    return _Made(token, pair), moment.timestamp()


def basic(username: str, password: str) -> str:
    """The value of ``Authorization`` for a name and a password (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


def bearer(token: str, where: str) -> str:
    """The value of ``Authorization`` for a token (RFC 6750); ``where`` it stands, for people.

    Raises:
        BackendUnavailable: it has characters that no header can carry.
    """
    return f"Bearer {_checked(token, where)}"


def read_file(path: Path, where: str) -> bytes:
    """A small file. ``where`` says what it is, for people; its path is added. Blocks.

    Raises:
        BackendUnavailable: it cannot be read, or has more than MAX_FILE_BYTES.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as exc:
        words = (exc.strerror or type(exc).__name__) if isinstance(exc, OSError) else "that is no path"
        raise BackendUnavailable(
            f"{where}, {path}, cannot be read: {words}.", hint="Correct the path, or let this user read it."
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise BackendUnavailable(
            f"{where}, {path}, has more than {MAX_FILE_BYTES} bytes.", hint="Check that it is the right file."
        )
    return data


def read_token(path: Path, where: str) -> str:
    """The token in a file, without the white space around it. Blocks.

    Raises:
        BackendUnavailable: there is none.
    """
    return _checked(read_file(path, where).decode(errors="replace").strip(), f"{where}, {path},")


def _checked(token: str, where: str) -> str:
    if _TOKEN.fullmatch(token) is None:
        words = "has characters that no token has" if token else "is empty"
        raise BackendUnavailable(f"{where} {words}.", hint="Write a new token to it.")
    return token


def impersonation(user: str, uid: str, groups: tuple[str, ...], more: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """The headers that ask to act as another user (kubernetes.io, "User Impersonation"). Empty texts ask for nothing.

    A mapping has one value for a name, and here a name may have several. The names of headers do not mind their case (RFC
    9110, 5.1), so each further value has its name spelt in another way.

    Raises:
        ValueError: a value that no header can carry, or too many of one name.
    """
    headers: dict[str, str] = {}
    seen: Counter[str] = Counter()

    def add(name: str, value: str) -> None:
        if not value or not value.isascii() or not value.isprintable() or value != value.strip():
            raise ValueError("no header can carry it")
        if seen[name] == 2 ** len(_WORD):
            raise ValueError("there are too many of them")
        headers[_spelt(name, seen[name])] = value
        seen[name] += 1

    if user:
        add("Impersonate-User", user)
    if uid:
        add("Impersonate-Uid", uid)
    for group in groups:
        add("Impersonate-Group", group)
    for key, values in more.items():
        for value in values:
            add(f"Impersonate-Extra-{_escaped(key)}", value)
    return headers


def _spelt(name: str, number: int) -> str:
    """The spelling of that number; 0: as it is."""
    word = "".join(c.swapcase() if number >> place & 1 else c for place, c in enumerate(_WORD))
    return word + name.removeprefix(_WORD)


def _escaped(key: str) -> str:
    """A key within the name of a header: lower case, and what no name has as percent and number."""
    plain = b"abcdefghijklmnopqrstuvwxyz0123456789!#$&'*+-.^_`|~"
    return "".join(chr(byte) if byte in plain else f"%{byte:02X}" for byte in key.lower().encode())


# --- certificates -----------------------------------------------------------------------------------------------------


def load(context: ssl.SSLContext, certificate: ClientCertificate) -> None:
    """Have a context show a certificate. Blocks for a moment.

    Python reads keys from files only: here from one in memory, or, where there is no such thing, from one that only this user
    can read and that is gone when this returns.

    Raises:
        OSError, ssl.SSLError: it cannot be used.
    """
    pem = certificate.certificate.rstrip() + b"\n" + certificate.key.rstrip() + b"\n"
    # Without a password OpenSSL would ask at the terminal for one.
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        with open(os.memfd_create("cloche-certificate"), "wb") as file:
            file.write(pem)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password="")
        return
    descriptor, name = tempfile.mkstemp(prefix="cloche-")
    try:
        with open(descriptor, "wb") as file:
            file.write(pem)
        context.load_cert_chain(name, password="")
    finally:
        os.unlink(name)


def check(certificate: ClientCertificate, where: str) -> None:
    """Whether certificate and key can be used; ``where`` they are from begins a sentence. Blocks for a moment.

    Raises:
        BackendUnavailable: they cannot, or the certificate's life is over.
    """
    try:
        load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            words, hint = "does not fit its key", "Take certificate and key from the same place."
        elif b"ENCRYPTED" in certificate.key:
            words, hint = "has a key that is encrypted", "Store the key without a password, as kubectl needs it too."
        else:
            words, hint = "or its key is not in PEM form", "Check both: each begins with a line of -----BEGIN."
        raise BackendUnavailable(f"{where} {words}.", hint=hint) from None
    except OSError as exc:
        raise BackendUnavailable(f"{where} cannot be loaded: {exc.strerror}.", hint="Free memory or disk.") from None
    end = not_after(certificate.certificate)
    if end is not None and end <= datetime.now(UTC):
        raise BackendUnavailable(
            f"{where} expired at {end:%Y-%m-%d %H:%M} UTC.",
            hint="Get a new one from whoever runs the cluster (kubeadm: kubeadm certs renew), or set the clock right.",
        )


def not_after(pem: bytes) -> datetime | None:
    """The end of the life of the first certificate (RFC 5280, 4.1.2.5); None where it cannot be told."""
    found = _CERTIFICATE.search(pem)
    if found is None:
        return None
    try:
        der = base64.b64decode(found[1])
        at = _element(der, _element(der, 0)[1])[1]  # into the certificate, and into what is signed
        if der[at] == 0xA0:  # the version, where it is written
            at = _element(der, at)[2]
        for _ in range(3):  # serial number, algorithm, issuer
            at = _element(der, at)[2]
        at = _element(der, _element(der, at)[1])[2]  # into the validity, and over its begin
        tag, begin, end = _element(der, at)
        text = der[begin:end].decode("ascii")
        if tag == 0x17:  # UTCTime: the years 1950 to 2049
            text = ("20" if text[:2] < "50" else "19") + text
        return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
    except (binascii.Error, ValueError, IndexError):
        return None


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Tag, begin and end of what stands there (X.690, 8.1)."""
    tag, size, begin = der[at], der[at + 1], at + 2
    if size & 0x80:
        length = size & 0x7F
        size, begin = int.from_bytes(der[begin : begin + length], "big"), begin + length
    return tag, begin, begin + size
