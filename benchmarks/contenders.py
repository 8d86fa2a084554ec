"""What takes part in a benchmark: something that is done once, and says how many seconds it took."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
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


def together(once: Contender, number: int) -> Contender:
    """So many at once, until the last one is done."""

    async def all_of_them() -> float:
        begun = time.perf_counter()
        done: list[float] = []

        async def one() -> None:
            await once()
            done.append(time.perf_counter() - begun)

        async with anyio.create_task_group() as tasks:
            for _ in range(number):
                tasks.start_soon(one)
        return max(done)

    return all_of_them


def median_phases(phases: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of the ``timings_ms`` of runs."""
    found = list(phases)
    return {
        phase: round(statistics.median(p[phase] for p in found), 2)
        for phase in ("queued", "prepare", "start", "run", "collect")
    }


def summary(times: list[float]) -> dict[str, float]:
    """Milliseconds from seconds."""
    ordered = sorted(t * 1000 for t in times)
    return {
        "p50_ms": round(statistics.median(ordered), 2),
        "p90_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.9))], 2),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2),
        "min_ms": round(ordered[0], 2),
    }


async def take_turns(
    contenders: Mapping[str, Contender],
    rounds: int,
    *,
    warm_up: int = 3,
    before: Callable[[], Awaitable[None]] | None = None,
) -> dict[str, dict[str, float]]:
    """Each contender once a round, so that whatever else the machine does meets them alike; the first rounds, ``warm_up`` of
    them, do not count, since they fill caches. ``before`` is done before each turn.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + warm_up):
        for name, once in contenders.items():
            if before is not None:
                await before()
            taken = await once()
            if i >= warm_up:
                times[name].append(taken)
    return {name: summary(values) for name, values in times.items()}


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Keep the figures in a file, in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
