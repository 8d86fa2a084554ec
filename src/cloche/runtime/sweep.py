"""Removes what the dead left: in the background, where it is never a reason for a run to fail, and when somebody asks for it."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import anyio

from cloche.backends.contract import Backend, Leftover
from cloche.errors import ClocheError
from cloche.isolation import Isolation
from cloche.runtime.choose import MODES, Factory, choose, let_go
from cloche.runtime.life import Counters
from cloche.runtime.names import new_owner
from cloche.runtime.service import Service
from cloche.settings import Settings

_log = logging.getLogger("cloche.runtime")


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found, and where."""

    mode: str
    leftovers: Sequence[Leftover]


async def keep_sweeping(backend: Backend | Service, counters: Counters, every_s: float, swept: anyio.Event) -> None:
    """Sweep now, and then again and again; 0: not again. ``swept`` is set when the first sweep is over."""
    try:
        await sweep(backend, counters)
    finally:
        swept.set()
    while every_s > 0:
        await anyio.sleep(pause(every_s))
        await sweep(backend, counters)


def pause(every_s: float) -> float:
    """Half to one and a half times as long, by chance: processes that were started together must not all ask their engine at
    the same moment.
    """
    return every_s * random.uniform(0.5, 1.5)  # noqa: S311 - nobody's secret


async def sweep(backend: Backend | Service, counters: Counters) -> None:
    """One sweep. What goes wrong is logged and counted."""
    try:
        leftovers = await backend.sweep()
    except ClocheError as exc:
        counters.sweeps_failed += 1
        _log.warning("%s", exc.message)
        return
    except Exception:  # noqa: BLE001 (an engine may fail in any way)
        counters.sweeps_failed += 1
        _log.exception("the sweep for leftovers failed")
        return
    for leftover in leftovers:
        if leftover.removed:
            counters.swept += 1
            _log.info("removed what a dead owner left: %s %s", leftover.kind, leftover.name)
        else:
            counters.sweeps_failed += 1
            _log.warning(
                "could not remove what a dead owner left: %s %s (%s)", leftover.kind, leftover.name, leftover.reason
            )


async def sweep_now(settings: Settings, *, dry_run: bool = False, table: Mapping[str, Factory] = MODES) -> Swept:
    """Sweep the engine of the settings' mode for somebody who waits for it; nothing takes its place if it is unavailable.

    Raises:
        BackendUnavailable: the engine cannot be used.
    """
    alone = settings.model_copy(update={"fallback": False, "min_isolation": Isolation.NONE})
    chosen = await choose(alone, new_owner(), table)
    try:
        return Swept(chosen.posture.mode, await chosen.backend.sweep(dry_run=dry_run))
    finally:
        await let_go(chosen.backend)
