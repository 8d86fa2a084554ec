"""Bytes of a box → frames, over as many connections as it takes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import anyio

from cloche.backends.contract import Box
from cloche.errors import EngineLost, ProtocolError
from cloche.supervisor.frames import Decoder, Foreign, Frame, FrameError

PAUSES_S = (0.05, 0.2, 0.5, 1.0)
"""Before each new try to read a stream that ended early: an engine that lost a connection needs a moment."""


async def read_frames(box: Box, *, replayable: bool) -> AsyncGenerator[Frame, None]:
    """The frames of a run, each once, up to the last one, or fewer when the box's output ended before.

    Where the engine can give the output again, a stream that ends early or is garbled is read again from its start.
    Garbled twice in the same place, it is not the connection.

    Raises:
        ProtocolError: what came is not what a supervisor writes.
        EngineError: from the box.
    """
    decoder = Decoder()
    given = 0
    garbled_at = -1
    for pause in (*PAUSES_S, None) if replayable else (None,):
        try:
            async with _connection(box) as chunks:
                async for chunk in chunks:
                    for frame in decoder.feed(chunk):
                        if isinstance(frame, Foreign):
                            raise FrameError(f"a foreign line: {frame.line[:80]!r}")
                        given += 1
                        yield frame
                        if decoder.finished:
                            return
        except FrameError as exc:
            if pause is None or garbled_at == given:
                raise ProtocolError(f"The box's output is not what the supervisor writes: {exc}.") from None
            garbled_at = given
        except EngineLost as exc:
            if pause is None or not exc.retryable:
                raise
        if pause is not None:
            await anyio.sleep(pause)
            decoder.restart()


@asynccontextmanager
async def _connection(box: Box) -> AsyncIterator[AsyncIterator[bytes]]:
    chunks = box.output()
    if isinstance(chunks, AsyncGenerator):
        async with aclosing(chunks):
            yield chunks
    else:
        yield chunks
