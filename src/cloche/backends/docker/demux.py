"""The attached stream of a container without a terminal → its stdout and stderr. Pure.

The daemon puts eight bytes before each piece: the number of the stream (0 is stdin, echoed by none; 1 stdout; 2 stderr),
three zeros, and the piece's length, big endian (Engine API, ContainerAttach, "Stream format"; checked with 1.41 and 1.56).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

Source: TypeAlias = Literal["stdout", "stderr"]

_HEADER_BYTES = 8
_NAMES: dict[int, Source] = {1: "stdout", 2: "stderr"}


class DemuxError(Exception):
    """The bytes are no such stream."""


class Demux:
    """Incremental, and holds no more than an unfinished header: a piece is handed on as it comes, whatever its length."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._source: Source = "stdout"
        self._left = 0

    def feed(self, data: bytes) -> Iterator[tuple[Source, bytes]]:
        """The pieces, or parts of them, that ``data`` brings.

        Raises:
            DemuxError: a header is none.
        """
        at = 0
        while at < len(data):
            if self._left == 0:
                taken = data[at : at + _HEADER_BYTES - len(self._header)]
                self._header += taken
                at += len(taken)
                if len(self._header) < _HEADER_BYTES:
                    return
                self._begin()
            else:
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                yield self._source, piece

    def _begin(self) -> None:
        source = _NAMES.get(self._header[0])
        if source is None or any(self._header[1:4]):
            raise DemuxError(f"{bytes(self._header)!r} is no header of a piece")
        self._source = source
        self._left = int.from_bytes(self._header[4:], "big")
        self._header.clear()
