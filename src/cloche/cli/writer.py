"""The script's bytes on their way out, written by a thread: a reader who is slow must not stop the run's clock."""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable

import anyio

STDOUT, STDERR = 1, 2


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``, unbuffered, also to a descriptor that does not block.

    Raises:
        OSError: it cannot be written (``BrokenPipeError``: nobody reads any more).
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


class Writer:
    """Writes in the order in which it was told to. ``broken`` is set once stdout takes nothing any more.

    ``failures`` says of each descriptor why it could not be written, unless it was that nobody reads (EPIPE).

    What is queued is bounded by what a run may send (CLOCHE_MAX_OUTPUT_BYTES of each stream).
    """

    def __init__(self, when_broken: Callable[[], object]) -> None:
        self.broken = False
        self.failures: dict[int, OSError] = {}
        self._when_broken = when_broken
        self._queue: queue.SimpleQueue[tuple[int, bytes] | Callable[[], object] | None] = queue.SimpleQueue()
        self._dead: set[int] = set()
        # A daemon: a reader who never reads on must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="cloche output", daemon=True)
        self._thread.start()

    def put(self, fd: int, data: bytes) -> None:
        """Queue ``data`` for ``fd``."""
        self._queue.put((fd, data))

    async def drain(self, call_soon: Callable[[Callable[[], object]], object]) -> None:
        """Wait until everything is written. ``call_soon`` runs a function in the event loop's thread."""
        written = anyio.Event()
        self._queue.put(lambda: call_soon(written.set))
        await written.wait()

    def close(self) -> None:
        """End the thread once it is done."""
        self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if not isinstance(item, tuple):
                item()
            elif item[0] not in self._dead:
                self._write(*item)

    def _write(self, fd: int, data: bytes) -> None:
        try:
            write_all(fd, data)
        except OSError as exc:
            # Gone or full: what was to go there has nowhere else to go.
            self._dead.add(fd)
            if not isinstance(exc, BrokenPipeError):
                self.failures[fd] = exc
            if fd == STDOUT:
                self.broken = True
                self._when_broken()
