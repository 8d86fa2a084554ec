"""The one clock of a run. Pure: the runtime tells it the time, in seconds of any steady clock."""

from __future__ import annotations

from cloche.spec import Limits

BACKSTOP_S = 1.0
"""The supervisor ends a run at limit + grace. So much later the client stops waiting for it and has the box killed."""


class Deadline:
    """Until when the client waits: for the start, then for the end. ``at`` is when it stops waiting."""

    def __init__(self, limits: Limits, start_timeout_s: float, now: float) -> None:
        self._limits = limits
        self._stopped = False
        self.started_at: float | None = None
        self.at = now + start_timeout_s

    def start(self, now: float) -> None:
        """The script has started: its own time counts now."""
        self.started_at = now
        if not self._stopped:
            self.at = now + self._limits.timeout_s + self._limits.grace_s + BACKSTOP_S

    def stop(self, now: float, allowance_s: float = 0.0) -> None:
        """The supervisor was asked to end the run: it has its grace to do so, once the engine has told it."""
        self._stopped = True
        self.at = min(self.at, now + self._limits.grace_s + BACKSTOP_S + allowance_s)
