"""Frames become events, and no more of them than the limits allow."""

from __future__ import annotations

from dataclasses import replace

import pytest

import cloche
from cloche._kit.signals import signal_name, signal_number
from cloche.events import Artifact, Event, Finished, Outcome, Output, Started
from cloche.isolation import Isolation
from cloche.runtime.assemble import Assembler
from cloche.runtime.deadline import Deadline
from cloche.spec import Limits
from cloche.supervisor.frames import VERSION, Data, End, Fail, File, FileData, Frame, Hello, Start
from cloche.testing.fake import end, ended_by

STARTED = Started("r1", "local", Isolation.NAMESPACE)
LIMITS = Limits(output_bytes=10, artifact_bytes=8, artifact_count=2)


def events(*frames: Frame, limits: Limits = LIMITS) -> list[Event]:
    assembler = Assembler(limits, STARTED)
    return [event for frame in (Hello(VERSION, 1, 0), Start(), *frames) for event in assembler.add(frame)]


def last(frame: End) -> Finished:
    finished = events(frame)[-1]
    assert isinstance(finished, Finished)
    return finished


def test_a_run() -> None:
    """Started, output as it came, artifacts whole, Finished."""
    assert events(
        Data("stdout", 0, b"out"),
        Data("stderr", 0, b"err"),
        File("a.txt", 5, truncated=False),
        FileData(b"abc"),
        FileData(b"de"),
        File("empty", 0, truncated=False),
        end(3, stdout=3, stderr=3),
    )[:-1] == [
        STARTED,
        Output("stdout", 0, b"out"),
        Output("stderr", 0, b"err"),
        Artifact("a.txt", 5, b"abcde"),
        Artifact("empty", 0, b""),
    ]


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (end(0), (Outcome.EXITED, 0, None)),
        (end(137), (Outcome.EXITED, 137, None)),
        (ended_by(9), (Outcome.SIGNALED, None, "SIGKILL")),
        (ended_by(11), (Outcome.SIGNALED, None, "SIGSEGV")),
        (ended_by(9, "timeout"), (Outcome.TIMED_OUT, None, None)),
        (replace(end(0), cause="timeout"), (Outcome.TIMED_OUT, None, None)),
        (ended_by(9, "memory"), (Outcome.OUT_OF_MEMORY, None, None)),
        (ended_by(15, "cancel"), (Outcome.CANCELLED, None, None)),
    ],
)
def test_outcomes(frame: End, expected: tuple[Outcome, int | None, str | None]) -> None:
    """What the supervisor ended is named by its cause; an exit code or a signal is told only when it was the script's own."""
    finished = last(frame)
    assert (finished.outcome, finished.exit_code, finished.signal) == expected


def test_numbers() -> None:
    """The last frame's numbers arrive, in the units of the events; what is 0 for want of a counter is not known."""
    frame = replace(end(), run_us=1500, cpu_us=2500, peak_memory_bytes=0, oom_kills=2, artifacts_skipped=3)
    finished = last(frame)
    assert (finished.run_ms, finished.usage.cpu_ms, finished.usage.peak_memory_bytes) == (1.5, 2.5, None)
    assert (finished.usage.oom_kills, finished.artifacts_skipped) == (2, 3)


def test_truncated_output() -> None:
    """Of a stream over its cap the head and the tail come, and the count is that of the whole."""
    frame = replace(end(stdout=1000), stdout_truncated=True)
    got = events(Data("stdout", 0, b"head"), Data("stdout", 996, b"tail"), frame)
    assert got[1:3] == [Output("stdout", 0, b"head"), Output("stdout", 996, b"tail")]
    assert isinstance(got[-1], Finished)
    assert (got[-1].stdout_bytes, got[-1].stdout_truncated) == (1000, True)


@pytest.mark.parametrize(
    "frames",
    [
        [Data("stdout", 0, b"x" * 11)],
        [Data("stdout", 0, b"x" * 6), Data("stdout", 6, b"x" * 5)],
        [Data("stderr", 0, b"x" * 10), Data("stderr", 99, b"x")],
        [File("a", 9, truncated=False), FileData(b"x" * 9)],
        [File("a", 8, truncated=False), FileData(b"x" * 8), File("b", 1, truncated=False), FileData(b"x")],
        [File("a", 1, truncated=False), FileData(b"xx")],
        [File(name, 0, truncated=False) for name in "abc"],
    ],
)
def test_more_than_asked_for(frames: list[Frame]) -> None:
    """A box that sends more than the limits allow is not believed."""
    with pytest.raises(cloche.ProtocolError, match="than"):
        events(*frames)


