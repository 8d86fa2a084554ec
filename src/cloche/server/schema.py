"""The interface, described: OpenAPI for programs, a page for people."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cloche.result import Result
from cloche.server import problems, stream
from cloche.server.problems import Problem
from cloche.spec import Spec

Json: TypeAlias = dict[str, Any]
_ABOUT = """\
Runs untrusted scripts in isolation. A run is described by a spec; it ends with a result, whatever the script did. What could not
be run, or could not be asked, is answered with a problem (RFC 9457) that has a stable `code` and a `hint`."""
_TAKEN_OUT = frozenset({"workspace"})
"""Fields of a spec that are paths of the machine that runs it."""
_STATE: Json = {
    "type": "object",
    "required": ["run_id", "state", "result"],
    "properties": {
        "run_id": {"type": "string"},
        "state": {"enum": ["running", "finished"]},
        "result": {"anyOf": [{"$ref": "#/components/schemas/Result"}, {"type": "null"}]},
    },
}
_STATUS: Json = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}
_REFUSALS = {
    400: "The request says in two ways how long it is.",
    401: "No token that is known.",
    403: "Script execution is switched off.",
    404: "There is no such thing.",
    408: "The request did not arrive in time.",
    409: "The run id is in use.",
    413: "Script, workspace or request is too large.",
    415: "The request's body is of no kind that is known.",
    422: "The request describes no run that can be.",
    429: "Too many runs wait, or the caller has too many. Retry-After says when to ask again.",
    500: "The service failed.",
    502: "The engine failed.",
    503: "The engine is away or has no room, or the service is about to end.",
    504: "The box did not start in time.",
}


def _refusals(*statuses: int) -> Json:
    content = {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {str(status): {"description": _REFUSALS[status], "content": content} for status in (*statuses, 500)}


def _answer(status: int, about: str, content: Json) -> Json:
    return {str(status): {"description": about, "content": content}}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


_SPEC: Json = {"$ref": "#/components/schemas/Spec"}
_BINARY: Json = {"type": "string", "contentMediaType": "application/octet-stream"}
START: Json = {
    "summary": "Run a script",
    "responses": {
        **_answer(
            200,
            "How it ended; or its events as they happen: `started`, `output`, `artifact`, `finished`; `error` with a problem.",
            {**_json({"$ref": "#/components/schemas/Result"}), stream.MEDIA_TYPE: {"schema": {"type": "string"}}},
        ),
        **_answer(202, "It runs; asked for with `Prefer: respond-async`.", _json(_STATE)),
        **_refusals(400, 401, 403, 408, 409, 413, 415, 422, 429, 502, 503, 504),
    },
    "openapi_extra": {
        "parameters": [
            {
                "name": "Prefer",
                "in": "header",
                "description": "`respond-async`: answer at once, and let the run go on without its caller.",
                "schema": {"type": "string"},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _SPEC},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["spec"],
                        "additionalProperties": False,
                        "properties": {
                            "spec": {**_SPEC, "description": "With a workspace, script is a path inside it."},
                            "workspace": {**_BINARY, "description": "A tar (plain, gzip, bzip2, xz) or zip file."},
                            "stdin": _BINARY,
                        },
                    },
                    "encoding": {"spec": {"contentType": "application/json"}},
                },
            },
        },
    },
}
GET: Json = {
    "summary": "How a run stands",
    "responses": {
        **_answer(200, "Its state, and its result when it has ended.", _json(_STATE)),
        **_refusals(401, 404, 422),
    },
}
END: Json = {
    "summary": "End a run, or forget one that ended",
    "responses": {
        **_answer(202, "It was asked to end.", _json(_STATE)),
        "204": {"description": "It had ended, and is forgotten."},
        **_refusals(401, 404, 422),
    },
}
ARTIFACT: Json = {
    "summary": "Download an artifact",
    "responses": {
        **_answer(200, "Its bytes.", {"application/octet-stream": {"schema": _BINARY}}),
        **_refusals(401, 404, 422),
    },
}
POSTURE: Json = {
    "summary": "What isolation is in force",
    "responses": {
        **_answer(200, "Guarantee by guarantee.", _json({"$ref": "#/components/schemas/Posture"})),
        **_refusals(401, 422, 502, 503, 504),
    },
}
HEALTH: Json = {
    "summary": "Whether the process lives",
    "responses": {**_answer(200, "It does.", _json(_STATUS)), **_refusals()},
}
READINESS: Json = {
    "summary": "Whether runs are taken",
    "responses": {**_answer(200, "They are.", _json(_STATUS)), **_refusals(503)},
}
METRICS: Json = {
    "summary": "Counters for Prometheus",
    "responses": {
        **_answer(200, "Prometheus' text format.", {"text/plain": {"schema": {"type": "string"}}}),
        **_refusals(),
    },
}
_POSTURE: Json = {
    "type": "object",
    "required": ["mode", "available", "isolation", "reason", "hint", "engine", "guarantees", "fallback_from", "runs"],
    "properties": {
        "mode": {"type": "string"},
        "available": {"type": "boolean"},
        "isolation": {"enum": ["none", "process", "namespace", "container", "kernel"]},
        "reason": {"type": "string"},
        "hint": {"type": "string"},
        "engine": {"type": "string"},
        "guarantees": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "state", "evidence", "advice"],
                "properties": {
                    "name": {"type": "string"},
                    "state": {"enum": ["in-force", "not-in-force", "unknown"]},
                    "evidence": {"type": "string"},
                    "advice": {"type": "string"},
                    "needed": {"type": "boolean", "description": "Whether a run counts on it."},
                },
            },
        },
        "proved": {"type": "boolean", "description": "Whether a script looked from inside of a box."},
        "fallback_from": {"type": ["string", "null"]},
        "runs": {"type": "boolean", "description": "False: script execution is switched off."},
    },
}


def document(app: FastAPI, *, needs_tokens: bool) -> Json:
    """The OpenAPI document."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=_ABOUT, routes=app.routes)
        schemas: Json = {"Posture": _POSTURE}
        for name, model, mode in (
            ("Spec", Spec, "validation"),
            ("Result", Result, "serialization"),
            ("Problem", Problem, "serialization"),
        ):
            schema = model.model_json_schema(mode=mode, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            schemas |= schema.pop("$defs", {})
            schemas[name] = schema
        for field in _TAKEN_OUT:
            del schemas["Spec"]["properties"][field]
        made["components"] = {"schemas": schemas}
        for operations in made["paths"].values():
            for operation in operations.values():
                # FastAPI adds a form of its own for what it refuses; ours is a problem like all others.
                operation["responses"] = {
                    status: answer
                    for status, answer in operation["responses"].items()
                    if "HTTPValidationError" not in json.dumps(answer)
                }
        if needs_tokens:
            made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for path, operations in made["paths"].items():
                for operation in operations.values():
                    if path.startswith("/v1/"):
                        operation["security"] = [{"token": []}]
        app.openapi_schema = made
    return app.openapi_schema


def page(document: Mapping[str, Any]) -> str:
    """The document as a page."""
    rows = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            answers = "".join(
                f"<dt>{status}</dt><dd>{_text(answer['description'])}</dd>"
                for status, answer in operation["responses"].items()
            )
            about = _text(operation.get("description", ""))
            rows.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{about}</p><dl>{answers}</dl>")
    fields = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{_text(_field(field))}</dd>"
        for name, field in document["components"]["schemas"]["Spec"]["properties"].items()
    )
    title, about = html.escape(document["info"]["title"]), _text(document["info"]["description"])
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title} {html.escape(document['info']['version'])}</h1>"
        f"<p>{about}</p><p>For programs: <a href=openapi.json>openapi.json</a></p>"
        f"{''.join(rows)}<h2>The fields of a spec</h2><dl>{fields}</dl>"
    )


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "code{font:0.95em ui-monospace,monospace;background:#f2f2f2;padding:0.1em 0.3em;border-radius:3px}"
    "h2{font-size:1.1rem;margin:2rem 0 0.5rem}dl{display:grid;grid-template-columns:max-content 1fr;gap:0.2rem 1rem}"
    "dt{font-family:ui-monospace,monospace}dd{margin:0}"
)


def _text(text: str) -> str:
    """Text with its `code` marked."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _field(field: Mapping[str, Any]) -> str:
    kinds = [kind.get("type", kind.get("$ref", "").rpartition("/")[2]) for kind in field.get("anyOf", [field])]
    return " or ".join(kind for kind in kinds if kind and kind != "null")
