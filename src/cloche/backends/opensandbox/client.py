"""Speaks the API of an OpenSandbox service (the project's "OpenAPI: sandbox lifecycle"; checked with opensandbox-server 1.1.1).
No other room does.

Every answer is read with a bound, every call has a timeout, every id is checked before it enters a path. Errors leave this room
as two: :class:`Refused`, the service's own no, and the :class:`cloche._kit.http.HttpFailure` of a service that cannot be
talked to.

What only asks or removes is repeated, after a pause, when the service is busy or the connection breaks. To make a sandbox is
not: there is no way to do that once. Only a connection that never came about is tried again.
"""

from __future__ import annotations

import base64
import logging
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import unquote, urlencode

from cloche._kit.fields import field, shortened
from cloche._kit.http import (
    Answer,
    ConnectFailure,
    ConnectionLost,
    HttpClient,
    HttpFailure,
    Query,
    Server,
    TlsFailure,
    TooLarge,
    segment,
)
from cloche._kit.places import Place
from cloche._kit.retries import repeat
from cloche.backends.opensandbox import address, facts
from cloche.backends.opensandbox.address import EXECD_PORT, Endpoint
from cloche.backends.opensandbox.facts import Refusal, Sandbox

QUICK_S = 20.0
"""For one answer."""
PAUSES_S = (0.1, 0.3, 0.9)
"""Before each new try."""
MAX_RETRY_AFTER_S = 10.0
PAGE, MAX_PAGES = 200, 50
MAX_ANSWER_BYTES = 256 * 1024
MAX_LIST_BYTES = 4 * 2**20
"""Of one page: 20 KiB for each sandbox."""
BUSY = frozenset({429, 502, 503, 504})

_log = logging.getLogger("cloche.opensandbox")


class Refused(Exception):
    """The service, or execd, answered with an error."""

    def __init__(self, refusal: Refusal) -> None:
        request = f", request {refusal.request_id}" if refusal.request_id else ""
        said = refusal.message or refusal.code or "no message"
        super().__init__(f"{said} (status {refusal.status}{request})")
        self.refusal = refusal

    @property
    def status(self) -> int:
        """HTTP's number."""
        return self.refusal.status

    @property
    def code(self) -> str:
        """The service's own word for it."""
        return self.refusal.code

    @property
    def is_gone(self) -> bool:
        """Whether there is no such thing, by the service's own word: who stands before it may say 404 of anything."""
        return self.status == 404 and "NOT_FOUND" in self.code.upper()

    @classmethod
    def of(cls, answer: Answer) -> Refused:
        """What an answer says that is no success."""
        return cls(facts.parse_refusal(answer.status, answer.headers, answer.body))


