"""Removes, in the background, what the dead left. Never a reason for a run to fail."""

from __future__ import annotations

import logging
import random

import anyio

from cloche.backends.contract import Backend
from cloche.errors import ClocheError
from cloche.runtime.life import Counters

_log = logging.getLogger("cloche.runtime")


async def keep_sweeping(backend: Backend, counters: Counters, every_s: float, swept: anyio.Event) -> None:
    """Sweep now, and then again and again; 0: not again. ``swept`` is set when the first sweep is over.

    The pauses are half to one and a half times as long as said, by chance: processes that were started together must not
    all ask their engine at the same moment.
    """
    try:
        await sweep(backend, counters)
    finally:
        swept.set()
    while every_s > 0:
        await anyio.sleep(every_s * random.uniform(0.5, 1.5))  # noqa: S311 - nobody's secret
        await sweep(backend, counters)


async def sweep(backend: Backend, counters: Counters) -> None:
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
