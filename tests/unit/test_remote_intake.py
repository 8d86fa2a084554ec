"""What a service tells of a run, and how much of it is kept here."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloche
from cloche.events import Artifact, Event, Finished, Outcome, Output, Started
from cloche.isolation import Isolation
from cloche.result import Fold
from cloche.runtime.remote import intake
from cloche.runtime.remote.intake import Bounds, Intake

STARTED = Started("r1", "local", Isolation.NAMESPACE, "docker", ("network",))
ENDED = Finished(Outcome.EXITED, exit_code=0)


def take(*events: Event, output: int = 1000, artifacts: int = 1000) -> list[Event]:
    room = Intake("r1", Bounds(output, artifacts))
    return [out for event in events for out in room.add(event)]


def test_as_they_come() -> None:
    """What fits is handed out as it comes, in its order; the mode is remote, and the rest the service's."""
    events: list[Event] = [
        STARTED,
        Output("stdout", 0, b"a"),
        Output("stderr", 0, b"b"),
        Output("stdout", 1, b"c"),
        Artifact("x/y", 1, b"z"),
        replace(ENDED, stdout_bytes=2, stderr_bytes=1, artifacts_skipped=3),
    ]
    assert take(*events) == [replace(STARTED, mode="remote"), *events[1:]]


def output_of(data: bytes, sizes: list[int]) -> list[Event]:
    events: list[Event] = []
    offset = 0
    for size in [*sizes, len(data)]:
        events.append(Output("stdout", offset, data[offset : offset + size]))
        offset = min(len(data), offset + size)
    return events


@given(st.binary(max_size=400), st.lists(st.integers(0, 50), max_size=20), st.integers(1, 300))
def test_a_smaller_cap(data: bytes, sizes: list[int], cap: int) -> None:
    """More than may be kept here is cut in its middle: head and tail stay, all bytes are counted, offsets stay true."""
    out = take(STARTED, *output_of(data, sizes), replace(ENDED, stdout_bytes=len(data)), output=cap)
    kept = [event for event in out if isinstance(event, Output)]
    total = sum(len(event.data) for event in kept)
    assert all(data[event.offset : event.offset + len(event.data)] == event.data for event in kept)
    assert all(a.offset + len(a.data) <= b.offset for a, b in itertools.pairwise(kept))
    last = out[-1]
    assert isinstance(last, Finished)
    assert last.stdout_bytes == len(data)
    assert last.stdout_truncated is (len(data) > cap)
    assert total == min(len(data), cap)
    if data and cap >= 4:
        assert kept[0].offset == 0
        assert kept[-1].offset + len(kept[-1].data) == len(data)


def test_what_the_service_cut() -> None:
    """What the service cut stays cut, and said so."""
    events: list[Event] = [STARTED, Output("stdout", 0, b"head"), Output("stdout", 96, b"tail")]
    out = take(*events, replace(ENDED, stdout_bytes=100, stdout_truncated=True))
    fold = Fold("r1")
    for event in out:
        fold.add(event)
    result = fold.result()
    assert (result.stdout, result.stdout_bytes, result.stdout_truncated) == ("headtail", 100, True)


def test_artifacts_over_the_bound() -> None:
    """All artifacts together have no more bytes than may be kept; what does not fit is cut or left out, and said so."""
    files = [Artifact(name, 40, b"x" * 40) for name in ("a", "b", "c", "d")]
    out = take(STARTED, *files, Artifact("e", 0, b""), ENDED, artifacts=100)
    assert out[1:] == [
        *files[:2],
        Artifact("c", 40, b"x" * 20, truncated=True),
        Artifact("e", 0, b""),
        replace(ENDED, artifacts_skipped=1),
    ]


def test_too_many_artifacts() -> None:
    """No more artifacts are kept than a box may have."""
    out = take(STARTED, *(Artifact(str(i), 0, b"") for i in range(intake.MAX_ARTIFACTS + 5)), ENDED)
    assert len(out) == intake.MAX_ARTIFACTS + 2
    assert out[-1] == replace(ENDED, artifacts_skipped=5)


def test_cut_short() -> None:
    """Of a run whose end does not come, what came is kept."""
    room = Intake("r1", Bounds(8, 100))
    for event in (STARTED, Output("stdout", 0, b"123456789abc"), Output("stderr", 5, b"x")):
        list(room.add(event))
    *rest, last = room.cut_short(Outcome.CANCELLED, 5.0)
    assert rest == [Output("stdout", 10, b"bc")]
    assert last == Finished(
        Outcome.CANCELLED,
        stdout_bytes=12,
        stderr_bytes=6,
        stdout_truncated=True,
        stderr_truncated=True,
        run_ms=5.0,
    )


@pytest.mark.parametrize(
    "events",
    [
        [replace(STARTED, run_id="r2")],
        [STARTED, STARTED],
        [Output("stdout", 0, b"x")],
        [Artifact("a", 1, b"x")],
        [STARTED, Output("stdout", 0, b"xx"), Output("stdout", 1, b"x")],
        [STARTED, Artifact("/etc/passwd", 1, b"x")],
        [STARTED, Artifact("../x", 1, b"x")],
        [STARTED, Artifact("a//b", 1, b"x")],
        [STARTED, Artifact("", 1, b"x")],
        [STARTED, Artifact("a\0b", 1, b"x")],
        [STARTED, Artifact("a", 1, b"xx")],
        [STARTED, Artifact("a", 2, b"x")],
        [STARTED, Output("stdout", 0, b"xx"), ENDED],
        [STARTED, Output("stdout", 0, b"x"), replace(ENDED, stdout_bytes=2)],
        [STARTED, replace(ENDED, stderr_bytes=1)],
        [STARTED, replace(ENDED, exit_code=None)],
        [STARTED, replace(ENDED, exit_code=256)],
        [STARTED, replace(ENDED, signal="SIGKILL")],
        [STARTED, Finished(Outcome.SIGNALED)],
        [STARTED, Finished(Outcome.SIGNALED, signal="SIGNONE")],
        [STARTED, Finished(Outcome.TIMED_OUT, exit_code=1)],
        [STARTED, replace(ENDED, run_ms=math.inf)],
        [STARTED, replace(ENDED, timings_ms={"start": math.inf})],
    ],
)
def test_what_no_service_tells(events: list[Event]) -> None:
    """What contradicts itself, or leaves the folder of artifacts, is an error and never a result."""
    with pytest.raises(cloche.ProtocolError, match="The service tells") as caught:
        take(*events)
    assert "CLOCHE_REMOTE_URL" in caught.value.hint


def test_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events without end are given up."""
    monkeypatch.setattr(intake, "MAX_EVENTS", 100)
    with pytest.raises(cloche.ProtocolError, match="more than 100 events"):
        take(STARTED, *[Output("stdout", 0, b"")] * 100)


def test_names_are_names() -> None:
    """A service that goes on about what it gives is not listened to for ever, and what is no name is not shown."""
    told = ("network", "x" * 65, "\x1b[31m", *("identity",) * 10_000)
    (started,) = take(replace(STARTED, fallback_from="\x1b[31mdocker", guarantees=told))
    assert isinstance(started, Started)
    assert started.guarantees == ("network", *("identity",) * 97)
    assert started.fallback_from is None


def test_cancelled_before_it_started() -> None:
    """A run can end before it started."""
    assert take(Finished(Outcome.CANCELLED)) == [Finished(Outcome.CANCELLED)]
