"""The stream of a command, as execd writes it: bytes cut anywhere → events. Pure and bounded.

Each event is one JSON object on a line, with an empty line behind it. ``data:`` may stand before it, as in server-sent events,
and other fields of those are ignored. Lines end with LF alone: JSON leaves no other byte 0x0A in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cloche._kit.fields import field, parse_json

MAX_LINE_BYTES = 2**20
"""Of one event. A line of the supervisor's has 8 KiB at most."""
_OTHER_FIELDS = (b":", b"event:", b"id:", b"retry:")


class EventError(Exception):
    """What came is no stream of events."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The command has an id."""

    command: str


@dataclass(frozen=True, slots=True)
class Printed:
    """The command wrote a line, or the end of one. execd up to 1.1.0 takes the line's end away, later ones leave it there."""

    stream: Literal["stdout", "stderr"]
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The command has ended: nothing more comes that matters. ``exit_code`` is None where it could not be started, and -1 where a
    signal ended it.
    """

    exit_code: int | None
    message: str = ""


Event: TypeAlias = Begun | Printed | Ended


class Decoder:
    """One stream."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that are whole now.

        Raises:
            EventError: a line is none, or longer than the bound.
        """
        self._rest += data
        while 0 <= (end := self._rest.find(b"\n")) <= MAX_LINE_BYTES:
            line = bytes(self._rest[:end])
            del self._rest[: end + 1]
            yield from _parse(line)
        if len(self._rest) > MAX_LINE_BYTES:
            raise EventError(f"an event of more than {MAX_LINE_BYTES} bytes")

    def finish(self) -> Iterator[Event]:
        """The last event, where its line has no end.

        Raises:
            EventError: it was cut off.
        """
        line = bytes(self._rest)
        self._rest.clear()
        yield from _parse(line)


def _parse(line: bytes) -> Iterator[Event]:
    line = line.strip()
    if line.startswith(b"data:"):
        line = line[len(b"data:") :].strip()
    if not line or line.startswith(_OTHER_FIELDS):
        return
    try:
        found = parse_json(line)
    except ValueError:
        raise EventError(f"a line that is no JSON: {line[:80]!r}") from None
    text = field(found, "text", str, "")
    match field(found, "type", str, ""):
        case "init":
            yield Begun(text)
        case "stdout":
            yield Printed("stdout", text)
        case "stderr":
            yield Printed("stderr", text)
        case "execution_complete":
            yield Ended(0)
        case "error":
            error = field(found, "error", dict, {})
            value = field(error, "evalue", str, "") or str(field(error, "evalue", int, ""))
            name = field(error, "ename", str, "")
            code = int(value) if value.removeprefix("-").isdecimal() and value.isascii() and len(value) < 12 else None
            trace = "; ".join(t for t in field(error, "traceback", list, []) if isinstance(t, str))
            yield Ended(code, trace if code is not None and trace else f"{name}: {value}")
        case "" if field(found, "code", str, ""):  # an error in place of an event
            yield Ended(None, f"{field(found, 'code', str, '')}: {field(found, 'message', str, '')}")
        case _:
            return  # a sign of life, or something that a later execd tells
