"""The application: what stands around every request, and the routes."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import anyio
import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloche.errors import ClocheError, InvalidSpec, TooManyRuns
from cloche.runtime import Sandbox
from cloche.server import problems
from cloche.server.auth import Doorkeeper
from cloche.server.metrics import Metrics
from cloche.server.problems import HttpProblem
from cloche.server.routes import Readiness, Service, routes
from cloche.server.runs import Runs, open_runs
from cloche.server.schema import document
from cloche.server.uploads import Uploads, place_for_uploads

BODY_S = 300.0
"""For a request to arrive."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HTTP_CODES: Final = {404: "not-found", 405: "method-not-allowed"}
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked for all the time, by machines; logged only at debug."""

_log = structlog.get_logger("cloche.server")


@asynccontextmanager
async def open_service(sandbox: Sandbox, doorkeeper: Doorkeeper) -> AsyncIterator[tuple[FastAPI, Runs]]:
    """The application for an open sandbox, and its runs. Leaving the context kills what still runs.

    Raises:
        OSError: uploads have no place to go.
    """
    metrics = Metrics(sandbox)
    with place_for_uploads() as place:
        async with open_runs(sandbox, metrics) as runs:
            uploads = Uploads(sandbox.settings, sandbox.mode, place)
            yield make_app(Service(sandbox, runs, uploads, doorkeeper, metrics, Readiness(sandbox))), runs


def make_app(service: Service) -> FastAPI:
    """The application."""
    try:
        installed = version("cloche")
    except PackageNotFoundError:
        installed = "0+unknown"
    app = FastAPI(title="cloche", version=installed, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(routes())
    app.openapi = lambda: document(app, needs_tokens=service.doorkeeper.needs_tokens)  # type: ignore[method-assign]
    for kind in (ClocheError, HttpProblem, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(Frame, service=service)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    service: Service = request.app.state.service
    match error:
        case HTTPException():
            code = _HTTP_CODES.get(error.status_code, "bad-request")
            error = HttpProblem(error.status_code, code, f"{error.detail}.", hint="GET /docs lists what there is.")
        case RequestValidationError():
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][1:])
            error = InvalidSpec(f"{where} is not allowed: {first['msg']}.", hint="GET /docs lists what is.")
        case TooManyRuns():
            error = HttpProblem(
                429, error.code, error.message, hint=error.hint, retry_after_s=service.runs.retry_after_s
            )
        case _:
            pass
    request_id: str = request.state.request_id
    if not isinstance(error, ClocheError | HttpProblem):
        _log.error("a request failed in a way that it must not", request_id=request_id, exc_info=error)
    service.metrics.refused(problems.describe(error, request_id).code)
    return problems.answer(error, request_id, getattr(request.state, "run_id", None))


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
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        body = _Body(receive, self._service.uploads.max_body_bytes, headers.get(b"content-length", b""))
        try:
            await self._app(scope, body.receive, send_with_id)
        finally:
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


class _Body:
    """A request's body, read no further and waited for no longer than is allowed."""

    def __init__(self, receive: Receive, bound: int, announced: bytes) -> None:
        self._receive = receive
        self._bound = bound
        self._announced = int(announced) if announced.isdigit() and len(announced) < 20 else 0
        self._came = 0
        self._whole = False
        self._until = anyio.current_time() + BODY_S

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            HttpProblem: it is too large, or too slow.
        """
        if self._whole:
            return await self._receive()
        if self._announced > self._bound:
            raise self._too_large()
        message: Message | None = None
        with suppress(TimeoutError), anyio.fail_after(max(0.0, self._until - anyio.current_time())):
            message = await self._receive()
        if message is None:
            raise HttpProblem(408, "request-timeout", f"The request did not arrive within {BODY_S:g} s.")
        self._came += len(message.get("body", b""))
        if self._came > self._bound:
            raise self._too_large()
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    def _too_large(self) -> HttpProblem:
        return HttpProblem(
            413,
            "payload-too-large",
            f"The request is larger than {self._bound} bytes.",
            hint="Deliver less (only what the script reads), or have CLOCHE_MAX_WORKSPACE_BYTES raised.",
        )
