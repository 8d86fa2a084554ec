"""The application: what stands around every request, and the routes."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import anyio
import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloche.errors import ClocheError, InvalidSpec, TooManyRuns
from cloche.runtime import Sandbox
from cloche.server import problems
from cloche.server.auth import Doorkeeper
from cloche.server.metrics import VERSION, Metrics
from cloche.server.problems import HttpProblem
from cloche.server.routes import Readiness, Service, routes
from cloche.server.runs import Runs
from cloche.server.schema import document
from cloche.server.uploads import Uploads, open_place

PIECE_BYTES = 64 * 1024
"""Of an answer, handed on at a time: what a slow client has not read yet is not copied as a whole for each that asks."""
_EVERYWHERE: Final = {b"x-content-type-options": b"nosniff", b"cache-control": b"no-store"}
"""On every answer that does not say otherwise."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HTTP_CODES: Final = {404: "not-found", 405: "method-not-allowed"}
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked for all the time, by machines; logged only at debug."""

_log = structlog.get_logger("cloche.server")


@asynccontextmanager
async def open_service(sandbox: Sandbox, doorkeeper: Doorkeeper) -> AsyncIterator[tuple[FastAPI, Runs]]:
    """The application for an open sandbox, and its runs. Leaving the context kills what still runs.

    Raises:
        InvalidSettings: uploads have no place to go.
    """
    metrics = Metrics(sandbox)
    async with open_place() as place, Runs(sandbox, metrics) as runs:
        uploads = Uploads(sandbox.settings, sandbox.mode, place)
        yield make_app(Service(sandbox, runs, uploads, doorkeeper, metrics, Readiness(sandbox))), runs


def make_app(service: Service) -> FastAPI:
    """The application."""
    app = FastAPI(
        title="cloche",
        version=VERSION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    router = routes()
    app.state.routes = router.routes
    app.include_router(router)
    app.openapi = lambda: document(app, needs_tokens=service.doorkeeper.needs_tokens)  # type: ignore[method-assign]
    for kind in (ClocheError, HttpProblem, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(Frame, service=service)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    match error:
        case HTTPException():
            code = _HTTP_CODES.get(error.status_code, "bad-request")
            headers = {"Allow": _allowed(request)} if error.status_code == 405 else {}
            hint = "GET /docs lists what there is."
            error = HttpProblem(error.status_code, code, f"{error.detail}.", hint=hint).with_headers(**headers)
        case RequestValidationError():
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][1:])
            error = InvalidSpec(f"{where} is not allowed: {first['msg']}.", hint="GET /docs lists what is.")
        case _:
            pass
    return _problem(request.app.state.service, error, request.scope["state"])


def _problem(service: Service, error: Exception, state: Mapping[str, Any]) -> Response:
    """The answer for an error, counted."""
    request_id: str = state["request_id"]
    if isinstance(error, TooManyRuns):
        error = HttpProblem(429, error.code, error.message, hint=error.hint, retry_after_s=service.runs.retry_after_s)
    if not isinstance(error, ClocheError | HttpProblem):
        _log.error("a request failed in a way that it must not", request_id=request_id, exc_info=error)
    service.metrics.refused(problems.describe(error, request_id).code)
    return problems.answer(error, request_id, state.get("run_id"))


def _allowed(request: Request) -> str:
    """What may be asked of this path, by whichever route."""
    found: set[str] = set()
    for route in request.app.state.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods
    return ", ".join(sorted(found))


class Frame:
    """Around every request: its id, the bounds of its body, one line in the log."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name for name, _ in message["headers"]}
                more = [(name, value) for name, value in _EVERYWHERE.items() if name not in given]
                more.append((b"x-request-id", request_id.encode()))
                message = {**message, "headers": [*message["headers"], *more]}
            for piece in _pieces(message):
                await send(piece)

        uploads = self._service.uploads
        body = _Body(receive, headers, uploads, self._service.body_s)
        scope["state"]["body"] = body
        try:
            body.check()
            await self._app(scope, body.receive, send_with_id)
        except ClientDisconnect:
            pass  # in the middle of the request: there is nobody to answer
        except Exception as exc:
            if status is not None:
                raise  # what has begun cannot be taken back: the connection is cut
            await _problem(self._service, exc, scope["state"])(scope, body.receive, send_with_id)
        finally:
            uploads.room.give_back(body.hand_over())
            log = _log.debug if scope["path"] in _QUIET else _log.info
            log(
                "request",
                method=scope["method"],
                path=scope["path"][:200],
                status=status,
                ms=round((time.perf_counter() - begun) * 1000, 1),
                request_id=request_id,
                caller=scope["state"].get("caller"),
            )


def _pieces(message: Message) -> Iterator[Message]:
    """A message in several, where it carries much."""
    body = message.get("body", b"")
    if message["type"] != "http.response.body" or len(body) <= PIECE_BYTES:
        yield message
        return
    for at in range(0, len(body), PIECE_BYTES):
        more = message.get("more_body", False) or at + PIECE_BYTES < len(body)
        yield {**message, "body": body[at : at + PIECE_BYTES], "more_body": more}


class _Body:
    """A request's body, read no further and waited for no longer than is allowed."""

    def __init__(self, receive: Receive, headers: Mapping[bytes, bytes], uploads: Uploads, within_s: float) -> None:
        self._receive = receive
        self._bound = uploads.max_body_bytes
        self._room = uploads.room
        self._headers = headers
        self._within_s = within_s
        self._came = 0
        self._held = 0
        self._whole = False
        self._until = anyio.current_time() + within_s

    def check(self) -> None:
        """Raises: HttpProblem: it says in two ways how long it is, and who is in between may have believed the other one."""
        if b"transfer-encoding" in self._headers and b"content-length" in self._headers:
            raise HttpProblem(
                400,
                "bad-request",
                "The request has a Content-Length and a Transfer-Encoding.",
                hint="Send one of them.",
            ).with_headers(Connection="close")

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            HttpProblem: it is too large, or too slow.
            TooManyRuns: there is no room for it.
        """
        if self._whole:
            return await self._receive()
        if int(self._headers.get(b"content-length", b"0")) > self._bound:
            raise self._too_large()
        message: Message | None = None
        with suppress(TimeoutError), anyio.fail_after(max(0.0, self._until - anyio.current_time())):
            message = await self._receive()
        if message is None:
            raise HttpProblem(408, "request-timeout", f"The request did not arrive within {self._within_s:g} s.")
        self._came += len(message.get("body", b""))
        if self._came > self._bound:
            raise self._too_large()
        self._room.take(self._came - self._held)
        self._held = self._came
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    def hand_over(self) -> int:
        """How much room it has, which is somebody else's from here on."""
        held, self._held = self._held, 0
        return held

    def _too_large(self) -> HttpProblem:
        return HttpProblem(
            413,
            "payload-too-large",
            f"The request is larger than {self._bound} bytes.",
            hint="Deliver less (only what the script reads), or have CLOCHE_MAX_WORKSPACE_BYTES raised.",
        )
