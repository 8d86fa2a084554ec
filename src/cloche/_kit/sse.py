"""Server-sent events: bytes cut anywhere → messages (WHATWG, HTML Living Standard, 9.2.6). Pure and bounded."""

from __future__ import annotations

from dataclasses import dataclass

_BOM = b"\xef\xbb\xbf"


class MessageTooLarge(Exception):
    """A message, or a line, is larger than the bound."""


@dataclass(frozen=True, slots=True)
class Message:
    """One event. ``data`` is what its lines of data say, with a newline between two of them."""

    event: str
    data: bytes


class Decoder:
    """One stream. Comments, ids and retry times are read over; what has no data is no message."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()
        """Of a line whose end has not come."""
        self._after_cr = False
        self._first = True
        self._event = ""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[Message]:
        """The messages that are whole now.

        Raises:
            MessageTooLarge: one has more bytes than the bound, whole or not.
        """
        # A line ends with CR, LF or both. The two may come in two chunks.
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        *ends, rest = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        messages: list[Message] = []
        for end in ends:
            line = bytes(self._rest + end) if self._rest else end
            self._rest.clear()
            if (message := self._take(line)) is not None:
                messages.append(message)
        self._rest += rest
        self._check(len(self._rest))
        return messages

    def _take(self, line: bytes) -> Message | None:
        if self._first:
            line, self._first = line.removeprefix(_BOM), False
        if not line:
            return self._end()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"data":
            self._check(len(value))
            self._data.append(value)
            self._size += len(value) + 1
        return None

    def _end(self) -> Message | None:
        message = Message(self._event or "message", b"\n".join(self._data)) if self._data else None
        self._event, self._size = "", 0
        self._data.clear()
        return message

    def _check(self, more: int) -> None:
        if self._size + more > self._max_bytes:
            raise MessageTooLarge(f"a message of more than {self._max_bytes} bytes")
