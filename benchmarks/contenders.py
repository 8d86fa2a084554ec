"""What takes part in a benchmark: something that is done once, and says how many seconds it took."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import anyio

import cloche

Contender: TypeAlias = Callable[[], Awaitable[float]]


def by_subprocess(command: list[str]) -> Contender:
    """A program started and awaited as scripts do it."""

    async def once() -> float:
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)  # noqa: ASYNC221
        return time.perf_counter() - begun

    return once


def by_cloche(
    sandbox: cloche.Sandbox, spec: cloche.Spec, *, whole: bool, phases: list[Any], removal_s: float = 0.01
) -> Contender:
    """A run by cloche, until its result is there or (``whole``) its box is gone, for which ``removal_s`` suffices."""

    async def once() -> float:
        begun = time.perf_counter()
        result = await sandbox.run(spec, wait_cleanup=whole)
        taken = time.perf_counter() - begun
        if not result.ok:
            raise SystemExit(f"the benchmark's own script failed: {result}")
        phases.append(result.timings_ms)
        if not whole:
            await anyio.sleep(removal_s)  # the removal of this box must not run into the next contender's time
        return taken

    return once


def summary(times: list[float]) -> dict[str, float]:
    """Milliseconds from seconds."""
    ordered = sorted(t * 1000 for t in times)
    return {
        "p50_ms": round(statistics.median(ordered), 2),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2),
        "min_ms": round(ordered[0], 2),
    }


async def take_turns(contenders: Mapping[str, Contender], rounds: int) -> dict[str, dict[str, float]]:
    """Each contender once a round, so that whatever else the machine does meets them alike; the first three rounds do not
    count, since they fill caches.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 3):
        for name, once in contenders.items():
            taken = await once()
            if i >= 3:
                times[name].append(taken)
    return {name: summary(values) for name, values in times.items()}
