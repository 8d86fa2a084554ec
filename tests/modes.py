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
    """Boxes of this process: the launchers that it started and that have become bubblewrap. One more stands by.

    Looking through /proc takes a while, in which boxes come and go. Those that are still there after it were all there at
    one moment.
    """
    seen = {int(name): _stat(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    ours = {pid for pid, (name, parent) in seen.items() if name == "cloche-guard" and parent == os.getpid()}
    boxes = {pid: parent for pid, (name, parent) in seen.items() if name == "bwrap" and parent in ours}
    return len({parent for pid, parent in boxes.items() if _stat(pid) == seen[pid]})


def _stat(pid: int) -> tuple[str, int]:
    """Name and parent of a process that lives; nobody's for others."""
    with contextlib.suppress(OSError):
        name, rest = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
        state, parent = rest.split()[:2]
        if state not in "ZX":
            return name, int(parent)
    return "", 0


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
