"""How long to wait, time after time."""

from __future__ import annotations

from collections.abc import Sequence


def step(steps: Sequence[float], n: int) -> float:
    """The nth of some steps, counted from 0. The last one is for all that come after it."""
    return steps[min(n, len(steps) - 1)]
