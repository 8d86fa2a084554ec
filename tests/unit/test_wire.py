"""The JSON form of events: the same when read back, and refused when it is anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloche
from cloche.events import Artifact, Event, Finished, Outcome, Output, Started, Usage
from cloche.isolation import Isolation
from cloche.result import PHASES, Fold
from cloche.wire import event_from_dict, event_to_dict, result_from_dict, result_to_dict

COUNT = st.integers(0, 2**62)
AMOUNT = st.floats(0, 1e12)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PATH = st.binary(min_size=1).map(lambda raw: raw.decode("utf-8", "surrogateescape"))

EVENT = st.one_of(
    st.builds(Started, TEXT, TEXT, st.sampled_from(Isolation), st.none() | TEXT),
    st.builds(Output, st.sampled_from(["stdout", "stderr"]), COUNT, st.binary()),
    st.builds(Artifact, PATH, COUNT, st.binary(), st.booleans()),
    st.builds(
        Finished,
        st.sampled_from(Outcome),
        exit_code=st.none() | st.integers(0, 255),
        signal=st.none() | TEXT,
        stdout_bytes=COUNT,
        stderr_bytes=COUNT,
        stdout_truncated=st.booleans(),
        stderr_truncated=st.booleans(),
        artifacts_skipped=COUNT,
        run_ms=AMOUNT,
        usage=st.builds(Usage, st.none() | AMOUNT, st.none() | COUNT, COUNT),
        timings_ms=st.fixed_dictionaries({phase: st.none() | AMOUNT for phase in PHASES}),
    ),
)
STARTED = event_to_dict(Started("r1", "local", Isolation.NAMESPACE))
OUTPUT = event_to_dict(Output("stdout", 3, b"abc"))
FINISHED = event_to_dict(Finished(Outcome.EXITED, exit_code=0))


@given(EVENT)
def test_there_and_back(event: Event) -> None:
    """Every event survives JSON."""
    assert event_from_dict(json.loads(json.dumps(event_to_dict(event)))) == event


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "started",
        {},
        {"event": "exploded"},
        {**STARTED, "more": 1},
        {k: v for k, v in STARTED.items() if k != "mode"},
        {**STARTED, "isolation": "strong"},
        {**STARTED, "mode": None},
        {**OUTPUT, "stream": "stdlog"},
        {**OUTPUT, "offset": -1},
        {**OUTPUT, "offset": True},
        {**OUTPUT, "offset": 1.0},
        {**OUTPUT, "data": "not base64"},
        {**OUTPUT, "data": "é"},
        {**FINISHED, "outcome": "failed"},
        {**FINISHED, "exit_code": "0"},
        {**FINISHED, "run_ms": None},
        {**FINISHED, "run_ms": float("nan")},
        {**FINISHED, "stdout_truncated": 1},
        {**FINISHED, "usage": {"cpu_ms": 1.0}},
        {**FINISHED, "timings_ms": {**FINISHED["timings_ms"], "lunch": 1.0}},
    ],
)
def test_anything_else_is_refused(value: Any) -> None:
    """A field that is missing, unknown or of another type makes a protocol error."""
    with pytest.raises(cloche.ProtocolError):
        event_from_dict(value)


def test_result_there_and_back() -> None:
    """A result survives JSON, but for the data of its artifacts."""
    fold = Fold()
    for event in (
        Started("r1", "local", Isolation.NAMESPACE, guarantees=("network",)),
        Output("stdout", 0, b"hi"),
        Artifact("a/b.txt", 2, b"xy"),
        Finished(Outcome.SIGNALED, signal="SIGSEGV", stdout_bytes=2),
    ):
        fold.add(event)
    form = result_to_dict(fold.result())
    assert result_to_dict(result_from_dict(json.loads(json.dumps(form)))) == form
    failed = result_to_dict(cloche.Result.failed("r2", cloche.SandboxDisabled("Off.")))
    assert result_to_dict(result_from_dict(failed)) == failed


@pytest.mark.parametrize("change", [{"more": 1}, {"exit_code": None}, {"stdout_bytes": "2"}, {"usage": {}}])
def test_other_results_are_refused(change: dict[str, Any]) -> None:
    """A result with a field too many, of another type, or that contradicts itself makes a protocol error."""
    fold = Fold("r1", "local")
    fold.add(Finished(Outcome.EXITED, exit_code=0))
    with pytest.raises(cloche.ProtocolError):
        result_from_dict({**result_to_dict(fold.result()), **change})
    with pytest.raises(cloche.ProtocolError, match="lacks the field 'run_id'"):
        result_from_dict({})
