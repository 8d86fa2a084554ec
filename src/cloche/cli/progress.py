"""What takes long before a run can begin, such as pulling an image: one line on the terminal, gone when it is over."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

_log = logging.getLogger("cloche.progress")


class _Shown(logging.Handler):
    """Keeps the last record in sight until one comes that says ``done``."""

    def __init__(self) -> None:
        super().__init__()
        self._status: Status | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "done", False):
            self.finish()
            return
        text = f"[dim]cloche:[/dim] {_plain(record.getMessage())}"
        if self._status is None:
            from rich.console import Console

            self._status = Console(stderr=True).status(text)
            self._status.start()
        else:
            self._status.update(text)

    def finish(self) -> None:
        """Leave nothing of it on the terminal."""
        if self._status is not None:
            self._status.stop()
            self._status = None


@contextmanager
def shown(*, wanted: bool) -> Iterator[None]:
    """While inside, progress is shown, if there is a terminal to show it on."""
    if not wanted or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    handler, level, propagate = _Shown(), _log.level, _log.propagate
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    try:
        yield
    finally:
        handler.finish()
        _log.removeHandler(handler)
        _log.setLevel(level)
        _log.propagate = propagate


def _plain(text: str) -> str:
    """Without what could steer the terminal, or be taken for markup."""
    from rich.markup import escape

    return escape("".join(c for c in text if c.isprintable()))
