"""A run's events as server-sent events (WHATWG, HTML Living Standard, 9.2), and noticing that nobody listens any more."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cloche.events import Event
from cloche.server.problems import describe, dump
from cloche.server.runs import ServiceRun
from cloche.wire import event_to_dict

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 5.0
"""Between two signs of life where nothing happens. A client takes who says nothing for three times as long for dead."""
_KEEP_ALIVE = b": still there\n\n"


async def gone(receive: Receive) -> None:
    """Wait until the client is gone. Its request has been read by then."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """The events of a run. ``leave`` is called when nobody listens any more: they are over, or the client is gone."""

    media_type = MEDIA_TYPE

    def __init__(
        self,
        run: ServiceRun,
        events: MemoryObjectReceiveStream[Event],
        request_id: str,
        leave: Callable[[], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Cloche-Run-Id": run.run_id})
        del self.headers["content-length"]
        self._run = run
        self._events = events
        self._request_id = request_id
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI's signature)
        """Send it."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, receive, tasks.cancel_scope)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._send_all(send)
                tasks.cancel_scope.cancel()
        finally:
            self._events.close()
            self._leave()

    async def _watch(self, receive: Receive, scope: anyio.CancelScope) -> None:
        await gone(receive)
        scope.cancel()

    async def _send_all(self, send: Send) -> None:
        lock = anyio.Lock()

        async def put(data: bytes, *, more: bool = True) -> None:
            async with lock:
                await send({"type": "http.response.body", "body": data, "more_body": more})

        await put(_KEEP_ALIVE)  # what is in between may wait for the first byte
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_every, KEEP_ALIVE_S, lambda: put(_KEEP_ALIVE))
            async with aclosing(self._lines()) as lines:
                async for data in lines:
                    await put(data)
            tasks.cancel_scope.cancel()
        await put(b"", more=False)

    async def _lines(self) -> AsyncGenerator[bytes, None]:
        async for event in self._events:
            fields = event_to_dict(event)
            yield _message(fields["event"], json.dumps(fields))
        await self._run.over.wait()
        if self._run.error is not None:
            yield _message("error", dump(describe(self._run.error, self._request_id, self._run.run_id)))


def _message(kind: str, data: str) -> bytes:
    # JSON from json.dumps is ASCII in one line, so that nothing in it can end the message.
    return f"event: {kind}\ndata: {data}\n\n".encode("ascii")


async def _every(seconds: float, call: Callable[[], Awaitable[None]]) -> None:
    while True:
        await anyio.sleep(seconds)
        await call()
