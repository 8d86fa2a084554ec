"""Reading JSON that came from outside: whatever is missing or of another type counts as not said. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")
MAX_LINE = 1000
"""Characters kept of what somebody else says, where nothing else is asked for."""


def field(found: object, name: str, kind: type[_T], otherwise: _T) -> _T:
    """A field of a JSON object, if there is one of that type."""
    value = found.get(name) if isinstance(found, Mapping) else None
    # A bool is an int to Python, not to JSON.
    return value if isinstance(value, kind) and isinstance(value, bool) is (kind is bool) else otherwise


def shortened(text: str, most: int = MAX_LINE) -> str:
    """One line of text for people."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def texts(value: object) -> list[str]:
    """The strings of a list."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, Sequence) else []


def parse_json(data: bytes) -> Any:
    """JSON that came from outside.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
