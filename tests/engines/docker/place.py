"""Where engines that are up have their files, and who may start and end them: one command at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.engines.docker import host


def folder() -> Path:
    """Of all engines that ``up`` started."""
    return Path(tempfile.gettempdir(), "cloche-engines")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One ``up`` or ``down`` at a time, of whatever engine.

    Raises:
        MissingError: only root can.
    """
    host.need_root()
    folder().mkdir(parents=True, exist_ok=True)
    opened = os.open(folder(), os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def leave() -> None:
    """Remove the folder, unless other engines are up."""
    with contextlib.suppress(OSError):
        folder().rmdir()
