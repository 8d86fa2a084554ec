"""A run's events as server-sent events (WHATWG, HTML Living Standard, 9.2), and noticing that nobody listens any more."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

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
    """The events of a run. ``abandon`` is called when the client goes before the end."""

    media_type = MEDIA_TYPE

    def __init__(self, run: ServiceRun, request_id: str, abandon: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Cloche-Run-Id": run.run_id})
        del self.headers["content-length"]
        self._run = run
        self._request_id = request_id
        self._abandon = abandon

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI's signature)
        """Send it."""
        finished = False
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, receive, tasks.cancel_scope)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._send_all(send)
                finished = True
                tasks.cancel_scope.cancel()
        finally:
            if not finished:
                self._abandon()

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
            async for data in self._lines():
                await put(data)
            tasks.cancel_scope.cancel()
        await put(b"", more=False)

    async def _lines(self) -> AsyncIterator[bytes]:
        async for event in self._run.events():
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
