"""The standard descriptors, made whole before anything else is opened."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def fill_closed() -> None:
    """Open the null device in the place of each of descriptors 0 to 2 that is closed, and make its ``sys`` file.

    Else the event loop's own descriptors would take these numbers, and the script's bytes would be written into them.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest that is free: fd, as those below it are open by now.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 (its signature)
    if sys.stdin is None:
        sys.stdin = _file(0, "r")
    if sys.stdout is None:
        sys.stdout = _file(1, "w")
    if sys.stderr is None:
        sys.stderr = _file(2, "w")


def flush() -> None:
    """Write what is still buffered. What cannot be written is dropped: the interpreter would end with a status of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def _file(fd: int, mode: str) -> TextIO:
    return open(fd, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # type: ignore[return-value]
