"""Speaks the API of execd, the service's program inside of each sandbox (the project's "OpenAPI: execd"; checked with a stand-in
that keeps to it, see tests/engines/opensandbox). No other room does.

Nothing is repeated here: a command that was lost may have run. Errors are those of the client's room.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from cloche._kit.http import Answer, ConnectionLost, HttpClient, Part, Server, Stream
from cloche._kit.places import Place
from cloche.backends.opensandbox import facts
from cloche.backends.opensandbox.allowed import IPAddress
from cloche.backends.opensandbox.client import Refused
from cloche.backends.opensandbox.events import Decoder, Ended, EventError, Printed

ACCESS_HEADER = "x-execd-access-token"
PING_S = 2.0
"""For a sign of life; whoever waits asks again."""
QUICK_S = 20.0
INTERRUPT_S = 5.0
"""It waits up to 3 s for the command to end."""
UPLOAD_S, UPLOAD_BYTES_PER_S = 30.0, 256 * 1024
"""For an upload, and for each so many bytes of it a second more."""
DEAD_S = 12.0
"""A stream that brings nothing for so long is dead: execd sends a sign of life every 3 s."""
MAX_ANSWER_BYTES = 64 * 1024
HEAD_BYTES = 64
MAX_WORDS = 4096


class Execd:
    """That of one sandbox. The names of ``headers`` are in lower case."""

    def __init__(
        self,
        place: Place,
        headers: Mapping[str, str],
        *,
        allowed: Callable[[str, IPAddress], bool],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._http = HttpClient(Server(place.base, tls=tls), allowed=allowed)
        self._headers = headers

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def ping(self) -> None:
        """Whether it is there.

        Raises:
            Refused, HttpFailure: not yet, or not here.
        """
        if (await self._call("GET", "/ping", timeout_s=PING_S)).body:
            raise ConnectionLost("what answers is not execd")

    async def machine(self) -> str:
        """The architecture that its programs have, as the kernel calls it; empty: it cannot be told.

        Raises:
            HttpFailure.
        """
        async with self._own_program(self._headers) as stream:
            return facts.machine_of(await stream.read(HEAD_BYTES)) if stream.status in {200, 206} else ""

    async def knows_its_own(self) -> bool:
        """Whether it refuses who does not show its token: else it is not the one that we gave one, or it heeds none.

        Raises:
            HttpFailure.
        """
        bare = {name: text for name, text in self._headers.items() if name != ACCESS_HEADER}
        async with self._own_program(bare) as stream:
            return stream.status in {401, 403}

    def _own_program(self, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Stream]:
        """The head of execd's own file."""
        return self._http.stream(
            "GET",
            "/files/download",
            query={"path": "/proc/self/exe"},
            headers={**headers, "Range": f"bytes=0-{HEAD_BYTES - 1}"},
            idle_s=QUICK_S,
        )

    async def upload(self, parts: Sequence[Part]) -> None:
        """Write files, by a form (see ``manifest.upload``).

        Raises:
            Refused, HttpFailure.
        """
        size = sum(len(content) for _, content in parts)
        await self._call("POST", "/files/upload", parts=parts, timeout_s=UPLOAD_S + size / UPLOAD_BYTES_PER_S)

    @asynccontextmanager
    async def command(self, body: Mapping[str, Any]) -> AsyncIterator[Stream]:
        """Start a command (see ``manifest.command``), and read what it says as it comes. It goes on when nobody reads any more.

        Raises:
            Refused: it was not started.
            HttpFailure: it may have been.
        """
        async with self._http.stream("POST", "/command", body=body, headers=self._headers, idle_s=DEAD_S) as stream:
            if stream.status != 200:
                raise Refused(facts.parse_refusal(stream.status, {}, await stream.read(MAX_ANSWER_BYTES)))
            yield stream

    async def says(self, text: str) -> str:
        """What a short command for a shell prints.

        Raises:
            Refused, HttpFailure.
        """
        said, events = "", Decoder()
        try:
            async with self.command({"command": text, "timeout": 5000}) as stream:
                async for chunk in stream.chunks():
                    for event in events.feed(chunk):
                        if isinstance(event, Printed) and event.stream == "stdout":
                            said += event.text
                        if isinstance(event, Ended) or len(said) > MAX_WORDS:
                            return said.strip()
        except EventError as exc:
            raise ConnectionLost(str(exc)) from exc
        raise ConnectionLost("the command's stream ended before the command")

    async def interrupt(self, command: str) -> None:
        """Send SIGTERM to a command's processes, and SIGKILL three seconds later. Waits until they have ended.

        Raises:
            Refused: mostly, that it has ended already.
            HttpFailure.
        """
        await self._call("DELETE", "/command", query={"id": command}, timeout_s=INTERRUPT_S)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        parts: Sequence[Part] | None = None,
        timeout_s: float,
    ) -> Answer:
        answer = await self._http.request(
            method,
            path,
            query=query,
            parts=parts,
            headers=self._headers,
            timeout_s=timeout_s,
            max_bytes=MAX_ANSWER_BYTES,
        )
        if not answer.ok:
            raise Refused.of(answer)
        return answer
