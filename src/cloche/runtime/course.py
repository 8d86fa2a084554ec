"""How one run goes, as its caller sees it: what happens, and then a result or an error. What drives it, others know."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import replace

import anyio

from cloche.events import Event, Finished

_log = logging.getLogger("cloche.runtime")


class Course(ABC):
    """One run. ``events`` gives what happens, then ends; when it ended without ``Finished``, ``error`` says why."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.error: Exception | None = None
        self.settled = False
        """Whether the result, or the error, is known and handed out."""
        self.gone = anyio.Event()
        """Set when nothing is left of the run and its place is free."""
        self.heard = anyio.Event()
        """Set when the listener has all events, or has left."""
        # Never full: what a run can send is bounded, and a caller who is slow must not stop the clock.
        self._send, self._receive = anyio.create_memory_object_stream[Event](math.inf)
        self._begun = self._mark = time.perf_counter()
        self._timings: dict[str, float | None] = {}

    @abstractmethod
    async def drive(self) -> None:
        """The whole run. Raises nothing of its own: what goes wrong is handed to the listener."""

    @abstractmethod
    async def stop(self) -> None:
        """Ask for the end of the run, as cancelled; if that is not heeded, kill it."""

    @abstractmethod
    def kill(self) -> None:
        """End the run as cancelled, at once. Removal goes on."""

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens, until the run is settled."""
        try:
            with self._receive:
                async for event in self._receive:
                    yield event
        finally:
            self.heard.set()

    def _settle(self, ending: Finished | Exception) -> None:
        """Hand out the result or the error, once."""
        if self.settled:
            return
        self.settled = True
        said = ending.outcome if isinstance(ending, Finished) else repr(ending)
        _log.debug("run %s: %s, %s", self.run_id, said, self._timings)
        if isinstance(ending, Finished):
            self._timings["total"] = round((time.perf_counter() - self._begun) * 1000, 3)
            self._emit(replace(ending, timings_ms=self._timings.copy()))
        else:
            self.error = ending
        self._send.close()

    def _emit(self, event: Event) -> None:
        try:
            self._send.send_nowait(event)
        except anyio.BrokenResourceError:
            _log.debug("nobody listens to run %s any more", self.run_id)

    def _lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._timings[phase] = round((now - self._mark) * 1000, 3)
        self._mark = now
