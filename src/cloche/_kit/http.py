"""The one door to HTTP: a client of one server with bounded reads, explicit timeouts, and errors told apart at one seam.

Everything else in the package speaks to servers through this module; nothing else imports httpx2.
"""

from __future__ import annotations

import email.utils
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import quote

import anyio
import httpcore2  # what httpx2 itself stands on: the errors of a connection that has left HTTP are still its own
import httpx2

from cloche._kit.fields import parse_json
from cloche._kit.streams import Backend, GuardedBackend, IPAddress, NotAllowedError

Query: TypeAlias = Mapping[str, str | int | bool]
"""Parameters behind the ``?``. Booleans are written as ``true`` and ``false``."""

Part: TypeAlias = tuple[str, bytes]
"""A file of a form (multipart/form-data): the field's name, which is the file's too, and its content."""

CONNECT_S = 10.0
"""For a connection to be there; a local socket takes microseconds, another continent a second."""
KEPT_CONNECTIONS, KEPT_S = 20, 20.0
"""How many idle connections are kept, and for how long: less than servers keep them."""
READ_BYTES = 64 * 1024


class HttpFailure(Exception):
    """No answer came, or none that can be used. Never raised itself."""


class ConnectFailure(HttpFailure):
    """The server was not reached: nothing was sent. ``errno`` is the system's number, where there is one."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class TlsFailure(ConnectFailure):
    """The server was reached and the two could not agree on TLS."""


class NotAllowed(ConnectFailure):
    """Connections to ``host`` are not allowed, as it is at ``address``. Nothing was sent."""

    def __init__(self, host: str, address: str) -> None:
        super().__init__(f"connections to {host} ({address}) are not allowed")
        self.host = host
        self.address = address


class ConnectionLost(HttpFailure):
    """The connection broke after something had been sent: the server may have done what was asked."""


class TimedOut(HttpFailure):
    """The server did not answer in time; it may have done what was asked."""


class TooLarge(HttpFailure):
    """The answer is larger than the bound."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server listens. ``socket`` is the path of a Unix socket, ``base`` then only names the host in requests."""

    base: str
    socket: str | None = None
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    """None: what the system trusts, for addresses that begin with https."""
    name: str | None = None
    """The name that the server's certificate has to bear, where it is not that of ``base``."""

    def __post_init__(self) -> None:
        """Raises: ValueError, for an address that is none."""
        try:
            httpx2.URL(self.base)
        except httpx2.InvalidURL as exc:
            raise ValueError(str(exc)) from None


@dataclass(frozen=True, slots=True)
class Pieces:
    """A body that is sent piece by piece, so that a large one is not put together first."""

    content_type: str
    pieces: Sequence[bytes] = field(repr=False)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """All of it, in chunks of which each can be sent in the time for one."""
        for piece in self.pieces:
            for start in range(0, len(piece), READ_BYTES):
                yield piece[start : start + READ_BYTES]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether the status is one of 2xx."""
        return 200 <= self.status < 300

    @property
    def server_time(self) -> float | None:
        """Unix time by the server's clock, in whole seconds; None: it does not say."""
        try:
            return email.utils.parsedate_to_datetime(self.headers.get("date", "")).timestamp()
        except (TypeError, ValueError, OverflowError):
            return None

    def json(self) -> Any:
        """The body, parsed.

        Raises:
            ValueError: it is not JSON.
        """
        return parse_json(self.body)


def trusted_by_system() -> ssl.SSLContext:
    """TLS with the authorities that the system trusts. Blocks: they take some tens of milliseconds to load."""
    return httpx2.create_ssl_context()


def segment(text: str) -> str:
    """One part of a path, encoded: a ``/`` in it stays inside, and ``..`` leads nowhere."""
    return text.replace(".", "%2E") if text in {".", ".."} else quote(text, safe="")


class Connection:
    """A connection that has left HTTP behind: bytes both ways."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def read(self) -> bytes:
        """The next bytes; empty when the other side has closed.

        Raises:
            ConnectionLost: it broke.
        """
        with _translated():
            return bytes(await self._stream.read(READ_BYTES))

    async def write(self, data: bytes) -> None:
        """Send all of ``data``.

        Raises:
            ConnectionLost: it broke, or the other side takes no more.
        """
        with _translated():
            await self._stream.write(data)


class Stream:
    """A response whose body is read as it comes."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        """Names in lower case."""

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body, cut anywhere.

        Raises:
            ConnectionLost, TimedOut: before its end.
        """
        with _translated():
            async with aclosing(self._response.aiter_bytes()) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def read(self, max_bytes: int) -> bytes:
        """The beginning of the body, at most ``max_bytes`` of it."""
        body = bytearray()
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) >= max_bytes:
                    break
        return bytes(body[:max_bytes])


