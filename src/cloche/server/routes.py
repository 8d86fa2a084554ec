"""The routes. Each parses, calls the runtime, and returns."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any
from urllib.parse import quote, unquote_to_bytes

import anyio
from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.responses import Response

from cloche.errors import BackendUnavailable, ClocheError
from cloche.isolation import Posture
from cloche.result import ArtifactInfo
from cloche.runtime import Sandbox
from cloche.runtime.choose import check_floor
from cloche.runtime.names import RUN_ID
from cloche.server import metrics as measured
from cloche.server import schema, stream
from cloche.server.auth import Caller, Doorkeeper
from cloche.server.metrics import Metrics
from cloche.server.problems import HttpProblem
from cloche.server.runs import Runs, ServiceRun
from cloche.server.uploads import Uploads

BODY_S = 300.0
"""For a request to arrive."""
PROBE_S = 10.0
"""How old an answer on readiness may be."""
PROBE_WITHIN_S = 5.0
"""How long an engine may take to answer whether it is there."""


class _AnyPath(PathConvertor):
    """A path with whatever is in it. Starlette's own ends at a line feed, which a file's name may have."""

    regex = "(?s:.*)"


register_url_convertor("any", _AnyPath())


@dataclass(slots=True)
class Service:
    """What all requests share."""

    sandbox: Sandbox
    runs: Runs
    uploads: Uploads
    doorkeeper: Doorkeeper
    metrics: Metrics
    readiness: Readiness
    body_s: float = BODY_S


class Readiness:
    """Whether the engine can be reached. Asked for at most once in a while, however many ask here."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._lock = anyio.Lock()
        self._posture: Posture | None = None
        self._asked_at = 0.0

    async def check(self) -> None:
        """Raises: BackendUnavailable, IsolationUnavailable: a run would be refused."""
        if not self._sandbox.runs:
            return  # switched off on purpose, and as it should be
        async with self._lock:
            if self._posture is None or anyio.current_time() - self._asked_at >= PROBE_S:
                self._posture = await self._probe()
                self._asked_at = anyio.current_time()
            posture = self._posture
        if not posture.available:
            raise BackendUnavailable(posture.reason, hint=posture.hint or None)
        check_floor(posture, self._sandbox.settings.min_isolation)

    async def _probe(self) -> Posture:
        with anyio.move_on_after(PROBE_WITHIN_S):
            return await self._sandbox.probe()
        now = await self._sandbox.posture()
        return Posture(
            now.mode,
            available=False,
            isolation=now.isolation,
            reason=f"The engine did not answer within {PROBE_WITHIN_S:g} s.",
        )


# Both are coroutines though they wait for nothing: FastAPI would run plain functions in threads, which uploads may have taken.
async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Shared = Annotated[Service, Depends(_service)]


async def _caller(request: Request, service: Shared) -> Caller:
    """Raises: HttpProblem: nobody that is known."""
    caller = service.doorkeeper.who(request.headers.get("authorization"))
    if caller is None:
        raise HttpProblem(
            401,
            "unauthorized",
            "This needs a token of the service's.",
            hint="Send it as `Authorization: Bearer TOKEN`; it is in what CLOCHE_SERVE_TOKENS or CLOCHE_SERVE_TOKENS_FILE holds.",
        )
    request.state.caller = caller.name
    return caller


Known = Annotated[Caller, Depends(_caller)]
RunId = Annotated[str, Path(description="The run's id.", max_length=64)]


def routes() -> APIRouter:
    """All of them."""
    router = APIRouter(default_response_class=JSONResponse)
    add = router.add_api_route
    add("/v1/runs", start_run, methods=["POST"], **schema.START)
    add("/v1/runs/{run_id}", get_run, methods=["GET"], **schema.GET)
    add("/v1/runs/{run_id}", end_run, methods=["DELETE"], **schema.END)
    add("/v1/runs/{run_id}/artifacts/{path:any}", get_artifact, methods=["GET"], **schema.ARTIFACT)
    add("/v1/posture", get_posture, methods=["GET"], **schema.POSTURE)
    add("/healthz", get_health, methods=["GET"], **schema.HEALTH)
    add("/readyz", get_readiness, methods=["GET"], **schema.READINESS)
    add("/metrics", get_metrics, methods=["GET"], **schema.METRICS)
    add("/openapi.json", get_document, methods=["GET"], include_in_schema=False)
    add("/docs", get_docs, methods=["GET"], include_in_schema=False)
    return router


