"""What answers mean: a service's, a proxy's, and those of what is no service at all."""

from __future__ import annotations

import json
from typing import Any

import pytest

import cloche
from cloche import errors
from cloche._kit.http import ConnectFailure, ConnectionLost, HttpFailure, TimedOut, TlsFailure, TooLarge
from cloche.isolation import Guarantee, Isolation, State
from cloche.result import error_class
from cloche.runtime.remote.answer import offer, problem, refusal, unreachable

WHERE = "https://cloche.example"
POSTURE: dict[str, Any] = {
    "mode": "kubernetes",
    "available": True,
    "isolation": "container",
    "reason": "",
    "hint": "",
    "engine": "Kubernetes v1.33",
    "guarantees": [{"name": "network", "state": "in-force", "evidence": "none", "advice": ""}],
    "fallback_from": None,
    "runs": True,
}


def test_offer() -> None:
    """The mode is remote, and the engine says which one is behind it; the isolation is the service's."""
    found = offer(POSTURE)
    assert (found.posture.mode, found.posture.available, found.posture.isolation) == ("remote", True, "container")
    assert found.posture.engine == "cloche service, kubernetes, Kubernetes v1.33"
    assert found.posture.guarantees == (Guarantee("network", State.IN_FORCE, "none"),)
    assert (found.runs, found.fallback_from) == (True, None)
    ill = offer({**POSTURE, "available": False, "reason": "no daemon", "hint": "Start it.", "fallback_from": "docker"})
    assert (ill.posture.reason, ill.posture.hint) == ("the service says: no daemon", "Start it.")
    assert ill.fallback_from == "docker"
    assert offer({**POSTURE, "runs": False}).runs is False
    assert offer({**POSTURE, "isolation": Isolation.KERNEL}).posture.isolation is Isolation.KERNEL


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        "ok",
        {},
        {**POSTURE, "mode": ""},
        {**POSTURE, "available": "yes"},
        {**POSTURE, "isolation": "total"},
        {**POSTURE, "guarantees": [{"name": "x", "state": "perhaps"}]},
        {"status": "ok"},
    ],
)
def test_no_offer(found: object) -> None:
    """What tells no isolation is no service."""
    with pytest.raises(ValueError, match=r"posture|is not a valid"):
        offer(found)


def said(code: str, **more: Any) -> dict[str, Any]:
    return {"code": code, "detail": "So it is.", "hint": "Do it.", "retryable": True, "status": 500, **more}


CODES = [
    cls.code
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, errors.ClocheError) and cls.code not in {"error", "engine-error"}
]


@pytest.mark.parametrize("code", CODES)
def test_problems_of_the_tree(code: str) -> None:
    """A problem with a code of cloche's is that error, in the service's words."""
    error = problem(said(code))
    assert type(error) is error_class(code)
    assert isinstance(error, cloche.ClocheError)
    assert (error.message, error.hint, error.retryable) == ("So it is.", "Do it.", True)
    plain = problem({"code": code, "detail": "So it is."})
    assert plain is not None
    assert (plain.hint, plain.retryable) == (plain.default_hint, plain.default_retryable)


@pytest.mark.parametrize(
    ("code", "error", "retryable"),
    [
        ("payload-too-large", cloche.WorkspaceTooLarge, False),
        ("run-exists", cloche.InvalidSpec, False),
        ("shutting-down", cloche.BackendUnavailable, True),
        ("internal-error", cloche.EngineLost, False),
        ("unsupported-media-type", cloche.ProtocolError, False),
    ],
)
def test_problems_of_the_service(code: str, error: type[cloche.ClocheError], retryable: bool) -> None:
    """What only a service says becomes the nearest error of the tree."""
    found = problem(said(code, retryable=False))
    assert type(found) is error
    assert found.retryable is retryable


@pytest.mark.parametrize(
    "found",
    [
        None,
        5,
        [],
        {},
        {"code": "x"},
        {"detail": "x"},
        said("error"),
        said("engine-error"),
        said("not-found"),
        said("?"),
    ],
)
def test_no_problem(found: object) -> None:
    """What is no problem, or one that nobody knows, is none."""
    assert problem(found) is None


@pytest.mark.parametrize(
    ("status", "body", "error", "words", "retryable"),
    [
        (401, json.dumps(said("unauthorized")), cloche.BackendUnavailable, "does not take the token: So it is", False),
        (401, "<html>Who?</html>", cloche.BackendUnavailable, "does not take the token", False),
        (403, "", cloche.BackendUnavailable, "does not take the token", False),
        (403, json.dumps(said("sandbox-disabled")), cloche.SandboxDisabled, "So it is", True),
        (302, "", cloche.BackendUnavailable, "sends us elsewhere, to 'http://evil.example'", False),
        (404, json.dumps({"detail": "Not Found"}), cloche.BackendUnavailable, "is no cloche service: Not Found", False),
        (405, "", cloche.BackendUnavailable, "is no cloche service", False),
        (413, "<html>413", cloche.WorkspaceTooLarge, "so large a request", False),
        (429, "", cloche.TooManyRuns, "takes no more runs", True),
        (500, "oops", cloche.EngineLost, "failed: status 500", False),
        (502, "<html>Bad Gateway</html>", cloche.BackendUnavailable, "is away", True),
        (503, "[" * 100_000, cloche.BackendUnavailable, "is away", True),
        (504, "\xff", cloche.BackendUnavailable, "is away", True),
        (101, "", cloche.BackendUnavailable, "is no cloche service", False),
        (204, "", cloche.BackendUnavailable, "is no cloche service", False),
    ],
)
def test_refusals(status: int, body: str, error: type[cloche.ClocheError], words: str, retryable: bool) -> None:
    """Whatever is answered, it becomes an error that says what to do."""
    found = refusal(status, {"location": "http://evil.example"}, body.encode("latin-1"), WHERE)
    assert type(found) is error
    assert words in found.message
    assert found.retryable is retryable
    assert found.hint


def test_words_are_shortened() -> None:
    """What a service says is one line, of a length that people read, and steers no terminal."""
    found = problem(said("engine-lost", detail="\x1b[31m" + "a\n" * 10_000))
    assert found is not None
    assert len(found.message) <= 2000
    assert found.message.isprintable()


@pytest.mark.parametrize(
    ("failure", "error", "retryable"),
    [
        (TlsFailure("self-signed certificate"), cloche.BackendUnavailable, False),
        (ConnectFailure("Connection refused"), cloche.BackendUnavailable, True),
        (ConnectionLost("reset"), cloche.EngineLost, True),
        (TimedOut("no answer in time"), cloche.EngineLost, True),
        (TooLarge("The answer"), cloche.BackendUnavailable, False),
    ],
)
def test_unreachable(failure: HttpFailure, error: type[cloche.ClocheError], retryable: bool) -> None:
    """A service that cannot be spoken to: whether a run may be repeated tells whether anything was sent."""
    found = unreachable(failure, WHERE)
    assert type(found) is error
    assert found.retryable is retryable
    assert WHERE in found.message
