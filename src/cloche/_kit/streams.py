"""Connections for httpcore2 that a cancelled request leaves no trace of.

For Unix sockets httpcore2's own way is anyio's UNIXSocketStream, whose reader callback sets a result on a future that may have
been cancelled in the same turn of the loop (anyio 4.16, _asyncio.py, _wait_until_readable): whoever cancels a request at the
moment in which its answer comes has asyncio print a traceback on stderr. So here they stand on wait_readable and wait_writable.

For TCP it does not close a connection on which TLS was being agreed upon when the request was cancelled.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import anyio
import anyio.lowlevel
import httpcore2

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

NEXT_ATTEMPT_S = 0.25
"""After so long without a connection a host's next address is tried beside the one before."""


class NotAllowedError(Exception):
    """Connections to a host are not allowed, as it is at an address."""

    def __init__(self, host: str, address: str) -> None:
        super().__init__(host, address)
        self.host = host
        self.address = address


class UnixStream(httpcore2.AsyncNetworkStream):
    """One connection."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 (httpcore2's signature)
        """The next bytes, empty at the end.

        Raises:
            httpcore2.ReadTimeout, httpcore2.ReadError.
        """
        with _translated(httpcore2.ReadTimeout, httpcore2.ReadError), anyio.fail_after(timeout):
            while True:
                await anyio.lowlevel.checkpoint()  # a flood must not starve the others
                try:
                    return self._socket.recv(max_bytes)
                except BlockingIOError:
                    await anyio.wait_readable(self._socket)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 (httpcore2's signature)
        """Send all of it.

        Raises:
            httpcore2.WriteTimeout, httpcore2.WriteError.
        """
        rest = memoryview(buffer)
        with _translated(httpcore2.WriteTimeout, httpcore2.WriteError), anyio.fail_after(timeout):
            while rest:
                await anyio.lowlevel.checkpoint()
                try:
                    rest = rest[self._socket.send(rest) :]
                except BlockingIOError:
                    await anyio.wait_writable(self._socket)

    async def aclose(self) -> None:
        """Close it; whoever still waits for it is woken."""
        if self._socket.fileno() >= 0:
            anyio.notify_closing(self._socket)
            self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        """What httpcore2 asks of a connection that it would use again."""
        if info == "is_readable":
            # An idle connection that can be read has been closed by the other side.
            return self._socket.fileno() < 0 or _readable(self._socket)
        return self._socket if info == "socket" else None


@contextmanager
def _translated(late: type[Exception], broken: type[Exception]) -> Iterator[None]:
    """The system's errors become those that httpcore2 expects."""
    try:
        yield
    except TimeoutError as exc:
        raise late(str(exc)) from exc
    except (OSError, anyio.ClosedResourceError) as exc:
        raise broken(str(exc)) from exc


def _readable(connected: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0))


class TcpStream(httpcore2.AsyncNetworkStream):
    """One of httpcore2's own, but for what becomes of it when TLS fails on it."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 (httpcore2's signature)
        """As it reads."""
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 (httpcore2's signature)
        """As it writes."""
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """As it closes."""
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore2's signature)
    ) -> httpcore2.AsyncNetworkStream:
        """As it does, and closed when that does not come to its end, for whatever reason."""
        try:
            return await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._stream.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        """As it tells."""
        return self._stream.get_extra_info(info)


class Backend(httpcore2.AnyIOBackend):
    """anyio's backend, with these for its connections."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore2's signature)
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect.

        Raises:
            httpcore2.ConnectTimeout, httpcore2.ConnectError.
        """
        return TcpStream(await super().connect_tcp(host, port, timeout, local_address, socket_options))

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore2's signature)
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect.

        Raises:
            httpcore2.ConnectTimeout, httpcore2.ConnectError.
        """
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connecting.settimeout(0)
            for option in socket_options or ():
                connecting.setsockopt(*option)
            with _translated(httpcore2.ConnectTimeout, httpcore2.ConnectError), anyio.fail_after(timeout):
                while True:
                    try:
                        connecting.connect(path)
                        break
                    except BlockingIOError:  # its backlog is full
                        await anyio.sleep(0.005)
        except BaseException:
            connecting.close()
            raise
        return UnixStream(connecting)


class GuardedBackend(Backend):
    """Connects only to what is allowed. It is the address that is dialled of which that is asked: a name that leads elsewhere
    a moment later gains nothing.
    """

    def __init__(self, allowed: Callable[[str, IPAddress], bool]) -> None:
        super().__init__()
        self._allowed = allowed

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore2's signature)
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to the first of the host's addresses that is allowed and answers.

        Raises:
            httpcore2.ConnectTimeout, httpcore2.ConnectError.
            NotAllowedError: none is allowed.
        """
        with _translated(httpcore2.ConnectTimeout, httpcore2.ConnectError), anyio.fail_after(timeout):
            found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
            allowed = [a for a in addresses if self._allowed(host, ipaddress.ip_address(a))]
            if not allowed:
                raise NotAllowedError(host, ", ".join(addresses))
            return await _first(
                [
                    partial(super(GuardedBackend, self).connect_tcp, a, port, timeout, local_address, socket_options)
                    for a in allowed
                ]
            )


async def _first(
    attempts: Sequence[Callable[[], Awaitable[httpcore2.AsyncNetworkStream]]],
) -> httpcore2.AsyncNetworkStream:
    """The first connection that comes about. Each attempt has a moment before the next one is made beside it (RFC 8305).

    Raises:
        httpcore2.ConnectTimeout, httpcore2.ConnectError: none does; why the last one did not.
    """
    made: list[httpcore2.AsyncNetworkStream] = []
    problems: list[Exception] = []

    async def attempt(connect: Callable[[], Awaitable[httpcore2.AsyncNetworkStream]], over: anyio.Event) -> None:
        try:
            stream = await connect()
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as exc:
            problems.append(exc)
            over.set()
            return
        made.append(stream)
        tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            for connect in attempts:
                over = anyio.Event()
                tasks.start_soon(attempt, connect, over)
                with anyio.move_on_after(NEXT_ATTEMPT_S):
                    await over.wait()
    except BaseException:
        await _close(made)
        raise
    if not made:
        raise problems[-1]
    await _close(made[1:])  # two may come about in one turn of the loop
    return made[0]


async def _close(streams: Iterable[httpcore2.AsyncNetworkStream]) -> None:
    with anyio.CancelScope(shield=True):
        for stream in streams:
            await stream.aclose()
