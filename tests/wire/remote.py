"""A cloche service in good order, played by an :class:`Engine`. A test changes what is to go wrong.

It runs nothing: what it tells of a run is written by the test (``Remote.play``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import anyio
from tests.wire.engine import Engine, Peer, Raw, Reply, Request, serving
from tests.wire.kubernetes import FINISHED, attended, chunk

import cloche
from cloche.events import Event, Finished, Outcome, Output, Started
from cloche.isolation import Isolation
from cloche.wire import event_to_dict

TOKEN = "a-token-of-the-service"
POSTURE, POST, DELETE = "GET /v1/posture", "POST /v1/runs", "DELETE /v1/runs/*"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
OFFER: dict[str, Any] = {
    "mode": "local",
    "available": True,
    "isolation": "namespace",
    "reason": "",
    "hint": "",
    "engine": "bubblewrap 0.11",
    "guarantees": [{"name": "network", "state": "in-force", "evidence": "none", "advice": ""}],
    "fallback_from": None,
    "runs": True,
}
TIMES = {"queued": 1.0, "prepare": 2.0, "start": 3.0, "run": 4.0, "collect": 5.0, "cleanup": None, "total": 15.0}
STARTED = Started("r1", "local", Isolation.NAMESPACE, None, ("network",))
HI = Output("stdout", 0, b"hi")
ENDED = Finished(Outcome.EXITED, exit_code=3, stdout_bytes=2, run_ms=4.0, timings_ms=TIMES)

Step: TypeAlias = Event | bytes | float
"""An event, bytes of the stream as they are, or seconds to wait (``math.inf``: until the run is ended)."""


def message(kind: str, found: object) -> bytes:
    """A server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(found)}\n\n".encode()


def signs_of_life(times: int, every_s: float = 0.05) -> list[Step]:
    """That the service is still there, and no more."""
    pair: list[Step] = [every_s, b": still there\n\n"]
    return pair * times


def problem(status: int, code: str, detail: str, **more: Any) -> Reply:
    """A no, as the service says it."""
    body = {"type": "about:blank", "title": "No", "status": status, "detail": detail, "code": code, "hint": "", **more}
    return Reply(status, body, {"Content-Type": "application/problem+json"})


class Remote:
    """The service. ``killed`` and ``asked_to_end`` are the runs that somebody ended."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.base = f"http{engine.address.removeprefix('tcp')}"
        self.offer = OFFER
        self.play: Sequence[Step] = (STARTED, HI, ENDED)
        """What is told of each run; of the run that is meant, whatever it is called."""
        self.when_ended: Sequence[Step] | None = None
        """What is told when somebody has asked for the end of the run. None: it does not heed that."""
        self.running: dict[str, anyio.Event] = {}
        self.killed: list[str] = []
        self.asked_to_end: list[str] = []
        self.left: list[str] = []
        """Runs whose caller left before their end."""
        engine.on(POSTURE, self.posture)
        engine.on(POST, self.post)
        engine.on(DELETE, self.delete)

    def settings(self, **more: Any) -> cloche.Settings:
        """Settings that lead to this service."""
        known = {"mode": "remote", "fallback": False, "remote_url": self.base, "remote_token": TOKEN}
        return cloche.Settings.model_validate({**known, **more})

    def _unknown(self, request: Request) -> Reply | None:
        if request.headers.get("authorization") == f"Bearer {TOKEN}":
            return None
        return problem(401, "unauthorized", "This needs a token.")

    async def posture(self, request: Request, _: Peer) -> Reply:
        return self._unknown(request) or Reply(body=self.offer)

    async def post(self, request: Request, peer: Peer) -> Reply | Raw:
        if (refused := self._unknown(request)) is not None:
            return refused
        run_id = request.query["run_id"]
        ended = self.running[run_id] = anyio.Event()
        over = False
        async with attended(peer):
            try:
                await peer.send(EVENTS + chunk(b": still there\n\n"))
                over = await self._tell(run_id, ended, peer)
                await peer.send(FINISHED)
            finally:
                del self.running[run_id]
                if not over:
                    self.left.append(run_id)
        return Raw()

    async def _tell(self, run_id: str, ended: anyio.Event, peer: Peer) -> bool:
        """Whether the end was told."""
        for step in self.play:
            if isinstance(step, float | int):
                with anyio.move_on_after(step):
                    await ended.wait()
            else:
                await peer.send(chunk(self._bytes(run_id, step)))
            if ended.is_set() and self.when_ended is not None:
                for last in self.when_ended:
                    assert not isinstance(last, float | int)
                    await peer.send(chunk(self._bytes(run_id, last)))
                return True
        return any(isinstance(step, Finished) for step in self.play)

    @staticmethod
    def _bytes(run_id: str, step: Event | bytes) -> bytes:
        if isinstance(step, bytes):
            return step
        found = event_to_dict(step)
        if found.get("run_id") == STARTED.run_id:
            found["run_id"] = run_id
        return message(found["event"], found)

    async def delete(self, request: Request, _: Peer) -> Reply:
        if (refused := self._unknown(request)) is not None:
            return refused
        run_id = request.path.rpartition("/")[2]
        kill = request.query.get("kill") == "true"
        (self.killed if kill else self.asked_to_end).append(run_id)
        if (ended := self.running.get(run_id)) is None:
            return problem(404, "not-found", "There is no such run.")
        ended.set()
        return Reply(202, {"run_id": run_id, "state": "running", "result": None})


@asynccontextmanager
async def playing() -> AsyncIterator[Remote]:
    """A service in good order, at a port of the loopback."""
    async with serving(tcp=True) as engine:
        yield Remote(engine)