async def start_run(
    request: Request,
    service: Shared,
    caller: Known,
    run_id: Annotated[
        str | None, Query(pattern=f"^{RUN_ID}$", description="An id of the caller's own for the run.")
    ] = None,
) -> Response:
    """Run a script. Answers with the result when it has ended; with its events as they happen, when text/event-stream is
    accepted; at once, with `Prefer: respond-async`. A client that goes away cancels its run, but for the last.
    """
    live = stream.MEDIA_TYPE in request.headers.get("accept", "")
    detached = "respond-async" in request.headers.get("prefer", "") and not live
    with service.runs.place(caller):
        job = await service.uploads.read(request)
        try:
            run = service.runs.start(job, caller, run_id)
        except BaseException:
            await job.aclose()
            raise
    request.state.run_id = run.run_id
    if live:
        events = service.runs.listen(run)
        return stream.EventStream(run, events, request.state.request_id, lambda: service.runs.leave(run))
    if detached:
        headers = {"Location": f"/v1/runs/{run.run_id}", "Preference-Applied": "respond-async"}
        return JSONResponse(_state(run), 202, headers)
    async with _while_listening(request, service.runs, run):
        await run.over.wait()
    if run.error is not None:
        raise run.error
    assert run.result is not None
    return JSONResponse(run.result.to_dict(), headers={"Cloche-Run-Id": run.run_id})


async def get_run(service: Shared, caller: Known, run_id: RunId) -> Response:
    """How a run stands, and its result when it has ended."""
    return JSONResponse(_state(service.runs.find(run_id, caller)))


async def end_run(
    service: Shared,
    caller: Known,
    run_id: RunId,
    kill: Annotated[bool, Query(description="Kill its box at once; what it left is not collected.")] = False,  # noqa: FBT002
) -> Response:
    """End a run: it finishes as cancelled. One that has ended is forgotten."""
    run = service.runs.find(run_id, caller)
    if run.over.is_set():
        service.runs.forget(run)
        return Response(status_code=204)
    if kill:
        service.runs.kill(run)
    else:
        await service.runs.cancel(run)
    return JSONResponse(_state(run), 202)


async def get_artifact(
    request: Request,
    service: Shared,
    caller: Known,
    run_id: RunId,
    path: Annotated[str, Path(description="As the result has it; or its bytes, percent-encoded.")],
) -> Response:
    """A file that the script left in /output."""
    run = service.runs.find(run_id, caller)
    found = _find(() if run.result is None else run.result.artifacts, path, request.scope["raw_path"])
    if found is None:
        raise HttpProblem(404, "not-found", f"The run {run.run_id} has no artifact {path[:200]!r}.", run_id=run.run_id)
    name = quote(_text(found.path).rpartition("/")[2], safe="")
    headers = {
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
        "Cloche-Truncated": "true" if found.truncated else "false",
        "ETag": f'"{found.sha256}"',
    }
    return Response(found.data, headers=headers, media_type="application/octet-stream")


async def get_posture(
    service: Shared,
    caller: Known,  # noqa: ARG001 (it has to be known)
    prove: Annotated[bool, Query(description="Look from inside of a box first; that takes seconds.")] = False,  # noqa: FBT002
) -> Response:
    """What isolation is in force, guarantee by guarantee; what a proof finds holds for all runs that begin after it."""
    sandbox = service.sandbox
    if prove:
        service.runs.check_open()
    posture = asdict(await sandbox.posture(prove=prove))
    return JSONResponse({**posture, "fallback_from": sandbox.fallback_from, "runs": sandbox.runs})


async def get_health() -> Response:
    """Whether the process lives."""
    return JSONResponse({"status": "ok"})


async def get_readiness(service: Shared) -> Response:
    """Whether runs are taken: the engine can be reached, and the isolation floor is met."""
    service.runs.check_open()
    try:
        await service.readiness.check()
    except ClocheError as exc:
        raise HttpProblem(503, exc.code, exc.message, hint=exc.hint, retry_after_s=int(PROBE_S)) from None
    return JSONResponse({"status": "ready"})


async def get_metrics(service: Shared) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), media_type=measured.MEDIA_TYPE)


async def get_document(request: Request) -> Response:
    """This interface, described."""
    return JSONResponse(request.app.openapi())


async def get_docs(request: Request) -> Response:
    """The same for people: one page that needs nothing from anywhere."""
    return HTMLResponse(
        schema.page(request.app.openapi()),
        headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"},
    )


@asynccontextmanager
async def _while_listening(request: Request, runs: Runs, run: ServiceRun) -> AsyncIterator[None]:
    """Kill the run when the client goes."""

    async def watch() -> None:
        await stream.gone(request.receive)
        runs.kill(run)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        try:
            yield
        except BaseException:  # the request was cancelled
            runs.kill(run)
            raise
        tasks.cancel_scope.cancel()


def _state(run: ServiceRun) -> dict[str, Any]:
    result = run.result if run.over.is_set() else None
    return {
        "run_id": run.run_id,
        "state": "finished" if run.over.is_set() else "running",
        "result": None if result is None else result.to_dict(),
    }


def _text(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _find(artifacts: Sequence[ArtifactInfo], asked: str, raw: bytes) -> ArtifactInfo | None:
    """The artifact of this path, byte for byte; if there is none, the first whose JSON form has it."""
    exact = os.fsdecode(unquote_to_bytes(raw.partition(b"/artifacts/")[2]))
    for wanted, form in ((exact, str), (asked, _text)):
        for artifact in artifacts:
            if form(artifact.path) == wanted:
                return artifact
    return None
