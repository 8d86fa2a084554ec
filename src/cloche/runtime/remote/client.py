"""Speaks the API of a cloche service. No other room does.

Every answer is read with a bound, every call has a timeout. Errors leave this room as cloche's own. A run is asked for once: only
a connection that never came about is tried again.
"""

from __future__ import annotations

import base64
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import unquote

import anyio

from cloche._kit.http import Answer, ConnectFailure, HttpClient, HttpFailure, Pieces, Query, Server, Stream, TlsFailure
from cloche._kit.places import Place
from cloche._kit.retries import repeat
from cloche.errors import ClocheError, EngineLost
from cloche.runtime.remote import answer
from cloche.runtime.remote.answer import Offer

QUICK_S = 20.0
"""For one answer."""
PROOF_S = 600.0
"""For a proof: some boxes, which an engine may first have to make room for."""
END_S = 5.0
"""For the answer to a wish to end a run."""
DEAD_S = 15.0
"""A stream that brings nothing for so long is dead: a service sends a sign of life every 5 s."""
PAUSES_S = (0.1, 0.3, 0.9)
"""Before each new try."""
MAX_ANSWER_BYTES = 256 * 1024
EVENTS = "text/event-stream"


class RemoteClient:
    """One service. ``tls`` as for :class:`Server`."""

    def __init__(self, place: Place, token: str | None, tls: ssl.SSLContext | None) -> None:
        self.place = place
        self._http = HttpClient(Server(place.base, tls=tls))
        self._headers = _credentials(place, token)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def offer(self, *, prove: bool = False) -> Offer:
        """What the service says of itself; ``prove``: after it has looked from inside of a box.

        Raises:
            ClocheError: it cannot be spoken to, or is none.
        """
        found = await self._call(
            "GET",
            "/v1/posture",
            query={"prove": "true"} if prove else None,
            timeout_s=PROOF_S if prove else QUICK_S,
        )
        try:
            if not found.ok:
                raise self._refusal(found)
            return answer.offer(found.json())
        except ValueError:
            raise answer.no_service(self.place.base, "it tells of no isolation") from None

    @asynccontextmanager
    async def run(self, run_id: str, body: Mapping[str, Any] | Pieces) -> AsyncIterator[Stream]:
        """Ask for a run, and read of it as it goes. It is cancelled when nobody reads any more.

        Raises:
            ClocheError: it is not begun, or nobody knows; or, from inside, what an HttpFailure there means.
        """
        async with AsyncExitStack() as stack:

            async def post() -> Stream:
                return await stack.enter_async_context(
                    self._http.stream(
                        "POST",
                        "/v1/runs",
                        query={"run_id": run_id},
                        body=body,
                        headers={**self._headers, "Accept": EVENTS},
                        idle_s=DEAD_S,
                    )
                )

            try:
                stream = await repeat(post, PAUSES_S, _pause_when_nothing_was_sent)
                if stream.status != 200:
                    content = await stream.read(MAX_ANSWER_BYTES)
                    raise self._refusal(Answer(stream.status, stream.headers, content))
                if not stream.headers.get("content-type", "").startswith(EVENTS):
                    raise answer.no_service(self.place.base, "it sends no events")
                yield stream
            except HttpFailure as exc:
                raise answer.unreachable(exc, self.place.base) from exc

    async def end(self, run_id: str, *, kill: bool) -> bool:
        """Ask for the end of a run. False: the service has no such run.

        Raises:
            ClocheError: the service cannot be spoken to, or does not do it.
        """
        query: Query | None = {"kill": True} if kill else None
        with anyio.move_on_after(END_S):  # with all its tries
            found = await self._call("DELETE", f"/v1/runs/{run_id}", query=query, timeout_s=END_S)
            if not found.ok and found.status != 404:
                raise self._refusal(found)
            return found.ok
        raise EngineLost(f"The service at {self.place.base} gave no answer within {END_S:g} s.", retryable=True)

    async def _call(self, method: str, path: str, *, query: Query | None = None, timeout_s: float) -> Answer:
        """One request, whose status may be any; sent again where it was not sent."""

        async def ask() -> Answer:
            return await self._http.request(
                method, path, query=query, headers=self._headers, timeout_s=timeout_s, max_bytes=MAX_ANSWER_BYTES
            )

        try:
            return await repeat(ask, PAUSES_S, _pause_when_nothing_was_sent)
        except HttpFailure as exc:
            raise answer.unreachable(exc, self.place.base) from exc

    def _refusal(self, found: Answer) -> ClocheError:
        return answer.refusal(found.status, found.headers, found.body, self.place.base)


def _pause_when_nothing_was_sent(exc: Exception) -> float | None:
    return 0.0 if isinstance(exc, ConnectFailure) and not isinstance(exc, TlsFailure) else None


def _credentials(place: Place, token: str | None) -> Mapping[str, str]:
    if token is not None:
        return {"Authorization": f"Bearer {token}"}
    if place.user:  # who stands before the service wants to know us (RFC 7617)
        return {"Authorization": f"Basic {base64.b64encode(unquote(place.user).encode()).decode()}"}
    return {}
