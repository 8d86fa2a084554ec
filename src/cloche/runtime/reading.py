"""Bytes of a box → frames, over as many connections as it takes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import anyio

from cloche._kit.steps import step
from cloche.backends.contract import Box
from cloche.errors import EngineLost, ProtocolError
from cloche.supervisor.frames import Decoder, Foreign, Frame, FrameError

PAUSES_S = (0.05, 0.2, 0.5, 1.0)
"""Before each new try to read what could not be read: an engine that is lost needs a moment. The last one is repeated for as long
as the run may take."""
ENDS = 2
"""A stream that ended so often without its last frame, and brought nothing new, has no more: the engine is asked for the box's
fate."""


class Reading:
    """The frames of one box, each once. ``connected`` tells whether the engine could be reached when it was last tried."""

    def __init__(self, box: Box, *, replayable: bool) -> None:
        self._box = box
        self._replayable = replayable
        self._decoder = Decoder()
        self._given = 0
        self.connected = True

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """Up to the last one, or fewer when the box's output ended before.

        Where the engine can give the output again, a stream that ends early or is garbled is read again from its start, and
        one that cannot be read is tried until the caller gives up.
        Garbled twice in the same place, it is not the connection. Called again, this goes on after the last frame.

        Raises:
            ProtocolError: what came is not what a supervisor writes.
            EngineError: from the box.
        """
        decoder = self._decoder
        decoder.restart()
        garbled_at, ends, losses = -1, 0, 0
        while True:
            before = self._given
            lost: EngineLost | None = None
            garbled: FrameError | None = None
            try:
                async with _connection(self._box) as chunks:
                    async for chunk in chunks:
                        self.connected, losses = True, 0
                        for frame in decoder.feed(chunk):
                            if isinstance(frame, Foreign):
                                raise FrameError(f"a foreign line: {frame.line[:80]!r}")
                            self._given += 1
                            yield frame
                            if decoder.finished:
                                return
            except FrameError as exc:
                garbled = exc
            except EngineLost as exc:
                if not self._replayable or not exc.retryable:
                    raise
                lost = exc
            if garbled is not None:
                if not self._replayable or garbled_at == self._given:
                    raise ProtocolError(f"The box's output is not what the supervisor writes: {garbled}.") from None
                garbled_at = self._given
            self.connected = lost is None
            if lost is None:
                ends = 1 if self._given > before else ends + 1
                if not self._replayable or (garbled is None and ends >= ENDS):
                    return
            await anyio.sleep(step(PAUSES_S, losses))
            losses += lost is not None
            decoder.restart()


@asynccontextmanager
async def _connection(box: Box) -> AsyncIterator[AsyncIterator[bytes]]:
    chunks = box.output()
    if isinstance(chunks, AsyncGenerator):
        async with aclosing(chunks):
            yield chunks
    else:
        yield chunks
