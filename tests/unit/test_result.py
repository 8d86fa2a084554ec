"""The result, its JSON form, and the fold that makes it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

import cloche
from cloche.events import Artifact, Event, Finished, Outcome, Output, Started, Usage
from cloche.isolation import Isolation
from cloche.result import Fold, Result, error_class

SNAPSHOT = Path(__file__).parent / "snapshots" / "result.schema.json"

EVENTS: list[Event] = [
    Started("r1", "kubernetes", Isolation.CONTAINER, "docker", ("network", "identity")),
    Output("stdout", 0, b"caf\xc3"),
    Output("stderr", 0, b"bad \xff"),
    Output("stdout", 4, b"\xa9\n"),
    Artifact("chart.png", 10, b"0123", truncated=True),
    Finished(
        Outcome.EXITED,
        exit_code=3,
        stdout_bytes=6,
        stderr_bytes=5,
        artifacts_skipped=2,
        run_ms=31.2,
        usage=Usage(22.0, 9_400_320, 1),
        timings_ms={"queued": 0.1, "run": 31.2, "total": 40.0},
    ),
]


def folded(events: list[Event]) -> Result:
    fold = Fold()
    for event in events:
        fold.add(event)
    return fold.result()


def without_prose(schema: Any) -> Any:
    """A schema as others rely on it: titles and descriptions are ours to change."""
    if isinstance(schema, dict):
        named = schema.get("properties", {})
        return {
            key: without_prose(value)
            for key, value in schema.items()
            if schema is named or key not in {"title", "description"}
        }
    return [without_prose(item) for item in schema] if isinstance(schema, list) else schema


def test_json_form() -> None:
    """The JSON form has exactly the promised fields with the values of the events."""
    assert folded(EVENTS).to_dict() == {
        "run_id": "r1",
        "outcome": "exited",
        "exit_code": 3,
        "signal": None,
        "stdout": "café\n",
        "stderr": "bad \N{REPLACEMENT CHARACTER}",
        "stdout_bytes": 6,
        "stderr_bytes": 5,
        "stdout_truncated": False,
        "stderr_truncated": False,
        "artifacts": [
            {"path": "chart.png", "size": 10, "sha256": hashlib.sha256(b"0123").hexdigest(), "truncated": True}
        ],
        "artifacts_skipped": 2,
        "mode": "kubernetes",
        "isolation": "container",
        "fallback_from": "docker",
        "guarantees": ["network", "identity"],
        "timings_ms": {
            "queued": 0.1,
            "prepare": None,
            "start": None,
            "run": 31.2,
            "collect": None,
            "cleanup": None,
            "total": 40.0,
        },
        "usage": {"cpu_ms": 22.0, "peak_memory_bytes": 9_400_320, "oom_kills": 1},
        "error": None,
    }


def test_schema_is_a_promise() -> None:
    """The schema of the JSON form is the one that was promised; CLOCHE_BUILD_SNAPSHOTS=1 writes it anew."""
    schema = without_prose(Result.model_json_schema(mode="serialization"))
    if os.environ.get("CLOCHE_BUILD_SNAPSHOTS"):
        SNAPSHOT.write_text(json.dumps(schema, indent=2) + "\n")
    assert schema == json.loads(SNAPSHOT.read_text())


def test_json_form_fits_the_schema() -> None:
    """What to_dict gives can be read back, and is the same again."""
    form = folded(EVENTS).to_dict()
    assert Result.model_validate_json(json.dumps(form), strict=True).to_dict() == form


def test_exact_bytes_and_artifacts_in_python() -> None:
    """In Python the exact bytes of the streams and the data of the artifacts are at hand."""
    result = folded(EVENTS)
    assert result.stdout_raw == b"caf\xc3\xa9\n"
    assert result.stderr_raw == b"bad \xff"
    assert result.artifact("chart.png").data == b"0123"
    with pytest.raises(KeyError, match=r"collected: chart\.png"):
        result.artifact("other.png")


def test_artifact_data_is_not_in_json() -> None:
    """A result that was read from JSON says that it has no data, rather than giving none."""
    result = Result.model_validate(folded(EVENTS).to_dict())
    with pytest.raises(LookupError, match=r"chart\.png"):
        _ = result.artifact("chart.png").data
    assert result.stderr_raw == "bad \N{REPLACEMENT CHARACTER}".encode()


def test_path_that_is_no_text() -> None:
    """A path that is not UTF-8 is exact in Python, and valid text in JSON."""
    result = folded([EVENTS[0], Artifact("a\udcff", 0, b""), Finished(Outcome.EXITED, exit_code=0)])
    assert result.artifacts[0].path == "a\udcff"
    assert result.to_dict()["artifacts"][0]["path"] == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("end", "ok"),
    [
        (Finished(Outcome.EXITED, exit_code=0), True),
        (Finished(Outcome.EXITED, exit_code=124), False),
        (Finished(Outcome.SIGNALED, signal="SIGKILL"), False),
        (Finished(Outcome.TIMED_OUT), False),
        (Finished(Outcome.OUT_OF_MEMORY), False),
        (Finished(Outcome.CANCELLED), False),
    ],
)
def test_ok(end: Finished, ok: bool) -> None:
    """Only a script that exited with 0 is ok."""
    result = folded([EVENTS[0], end])
    assert result.ok is ok
    assert result.outcome == end.outcome


@pytest.mark.parametrize(
    "fields",
    [
        {"outcome": "exited"},
        {"outcome": "exited", "exit_code": 0, "signal": "SIGKILL"},
        {"outcome": "signaled", "signal": "SIGKILL", "exit_code": 137},
        {"outcome": "timed_out", "exit_code": 124},
        {"outcome": "failed"},
        {"outcome": "exited", "exit_code": 256},
        {"outcome": "exploded"},
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any]) -> None:
    """An exit code goes with exited only, a signal with signaled only, an error with failed only."""
    with pytest.raises(ValueError, match=r"outcome|exit_code|signal|error"):
        Result(run_id="r1", **fields)


def test_failed() -> None:
    """A run that could not happen is a result with an error in JSON, and raises in Python, with the class of its code."""
    error = cloche.QueueTimeout("All places were taken.")
    result = Result.failed("r1", error, "local")
    form = result.to_dict()
    assert (form["outcome"], form["mode"], form["exit_code"]) == ("failed", "local", None)
    assert form["error"] == {
        "code": "queue-timeout",
        "message": "All places were taken.",
        "hint": cloche.QueueTimeout.default_hint,
        "retryable": True,
    }
    with pytest.raises(cloche.QueueTimeout, match="All places were taken") as caught:
        result.raise_for_error()
    assert caught.value.retryable


def test_failed_keeps_what_came() -> None:
    """A run that fails half-way keeps the output that came before."""
    fold = Fold()
    for event in EVENTS[:4]:
        fold.add(event)
    result = fold.failed(cloche.EngineLost("It went away."))
    assert (result.run_id, result.stdout, result.stdout_bytes) == ("r1", "café\n", 6)


def test_fold_knows_the_end() -> None:
    """There is no result before Finished, and nothing after it."""
    fold = Fold("r1", "local")
    with pytest.raises(ValueError, match="not finished"):
        fold.result()
    fold.add(Finished(Outcome.CANCELLED))
    with pytest.raises(ValueError, match="after Finished"):
        fold.add(Output("stdout", 0, b"late"))
    assert (fold.result().mode, fold.result().isolation) == ("local", None)


def test_every_code_has_its_class() -> None:
    """A code names one class; an unknown one the base."""
    assert error_class("script-not-found") is cloche.ScriptNotFound
    assert error_class("engine-lost") is cloche.EngineLost
    assert error_class("from-the-future") is cloche.ClocheError