class HttpClient:
    """A client of one server. Connections are kept and used again; there may be any number of them at a time.

    ``allowed`` is asked with the host's name and the address that would be dialled, for each connection.
    """

    def __init__(self, server: Server, *, allowed: Callable[[str, IPAddress], bool] | None = None) -> None:
        self.server = server
        self._client = httpx2.AsyncClient(
            base_url=server.base,
            transport=_transport(server, Backend() if allowed is None else GuardedBackend(allowed)),
            trust_env=False,  # a proxy of the environment is not on the way to an engine
            follow_redirects=False,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def request(  # noqa: PLR0913 (keywords that are HTTP's own; a value would only carry them here)
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: bytes | object | None = None,
        parts: Sequence[Part] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float,
        max_bytes: int,
    ) -> Answer:
        """One request and its whole answer. A ``body`` that is not bytes is sent as JSON, ``parts`` as a form's files.

        Raises:
            HttpFailure: see its subclasses. An answer with an error status is an answer.
        """
        request = self._build(method, path, query, body, headers, timeout_s, parts)
        # In all, however slowly it drips.
        with _translated(), anyio.fail_after(timeout_s):
            response = await self._client.send(request, stream=True)
            try:
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > max_bytes:
                        raise TooLarge(f"The answer to {method} {path} is larger than {max_bytes} bytes.")
            finally:
                await response.aclose()
        return Answer(response.status_code, response.headers, bytes(content))

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object | None = None,
        headers: Mapping[str, str] | None = None,
        idle_s: float | None,
    ) -> AsyncIterator[Stream]:
        """A request whose answer is read as it comes; ``idle_s`` bounds the time between two pieces (None: no bound), and
        that for each piece of a ``body`` that is sent in such.

        Raises:
            HttpFailure: see its subclasses.
        """
        request = self._build(method, path, query, body, headers, idle_s)
        with _translated():
            response = await self._client.send(request, stream=True)
        try:
            yield Stream(response)
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()

    @asynccontextmanager
    async def upgrade(
        self, path: str, *, protocol: str, query: Query | None = None, timeout_s: float, max_bytes: int
    ) -> AsyncIterator[Connection | Answer]:
        """A POST that asks to leave HTTP. Gives the connection, or the answer of a server that did not agree.

        Raises:
            HttpFailure: see its subclasses.
        """
        headers = {"Connection": "Upgrade", "Upgrade": protocol}
        request = self._build("POST", path, query, None, headers, timeout_s)
        with _translated():
            response = await self._client.send(request, stream=True)
        try:
            if response.status_code == 101:
                yield Connection(response.extensions["network_stream"])
            elif response.is_success:  # whose body may be the stream itself, which has no end
                yield Answer(response.status_code, response.headers, b"")
            else:
                yield Answer(response.status_code, response.headers, await Stream(response).read(max_bytes))
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()

    def _build(  # noqa: PLR0913, PLR0917 (as above)
        self,
        method: str,
        path: str,
        query: Query | None,
        body: bytes | object | None,
        headers: Mapping[str, str] | None,
        timeout_s: float | None,
        parts: Sequence[Part] | None = None,
    ) -> httpx2.Request:
        given: dict[str, str] = dict(headers or {})
        if isinstance(body, Pieces):
            given["Content-Type"] = body.content_type
            given["Content-Length"] = str(sum(map(len, body.pieces)))  # else it would be sent without
            body = body.chunks()
        elif body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            given["Content-Type"] = "application/json"
        params = {name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in (query or {}).items()}
        timeout = httpx2.Timeout(timeout_s, connect=CONNECT_S)
        extensions = {} if self.server.name is None else {"sni_hostname": self.server.name}
        return self._client.build_request(
            method,
            path,
            params=params or None,
            content=body,
            files=None if parts is None else [(name, (name, content)) for name, content in parts],
            headers=given,
            timeout=timeout,
            extensions=extensions,
        )


def _transport(server: Server, backend: Backend) -> httpx2.AsyncHTTPTransport:
    # The system's authorities take a while to load; an address without TLS has no use for them.
    tls = server.tls or (trusted_by_system() if server.base.startswith("https:") else _NO_TLS)
    transport = httpx2.AsyncHTTPTransport(verify=tls, trust_env=False)
    # httpx2 does not take a way to connect. Should it keep its connections elsewhere one day, requests are made all the same,
    # and the tests of cancelled ones say so.
    transport._pool = httpcore2.AsyncConnectionPool(  # noqa: SLF001
        ssl_context=tls,
        max_connections=None,
        max_keepalive_connections=KEPT_CONNECTIONS,
        keepalive_expiry=KEPT_S,
        uds=server.socket,
        network_backend=backend,
    )
    return transport


_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts nobody."""


@contextmanager
def _translated() -> Iterator[None]:
    """Foreign errors become ours, here and nowhere else."""
    try:
        yield
    except NotAllowedError as exc:
        raise NotAllowed(exc.host, exc.address) from None
    except httpx2.ConnectTimeout as exc:
        raise ConnectFailure(f"no connection within {CONNECT_S:g} s") from exc
    except httpx2.ConnectError as exc:
        raise _connect_failure(exc) from exc
    except (httpx2.TimeoutException, httpcore2.TimeoutException, TimeoutError) as exc:
        raise TimedOut("no answer in time") from exc
    except (httpx2.LocalProtocolError, httpcore2.LocalProtocolError) as exc:
        raise ConnectionLost("the request cannot be sent") from exc  # its words have what cannot, which may be a secret
    except (
        httpx2.RequestError,
        httpx2.StreamError,
        httpcore2.NetworkError,
        httpcore2.ProtocolError,
        anyio.BrokenResourceError,
        anyio.ClosedResourceError,
    ) as exc:
        if (refused := _tls_failure(exc)) is not None:
            raise refused from exc
        raise ConnectionLost(str(exc) or "the connection broke") from exc
    except OSError as exc:
        raise ConnectionLost(exc.strerror or str(exc)) from exc


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """An error and what lies below it: the libraries keep the system's own words some causes down."""
    seen: BaseException | None = exc
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _tls_failure(exc: BaseException) -> TlsFailure | None:
    for cause in _causes(exc):
        if isinstance(cause, ssl.SSLError):
            return TlsFailure(getattr(cause, "verify_message", "") or cause.reason or str(cause))
    return None


def _connect_failure(exc: BaseException) -> ConnectFailure:
    if (refused := _tls_failure(exc)) is not None:
        return refused
    for cause in _causes(exc):
        if isinstance(cause, OSError) and cause.errno is not None:
            return ConnectFailure(cause.strerror or str(cause), cause.errno)
    return ConnectFailure(str(exc) or "no connection")
