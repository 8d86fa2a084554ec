"""Removes, in the background, what the dead left. Never a reason for a run to fail."""

from __future__ import annotations

import logging

from cloche.backends.contract import Backend
from cloche.errors import ClocheError
from cloche.runtime.life import Counters

_log = logging.getLogger("cloche.runtime")


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
