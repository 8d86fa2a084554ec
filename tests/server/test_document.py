"""The service is what its own description says: fuzzed against it, with and without a token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from tests.server.serving import ALICE, Served, serving, spec

from cloche.server.problems import Problem

EXAMPLES = 15
DIALECT = "https://json-schema.org/draft/2020-12/schema"
OURS = {500}
"""What no request may lead to."""


@pytest.fixture(scope="module")
def fuzzed(_nothing_left: None, _local: None) -> Iterator[Served]:
    """A service that gives no run more than a second."""
    with serving(
        CLOCHE_SERVE_TOKENS=f"alice:{ALICE}",
        CLOCHE_TIMEOUT="1",
        CLOCHE_MAX_WORKSPACE_BYTES="64Ki",
        CLOCHE_MAX_SCRIPT_BYTES="4Ki",
        CLOCHE_MAX_CONCURRENT="4",
    ) as found:
        yield found


@pytest.fixture(scope="module")
def document(fuzzed: Served) -> dict[str, Any]:
    with fuzzed.client() as nobody:
        found: dict[str, Any] = nobody.get("/openapi.json").json()
    return found


def test_every_route_is_described(document: dict[str, Any]) -> None:
    """The description has every path of the interface with its methods, and says which need a token."""
    described = {
        f"{method.upper()} {path}": "security" in operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert described == {
        "POST /v1/runs": True,
        "GET /v1/runs/{run_id}": True,
        "DELETE /v1/runs/{run_id}": True,
        "GET /v1/runs/{run_id}/artifacts/{path}": True,
        "GET /v1/posture": True,
        "GET /healthz": False,
        "GET /readyz": False,
        "GET /metrics": False,
    }


def test_document_is_one(document: dict[str, Any]) -> None:
    """Each schema in it is a schema, each reference leads somewhere, no path of the machine's is in it."""
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema_rs.meta.validate({"$schema": DIALECT, **schema})

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    assert {reference.rpartition("/")[2] for reference in references(document)} <= schemas.keys()
    assert all(reference.startswith("#/components/schemas/") for reference in references(document))
    assert "workspace" not in schemas["Spec"]["properties"]


def test_problem_is_described(document: dict[str, Any]) -> None:
    """A problem's description has its fields, and each operation tells of its own."""
    assert document["components"]["schemas"]["Problem"]["properties"].keys() == Problem.model_fields.keys()
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "500" in operation["responses"]


@pytest.mark.parametrize("token", [ALICE, None], ids=["token", "no token"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/runs"),
        ("GET", "/v1/runs/{run_id}"),
        ("DELETE", "/v1/runs/{run_id}"),
        ("GET", "/v1/runs/{run_id}/artifacts/{path}"),
        ("GET", "/v1/posture"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
    ],
)
def test_fuzz(fuzzed: Served, document: dict[str, Any], method: str, path: str, token: str | None) -> None:
    """Whatever is sent, what comes back is described: its status, its type and its form; and nothing is our failure."""
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[path][method]
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    from schemathesis.specs.openapi import checks

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def one(case: Any) -> None:
        case.headers = {name: value for name, value in (case.headers or {}).items() if name.lower() != "authorization"}
        answer = case.call(base_url=fuzzed.url, headers=headers, timeout=30)
        assert answer.status_code not in OURS
        if token is None and path.startswith("/v1/"):
            assert answer.status_code == 401
        case.validate_response(
            answer,
            checks=[
                schemathesis.checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
                checks.response_headers_conformance,
            ],
        )

    one()


def test_answers_conform(fuzzed: Served, document: dict[str, Any]) -> None:
    """Results, states, problems and the posture have the form that the description gives them."""
    schemas = document["components"]["schemas"]

    def conforms(value: object, name: str) -> None:
        schema = {"$schema": DIALECT, "$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        jsonschema_rs.validate(schema, value)

    with fuzzed.client(ALICE) as alice:
        conforms(alice.post("/v1/runs?run_id=run-1", json=spec("echo x >/output/f; exit 3")).json(), "Result")
        conforms(alice.post("/v1/runs", json=spec("kill -9 $$")).json(), "Result")
        conforms(alice.post("/v1/runs", json={}).json(), "Problem")
        conforms(alice.get("/v1/posture").json(), "Posture")
        state = alice.get("/v1/runs/run-1").json()
    assert state["state"] == "finished"
    conforms(state["result"], "Result")
