"""Every end has its exit status, and what cloche says of it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest

import cloche
from cloche.cli import exits, render
from cloche.events import Artifact, Event, Finished, Outcome, Started, Usage
from cloche.isolation import Guarantee, Isolation, Posture, State
from cloche.result import Fold, Result
from cloche.spec import Limits

STARTED = Started("r1", "local", Isolation.NAMESPACE)


def result(end: Finished, *before: Event) -> Result:
    fold = Fold()
    for event in (STARTED, *before, end):
        fold.add(event)
    return fold.result()


def leaves(of: type[cloche.ClocheError]) -> Iterator[type[cloche.ClocheError]]:
    """Every class of the tree that is raised itself."""
    for cls in of.__subclasses__():
        if cls.__module__ == "cloche.errors":
            yield from leaves(cls)
            if cls is not cloche.EngineError:
                yield cls


@pytest.mark.parametrize("cls", sorted(leaves(cloche.ClocheError), key=str))
def test_every_error_has_a_status(cls: type[cloche.ClocheError]) -> None:
    """Every error is mapped, and is cloche's own failure; it has a code of its own and a hint."""
    assert exits.OF_ERROR[cls] == exits.status_of_error(cls("x")) == 125
    assert [other for other in leaves(cloche.ClocheError) if other.code == cls.code] == [cls]
    assert cls("x").hint


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (Finished(Outcome.EXITED, exit_code=0), 0),
        (Finished(Outcome.EXITED, exit_code=3), 3),
        (Finished(Outcome.EXITED, exit_code=255), 255),
        (Finished(Outcome.SIGNALED, signal="SIGKILL"), 137),
        (Finished(Outcome.SIGNALED, signal="SIGSEGV"), 139),
        (Finished(Outcome.SIGNALED, signal="SIGRTMIN+1"), 163),
        (Finished(Outcome.TIMED_OUT), 124),
        (Finished(Outcome.OUT_OF_MEMORY), 137),
        (Finished(Outcome.CANCELLED), 130),
    ],
)
def test_every_outcome_has_a_status(end: Finished, status: int) -> None:
    """The script's exit status is passed on; what else ended it has the status that shells give it."""
    assert exits.status_of_result(result(end)) == status


def test_failed_has_a_status() -> None:
    """A failed result is cloche's own failure."""
    assert exits.status_of_result(Result.failed("r1", cloche.SandboxDisabled("x"))) == 125


def test_no_stderr(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a stderr cloche says nothing: its words never get into stdout."""
    monkeypatch.setattr(sys, "stderr", None)
    render.say("x")
    assert capfd.readouterr().out == ""


def test_every_outcome_is_tested() -> None:
    """The table above knows every outcome."""
    assert len(Outcome) == 5


@pytest.mark.parametrize(
    ("end", "note"),
    [
        (Finished(Outcome.TIMED_OUT), "timed out: the script was ended after 5 s"),
        (Finished(Outcome.OUT_OF_MEMORY), "out of memory: the script needed more than 256 MiB"),
        (Finished(Outcome.CANCELLED), "cancelled"),
        (Finished(Outcome.SIGNALED, signal="SIGSEGV"), "ended by SIGSEGV"),
        (Finished(Outcome.EXITED, exit_code=0, usage=Usage(oom_kills=2)), "2 of the script's processes"),
        (Finished(Outcome.EXITED, exit_code=0, stdout_bytes=2**30, stdout_truncated=True), "stdout was cut"),
        (Finished(Outcome.EXITED, exit_code=0, stderr_bytes=2**30, stderr_truncated=True), "the script wrote 1.0 GiB"),
        (Finished(Outcome.EXITED, exit_code=0, artifacts_skipped=3), "3 entries of /output"),
    ],
)
def test_notes(end: Finished, note: str) -> None:
    """What cannot be seen from output and status is said in a note."""
    (only,) = render.notes(result(end), Limits(timeout_s=5))
    assert note in only


def test_no_note_when_all_went_well() -> None:
    """A script that exits, with whatever status, needs no note."""
    assert not list(render.notes(result(Finished(Outcome.EXITED, exit_code=1)), Limits()))


def test_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that cloche says can steer a terminal, whatever names it repeats."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    render.say_error(cloche.ScriptNotFound("There is no \x1b[31m\x07\r\n\udcff\x9b script.", hint="Ünï."))
    text = stderr.getvalue()
    assert text == (
        "cloche: There is no \\x1b[31m\\x07\\r\\n\\udcff\\x9b script. [script-not-found]\ncloche: hint: Ünï.\n"
    )


def test_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line for people has outcome, time, artifacts and the isolation in force; names cannot steer the terminal."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    end = Finished(Outcome.EXITED, exit_code=3, timings_ms={"total": 1234.0})
    render.summary(result(end, Artifact("a\x1b[31m", 1, b"x"), Artifact("b", 1, b"x")), "out")
    text = stderr.getvalue()
    for words in ("exited with 3", "1.23 s", "2 artifacts", "in out", "local", "isolation namespace"):
        assert words in text.replace("\n", " ")
    assert "\x1b[31m" not in text


def test_posture(monkeypatch: pytest.MonkeyPatch) -> None:
    """With -v each promise is told with its evidence, and with what to do where it does not hold."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    render.say_posture(
        Posture(
            "local",
            available=True,
            isolation=Isolation.NAMESPACE,
            engine="bubblewrap 0.12",
            guarantees=(
                Guarantee("network", State.IN_FORCE, "a namespace of its own"),
                Guarantee("memory-limit", State.NOT_IN_FORCE, "no cgroup", "Delegate one."),
            ),
        )
    )
    assert stderr.getvalue().splitlines() == [
        "cloche: mode local (bubblewrap 0.12), isolation namespace",
        "cloche:   + network: a namespace of its own",
        "cloche:   - memory-limit: no cgroup. Delegate one.",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**28, "256 MiB"),
        (3 * 2**30, "3.0 GiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    """Sizes are told in units that people read."""
    assert render.size(count) == text
