"""The modes that the suites are run over, and how each is made to work on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio
from tests import leftovers

from cloche.testing.conformance import Target, absent

INTERPRETERS = ("python3", "sh", "bash", "node", "perl", "ruby", "php")


def count_local_boxes() -> int:
    """Boxes of this process: bubblewraps that it started, counted in /proc."""
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name, rest = Path(entry.path, "stat").read_text().split("(", 1)[1].rsplit(")", 1)
                count += name in LOCAL_PROCESSES and int(rest.split()[1]) == os.getpid()
    return count


LOCAL_PROCESSES = ("bwrap", "cloche-supervis")
"""Of a box's outermost process; the kernel cuts a name after 15 characters."""


def local() -> Target:
    """bubblewrap on this machine."""
    offered = frozenset(name for name in INTERPRETERS if shutil.which(name) is not None)
    return Target("local", interpreters=offered, count_boxes=count_local_boxes, remains=leftovers.now)


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