@pytest.mark.parametrize(
    "frames",
    [
        [Data("stdout", 0, b"abc"), end(stdout=4)],
        [Data("stdout", 0, b"abc"), end(stdout=2)],
        [Data("stdout", 2, b"abc"), end(stdout=5)],
        [end(stderr=1)],
        [Data("stdout", 90, b"abc"), replace(end(stdout=92), stdout_truncated=True)],
    ],
)
def test_less_than_said(frames: list[Frame]) -> None:
    """Output that is said to be whole, and is not, is an error: no result is made of it."""
    with pytest.raises(cloche.ProtocolError, match="came"):
        events(*frames)


def test_short_artifact() -> None:
    """An artifact with fewer bytes than the file has is truncated, whatever the box says."""
    got = events(File("a", 5, truncated=False), FileData(b"abc"), end())
    assert got[1] == Artifact("a", 5, b"abc", truncated=True)


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (Fail("interpreter-missing", "no python3 here"), cloche.InterpreterMissing, "no python3 here."),
        (Fail("invalid-spec", "argument list too long."), cloche.InvalidSpec, "argument list too long."),
        (Fail("from-the-future", "x"), cloche.ProtocolError, "from-the-future: x"),
        (Fail("error", "x"), cloche.ProtocolError, "error: x"),
    ],
)
def test_fail(frame: Fail, error: type[cloche.ClocheError], message: str) -> None:
    """A fail frame raises the error with its code."""
    with pytest.raises(error, match=message) as caught:
        events(frame)
    assert type(caught.value) is error


def test_cut_short() -> None:
    """A run without a last frame ends with what came: output, an artifact's beginning, and the counts so far."""
    assembler = Assembler(LIMITS, STARTED)
    for frame in (
        Start(),
        Data("stdout", 0, b"ab"),
        Data("stderr", 9, b"z"),
        File("a", 5, truncated=False),
        FileData(b"x"),
    ):
        list(assembler.add(frame))
    artifact, finished = assembler.cut_short(Outcome.TIMED_OUT, 12.5)
    assert artifact == Artifact("a", 5, b"x", truncated=True)
    assert finished == Finished(Outcome.TIMED_OUT, stdout_bytes=2, stderr_bytes=10, stderr_truncated=True, run_ms=12.5)


def test_deadline() -> None:
    """One clock: the start's bound, then the script's with its grace and a second, and less once it is to stop."""
    limits = Limits(timeout_s=5.0, grace_s=0.5)
    deadline = Deadline(limits, 120.0, now=1000.0)
    assert (deadline.at, deadline.started_at) == (1120.0, None)
    deadline.start(1010.0)
    assert (deadline.at, deadline.started_at) == (1016.5, 1010.0)
    deadline.stop(1011.0)
    assert deadline.at == 1012.5
    deadline.start(1012.0)
    assert deadline.at == 1012.5, "a start that comes after the stop gives no more time"
    late = Deadline(limits, 120.0, now=0.0)
    late.start(0.0)
    late.stop(6.0)
    assert late.at == 6.5, "a stop gives no more time than there was"


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1, "SIGHUP"),
        (7, "SIGBUS"),
        (9, "SIGKILL"),
        (31, "SIGSYS"),
        (34, "SIGRTMIN"),
        (64, "SIGRTMIN+30"),
        (33, "SIG33"),
    ],
)
def test_signal_names(number: int, name: str) -> None:
    """Signals have Linux's names, both ways."""
    assert signal_name(number) == name
    assert signal_number(name) == number


def test_every_signal_has_a_name() -> None:
    """Each number that a frame can hold has a name of its own that leads back to it."""
    assert [signal_number(signal_name(n)) for n in range(1, 65)] == list(range(1, 65))
    with pytest.raises(ValueError, match="not the name"):
        signal_number("KILL")
