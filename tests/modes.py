"""The modes that the suites are run over, and how each is made to work on this machine."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping

import anyio
import psutil
from tests import leftovers

from cloche.testing.conformance import Target, absent

INTERPRETERS = ("python3", "sh", "bash", "node", "perl", "ruby", "php")


def count_local_boxes() -> int:
    """Boxes of this process: the launchers that it started and that have become bubblewrap. One more stands by."""
    count = 0
    for guardian in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            count += guardian.name() == "cloche-guard" and "bwrap" in {
                child.name() for child in guardian.children() if child.status() != psutil.STATUS_ZOMBIE
            }
    return count


def local() -> Target:
    """bubblewrap on this machine."""
    offered = frozenset(name for name in INTERPRETERS if shutil.which(name) is not None)
    return Target("local", interpreters=offered, count_boxes=count_local_boxes, remains=leftovers.beside_standby)


MODES: Mapping[str, Callable[[], Target]] = {"local": local}


def ready(mode: str) -> Target:
    """The target for a mode. Skips the test, or fails it under ``CLOCHE_MUST_WORK``, when its engine is not here."""
    target = MODES[mode]()

    async def probe() -> str:
        async with target.sandbox() as sandbox:
            posture = await sandbox.posture()
            return "" if posture.available else posture.reason

    from cloche import ClocheError

    try:
        reason = anyio.run(probe)
    except ClocheError as error:
        reason = str(error)
    if reason:
        absent(mode, reason)
    return target
