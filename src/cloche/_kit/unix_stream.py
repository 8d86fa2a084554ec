"""Unix sockets for httpcore2, on anyio's wait_readable and wait_writable.

httpcore2's own way is anyio's UNIXSocketStream, whose reader callback sets a result on a future that may have been cancelled in
the same turn of the loop (anyio 4.16, _asyncio.py, _wait_until_readable): whoever cancels a request at the moment in which its
answer comes has asyncio print a traceback on stderr.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import httpcore2


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


class UnixBackend(httpcore2.AnyIOBackend):
    """anyio's backend, with this for its Unix sockets."""

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
