"""Errors as HTTP answers: ``application/problem+json`` (RFC 9457) with cloche's own code in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from cloche.errors import (
    BackendUnavailable,
    ClocheError,
    EngineLost,
    ImageUnavailable,
    InterpreterMissing,
    InvalidSettings,
    InvalidSpec,
    IsolationUnavailable,
    PermissionDenied,
    ProtocolError,
    QueueTimeout,
    QuotaExceeded,
    SandboxDisabled,
    ScriptNotFound,
    ScriptTooLarge,
    StartTimeout,
    TooManyRuns,
    Unschedulable,
    WorkspaceTooLarge,
)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
"""Told with what may pass by itself, where nothing better is known."""

STATUS: Mapping[type[ClocheError], int] = {
    InvalidSpec: 422,
    ScriptNotFound: 422,
    InterpreterMissing: 422,
    IsolationUnavailable: 422,
    ScriptTooLarge: 413,
    WorkspaceTooLarge: 413,
    SandboxDisabled: 403,
    TooManyRuns: 429,
    InvalidSettings: 500,
    ImageUnavailable: 502,
    PermissionDenied: 502,
    EngineLost: 502,
    ProtocolError: 502,
    BackendUnavailable: 503,
    QueueTimeout: 503,
    QuotaExceeded: 503,
    Unschedulable: 503,
    StartTimeout: 504,
}
"""Of every error that can be raised: 4xx where the caller can change something, 5xx where he cannot."""


class Problem(BaseModel):
    """What went wrong, in a form for programs (RFC 9457)."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    type: str = "about:blank"
    title: str
    """The status in words."""
    status: int = Field(ge=400, le=599)
    detail: str
    """What happened, for people."""
    code: str
    """Stable kebab-case name of the kind of failure."""
    hint: str
    """What to do."""
    retryable: bool
    """Whether the same request may succeed later, unchanged."""
    request_id: str
    run_id: str | None = None


class HttpProblem(Exception):
    """A failure that only HTTP has."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        hint: str = "",
        retry_after_s: int | None = None,
        run_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.run_id = run_id
        self.headers: Mapping[str, str] = {}

    def with_headers(self, **headers: str) -> Self:
        """This one, with more in its answer."""
        self.headers = headers
        return self


def status_of(error: ClocheError) -> int:
    """The status for an error: that of the nearest class that has one."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def describe(error: Exception, request_id: str, run_id: str | None = None) -> Problem:
    """The problem that an error is. What nobody raised on purpose is told without its words."""
    match error:
        case ClocheError():
            status, code, detail = status_of(error), error.code, error.message
            hint, retryable = error.hint, error.retryable
        case HttpProblem():
            status, code, detail, hint = error.status, error.code, error.detail, error.hint
            retryable, run_id = error.retry_after_s is not None, error.run_id or run_id
        case _:
            status, code, retryable = 500, "internal-error", False
            detail = "The service failed."
            hint = f"Look for the request {request_id} in the service's log, and report what it says."
    return Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        hint=hint,
        retryable=retryable,
        request_id=request_id,
        run_id=run_id,
    )


def answer(error: Exception, request_id: str, run_id: str | None = None) -> Response:
    """The HTTP answer for an error."""
    problem = describe(error, request_id, run_id)
    headers = dict(error.headers) if isinstance(error, HttpProblem) else {}
    if isinstance(error, HttpProblem) and error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    elif problem.retryable and problem.status in {429, 503}:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(dump(problem), problem.status, headers, MEDIA_TYPE)


def dump(problem: Problem) -> str:
    """Its JSON. ``run_id`` stands there only where there is a run."""
    fields: dict[str, Any] = problem.model_dump(exclude_none=True)
    return json.dumps(fields)
