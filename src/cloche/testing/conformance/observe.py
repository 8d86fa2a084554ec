"""What can be seen of a box from outside: processes, by a word in their command line, and the memory of a client."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path


def marker() -> str:
    """A word that stands in no other process's command line."""
    return f"marker-{secrets.token_hex(8)}"


def processes_with(word: str) -> list[int]:
    """The processes of this machine, other than this one, that have ``word`` in their command line."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if word.encode() in Path(entry.path, "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], within_s: float) -> bool:
    """Whether ``condition`` came true in time. Blocks; call it from a test that is not async, or from a thread."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def gone(word: str, within_s: float = 2.0) -> bool:
    """Whether every process with ``word`` in its command line has ended in time."""
    return wait_until(lambda: not processes_with(word), within_s)
