"""Connections of the service: no client may hold one for nothing, or make it hold what he does not read."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_S = 75
"""For a connection without a request: longer than proxies keep theirs, so that it is they who close one."""
LOOK_S = 15.0
"""Between two looks at a connection. A client who reads nothing from one to the next is given up."""
LEAST_CONNECTIONS = 64


def most_connections() -> int:
    """How many there may be: half of what the process may have open. The other half is the runs'."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(LEAST_CONNECTIONS, soft // 2)


class Connection(H11Protocol):
    """uvicorn's, looked at now and then. uvicorn itself waits for ever for a request whose beginning has come, for the rest of a
    body that nobody wants, and for a client to read.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """One more; one too many is cut."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._unread = 0
        self._look_again: asyncio.TimerHandle | None = None
        if len(self.connections) > most_connections():
            transport.abort()
        else:
            self._look_again = self.loop.call_later(LOOK_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        if self._look_again is not None:
            self._look_again.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """From here on a request is waited for."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        self._look_again = self.loop.call_later(LOOK_S, self._look)
        unread = self.transport.get_write_buffer_size()
        cycle: Any = self.cycle
        answered = cycle is None or cycle.response_complete
        # While it is paused nobody writes, so what does not shrink is not read.
        stuck = 0 < unread == self._unread and (self.flow.write_paused or answered)
        self._unread = unread
        if stuck or (answered and not unread and self.loop.time() - self._idle_since > IDLE_S):
            self.transport.abort()