class OpenSandboxClient:
    """One service. ``tls`` as for :class:`Server`."""

    def __init__(self, place: Place, key: str | None, tls: ssl.SSLContext | None) -> None:
        self.place = place
        self._http = HttpClient(Server(place.base, tls=tls))
        self._headers = {"Accept": "application/json", **_credentials(place, key)}
        self._offset_s = 0.0

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    def server_time(self) -> float:
        """Unix time in seconds by the service's clock, as its last answer told it; ours where none did."""
        return time.time() + self._offset_s

    async def healthy(self) -> bool:
        """Whether what answers is such a service, and says that it is well.

        Raises:
            Refused, HttpFailure.
        """
        answer = await self._once("GET", "/health")
        return answer.ok and field(_json(answer), "status", str, "") == "healthy"

    async def version(self) -> str:
        """The service's own; empty where it does not tell."""
        try:
            answer = await self._once("GET", "/version")
            return shortened(field(_json(answer), "version", str, ""), 64) if answer.ok else ""
        except HttpFailure:
            return ""

    async def create(self, body: Mapping[str, Any], within_s: float) -> Sandbox:
        """Make a sandbox, for which an image may have to be pulled. Its container is started; what is in it may not be ready yet.

        Raises:
            Refused: nothing was made.
            HttpFailure: something may have been made.
        """

        async def post() -> Answer:
            return await self._once("POST", "/v1/sandboxes", body=body, timeout_s=within_s)

        answer = await repeat(post, PAUSES_S, _pause_when_nothing_was_sent)
        if not answer.ok:
            raise Refused.of(answer)
        found = facts.parse_sandbox(_json(answer))
        if found is None:
            raise ConnectionLost("the service's answer names no sandbox")
        return found

    async def sandbox(self, name: str) -> Sandbox | None:
        """A sandbox; None: it is not there.

        Raises:
            Refused, HttpFailure.
        """
        try:
            return facts.parse_sandbox(_json(await self._call("GET", f"/v1/sandboxes/{segment(name)}")))
        except Refused as exc:
            if exc.is_gone:
                return None
            raise

    async def sandboxes(self, metadata: Mapping[str, str]) -> AsyncIterator[Sandbox]:
        """All sandboxes that carry that metadata.

        Raises:
            Refused, HttpFailure.
        """
        for page in range(1, MAX_PAGES + 1):
            # The filter is a query string inside of one, so it is encoded twice.
            query: Query = {"metadata": urlencode(metadata), "page": page, "pageSize": PAGE}
            found = _json(await self._call("GET", "/v1/sandboxes", query=query, max_bytes=MAX_LIST_BYTES))
            for item in field(found, "items", list, [])[:PAGE]:
                if (sandbox := facts.parse_sandbox(item)) is not None and metadata.items() <= sandbox.metadata.items():
                    yield sandbox
            if not field(field(found, "pagination", dict, {}), "hasNextPage", bool, otherwise=False):
                return

    async def out_of_memory(self, name: str) -> bool:
        """Whether something in a sandbox was killed for want of memory, as far as the service can tell (from 1.1 on).

        Raises:
            Refused, HttpFailure.
        """
        path = f"/v1/sandboxes/{segment(name)}/diagnostics/events"
        found = _json(await self._call("GET", path, query={"scope": "runtime"}))
        return "OOMKilled" in field(found, "content", str, "")

    async def delete(self, name: str) -> None:
        """Remove a sandbox, if there is one (any more).

        Raises:
            Refused, HttpFailure.
        """
        try:
            await self._call("DELETE", f"/v1/sandboxes/{segment(name)}")
        except Refused as exc:
            if not exc.is_gone:
                raise

    async def endpoint(self, name: str, *, proxied: bool) -> Endpoint:
        """Where execd of a sandbox is; ``proxied``: through the service.

        Raises:
            Refused, HttpFailure.
            ValueError: what it says is no address.
        """
        path = f"/v1/sandboxes/{segment(name)}/endpoints/{EXECD_PORT}"
        answer = _json(await self._call("GET", path, query={"use_server_proxy": True} if proxied else None))
        return address.through_the_service(answer, self.place, segment(name)) if proxied else address.endpoint(answer)

    def headers_for(self, place: Place) -> Mapping[str, str]:
        """What a request to a sandbox carries: the key, where it goes through the service itself, and nowhere else."""
        return self._headers if place.origin == self.place.origin else {}

    async def _call(
        self, method: str, path: str, *, query: Query | None = None, max_bytes: int = MAX_ANSWER_BYTES
    ) -> Answer:
        """One request, as often as it takes; the answer is a success."""

        async def ask() -> Answer:
            answer = await self._once(method, path, query=query, max_bytes=max_bytes)
            if not answer.ok:
                raise Refused.of(answer)
            return answer

        def least_pause(exc: Exception) -> float | None:
            _log.debug("%s %s: %s", method, path, exc)
            if isinstance(exc, Refused) and exc.status in BUSY:
                return min(exc.refusal.retry_after_s or 0.0, MAX_RETRY_AFTER_S)
            return 0.0 if isinstance(exc, HttpFailure) and not isinstance(exc, TooLarge | TlsFailure) else None

        return await repeat(ask, PAUSES_S, least_pause)

    async def _once(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = QUICK_S,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> Answer:
        answer = await self._http.request(
            method,
            path,
            query=query,
            body=body,
            headers=self._headers,
            timeout_s=timeout_s,
            max_bytes=max_bytes,
        )
        if (told := answer.server_time) is not None:
            self._offset_s = told + 0.5 - time.time()  # it tells whole seconds
        return answer


def _pause_when_nothing_was_sent(exc: Exception) -> float | None:
    return 0.0 if isinstance(exc, ConnectFailure) and not isinstance(exc, TlsFailure) else None


def _credentials(place: Place, key: str | None) -> Mapping[str, str]:
    found = {} if key is None else {"OPEN-SANDBOX-API-KEY": key}
    if place.user:
        found["Authorization"] = f"Basic {base64.b64encode(unquote(place.user).encode()).decode()}"
    return found


def _json(answer: Answer) -> Any:
    try:
        return answer.json()
    except ValueError:
        raise ConnectionLost("what the service sent is not JSON") from None
