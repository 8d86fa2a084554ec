"""Passes TCP connections on to another address: into a network that this one does not reach, or to look like a far one.

As a program of its own, ``forwarder.py FD HOST PORT``, it takes what comes to a socket that it was given already
listening. That socket belongs to the network where it was made, the connections onwards to the one where this runs.
So it needs nothing but the standard library, and nothing of this package.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar, cast

T = TypeVar("T")

BACKLOG = 128
HELD_BYTES = 16 * 1024 * 1024
"""How much a direction may have on its way by delay alone before its sender has to wait."""


class Relay:
    """What passes connections on. It lives in the event loop that made it and is called there alone.

    ``delay_s`` is a round trip's: each direction's bytes come half of it later, in order, as many as there are. A new
    connection costs one round trip more, as TCP's own greeting does.
    """

    def __init__(self, listener: socket.socket, target: tuple[str, int], delay_s: float = 0.0) -> None:
        self.target = target
        self.delay_s = delay_s
        self.ends: set[End] = set()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = listener
        listener.settimeout(0)
        self._listening = False
        self.listen(wanted=True)

    def listen(self, *, wanted: bool) -> None:
        """Take new connections, or have the kernel refuse them. The port stays ours."""
        if wanted and not self._listening:
            self._listener.listen(BACKLOG)
            self._loop.add_reader(self._listener, self._accept)
        elif not wanted and self._listening:
            self._loop.remove_reader(self._listener)
            # On Linux this ends the listening, and neither the socket nor its hold on the port.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listening = wanted

    def cut(self) -> None:
        """Reset every connection, on both sides."""
        for task in tuple(self._tasks):
            task.cancel()
        for end in tuple(self.ends):
            end.reset()

    def close(self) -> None:
        """Cut all, and give the port back."""
        self.listen(wanted=False)
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # gone again before we looked
            while True:
                client, _ = self._listener.accept()
                task = self._loop.create_task(self._join(client))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _join(self, client: socket.socket) -> None:
        try:
            client.settimeout(0)
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            near, far = End(self), End(self)
            near.other, far.other = far, near
            await self._loop.create_connection(lambda: far, *self.target)
            await self._loop.connect_accepted_socket(lambda: near, client)
            far.begin()
            near.begin()
        except (OSError, asyncio.CancelledError):
            # Nobody is there. The client is told at once, and not with a polite end that may be taken for an answer.
            _reset_when_closed(client)
            client.close()


class End(asyncio.Protocol):
    """One of a connection's two sides."""

    other: End

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._begun = False
        self._over = False
        self._wrote_end = False
        self._queue: deque[tuple[float, Callable[[], None], int]] = deque()
        self._queued_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._peer_full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the other side."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.pause_reading()
        self._relay.ends.add(self)

    def begin(self) -> None:
        """Read: the other side is there."""
        self._begun = True
        self._flow()

    def data_received(self, data: bytes) -> None:
        """Hand bytes to the other side."""
        self._later(lambda: self.other.write(data), len(data))

    def eof_received(self) -> bool:
        """Hand on that no more will come; the other direction goes on."""
        self._later(self.other.write_end, 0)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other side too: at once after an error."""
        self._over = True
        self._relay.ends.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if not self.other._over and (exc is not None or not self._wrote_end):
            self.other.reset()

    def write(self, data: bytes) -> None:
        """Send."""
        if self._transport is not None and not self._over:
            self._transport.write(data)

    def write_end(self) -> None:
        """Send the end; when both sides have sent theirs, the connection is over."""
        if self._transport is None or self._over:
            return
        self._wrote_end = True
        if self.other._wrote_end:
            self._transport.close()
            if self.other._transport is not None:
                self.other._transport.close()
        else:
            with contextlib.suppress(OSError):  # gone meanwhile, as connection_lost will say
                self._transport.write_eof()

    def reset(self) -> None:
        """End at once, as TCP tells an error."""
        if self._transport is not None and not self._over:
            _reset_when_closed(self._transport.get_extra_info("socket"))
            self._transport.abort()

    def pause_writing(self) -> None:
        """Too much is waiting to be sent here: the other side shall read no more."""
        self.other.hold(full=True)

    def resume_writing(self) -> None:
        """It may again."""
        self.other.hold(full=False)

    def hold(self, *, full: bool) -> None:
        """Note whether what is read here can be sent there."""
        self._peer_full = full
        self._flow()

    def _flow(self) -> None:
        if self._transport is None or self._over or not self._begun:
            return
        if self._peer_full or self._queued_bytes > HELD_BYTES:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _later(self, action: Callable[[], None], size: int) -> None:
        delay = self._relay.delay_s / 2
        if not delay and not self._queue:
            action()
            return
        self._queue.append((self._loop.time() + delay, action, size))
        self._queued_bytes += size
        if self._queued_bytes > HELD_BYTES:
            self._flow()
        if self._timer is None:
            self._timer = self._loop.call_later(delay, self._due)

    def _due(self) -> None:
        self._timer = None
        was_full = self._queued_bytes > HELD_BYTES
        while self._queue and self._queue[0][0] <= self._loop.time():
            _, action, size = self._queue.popleft()
            self._queued_bytes -= size
            action()
        if self._queue and not self._over:
            self._timer = self._loop.call_at(self._queue[0][0], self._due)
        if was_full:
            self._flow()


def _reset_when_closed(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def listening() -> socket.socket:
    """A socket bound to a free port of 127.0.0.1. It does not listen yet."""
    while True:
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
            address = trial.getsockname()
        bound = socket.socket()
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # By its number: a port that the kernel chose is lost when a socket ends to listen.
            bound.bind(address)
        except OSError:  # somebody was quicker
            bound.close()
        else:
            return bound


class Forwarder:
    """A relay in a thread of its own, for a test to stand between a client and a server. A context manager.

    ``target`` is a host and port that this network reaches. ``delay_s`` is a round trip's; see :class:`Relay`.
    """

    def __init__(self, target: tuple[str, int], delay_s: float = 0.0) -> None:
        self._socket = listening()
        self.port: int = self._socket.getsockname()[1]
        """Of 127.0.0.1."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="forwarder", daemon=True)
        self._thread.start()
        self._relay = self._do(lambda: Relay(self._socket, target, delay_s))

    def delay(self, delay_s: float) -> None:
        """Have bytes that come from now on take another time."""
        self._do(lambda: setattr(self._relay, "delay_s", delay_s))

    def cut(self) -> None:
        """Reset all present connections. New ones are taken."""
        self._do(self._relay.cut)

    def refuse(self, refused: bool = True) -> None:  # noqa: FBT002 - forwarder.refuse(False) reads well
        """Have new connections refused, or taken again. The present ones go on."""
        self._do(lambda: self._relay.listen(wanted=not refused))

    def count(self) -> int:
        """How many connections there are."""
        return self._do(lambda: len(self._relay.ends) // 2)

    def close(self) -> None:
        """End all of it. A second time does nothing."""
        if self._loop.is_closed():
            return
        self._do(self._relay.close)
        # One more round, so that transports close their sockets.
        self._do(lambda: None)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, action: Callable[[], T]) -> T:
        async def run() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()


async def _serve(listener: socket.socket, target: tuple[str, int]) -> None:
    relay = Relay(listener, target)
    await asyncio.Event().wait()
    relay.close()


def main() -> None:
    """Forward until killed."""
    number, host, port = sys.argv[1:]
    asyncio.run(_serve(socket.socket(fileno=int(number)), (host, int(port))))


if __name__ == "__main__":
    main()
