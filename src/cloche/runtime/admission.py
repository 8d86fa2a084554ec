"""How many boxes there are at a time. Who waits is served in turn, and not longer than a bound."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from cloche.errors import QueueTimeout


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a sandbox is at one moment."""

    places: int
    """How many runs it has at a time."""
    taken: int
    """How many places are held now. A run holds its own until its box is removed."""
    waiting: int
    """How many runs wait for one."""


class Admission:
    """``places`` of them, first come, first served."""

    def __init__(self, places: int, queue_timeout_s: float) -> None:
        self._places = places
        self._timeout_s = queue_timeout_s
        self._limiter = anyio.CapacityLimiter(places)

    @property
    def taken(self) -> int:
        """How many places are held now."""
        return self._limiter.borrowed_tokens

    @property
    def waiting(self) -> int:
        """How many runs wait for a place."""
        return self._limiter.statistics().tasks_waiting

    @property
    def load(self) -> Load:
        """All of it."""
        return Load(self._places, self.taken, self.waiting)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place, waiting for one if need be.

        Raises:
            QueueTimeout: none was free in time.
        """
        holder = object()
        try:
            self._limiter.acquire_on_behalf_of_nowait(holder)
        except anyio.WouldBlock:
            with anyio.move_on_after(self._timeout_s) as waiting:
                await self._limiter.acquire_on_behalf_of(holder)
            if waiting.cancelled_caught:
                raise QueueTimeout(f"All {self._places} places were taken for {self._timeout_s:g} s.") from None
        try:
            yield
        finally:
            self._limiter.release_on_behalf_of(holder)
