"""The soak itself: that it finds what it looks for, and that a short one finds nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import modes
from tests.soak import inventory, kinds
from tests.soak.client import Measured
from tests.soak.kinds import OUTPUT_BYTES
from tests.soak.oracle import Told, judge
from tests.soak.plan import MORTAL, Cancel, Fault, Run, plan, warm_up
from tests.soak.report import KEPT_FDS, OfMode, Report

NOTHING: frozenset[Fault] = frozenset()
HINT = "Try again."


def run(kind: str, cancel: Cancel | None = None, seed: int = 1) -> Run:
    """A run of a kind."""
    return Run(0, "local", "first", kind, "word", kinds.KINDS[kind]("word", random.Random(seed)), cancel)


def true(of: Run, **other: Any) -> Told:
    """What is true of it, but for some fields."""
    expected = of.made.expected
    told = Told(
        expected.outcome,
        expected.exit_code,
        expected.signal,
        kept(expected.stdout),
        kept(expected.stderr),
        len(expected.stdout),
        len(expected.stderr),
        len(expected.stdout) > OUTPUT_BYTES,
        len(expected.stderr) > OUTPUT_BYTES,
        {path: (len(data), hashlib.sha256(data).hexdigest(), False) for path, data in expected.artifacts.items()},
        of.mode,
    )
    return dataclasses.replace(told, **other)


def kept(data: bytes) -> bytes:
    """What is kept of a stream."""
    half = OUTPUT_BYTES // 2
    return data if len(data) <= OUTPUT_BYTES else data[:half] + data[-half:]


def failure(code: str, *, hint: str = HINT, retryable: bool = True) -> dict[str, Any]:
    """An error as a client tells it."""
    return {"code": code, "message": "It happened.", "hint": hint, "retryable": retryable}


def large() -> Run:
    """A run whose stdout is cut."""
    return next(each for each in (run("writes", seed=i) for i in range(99)) if len(each.made.expected.stdout) > 500_000)


def with_artifacts() -> Run:
    """A run with a file that is not empty."""
    return next(
        each for each in (run("leaves", seed=i) for i in range(99)) if any(each.made.expected.artifacts.values())
    )


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_what_is_true_is_right(kind: str) -> None:
    """The expected result of each kind is found right, with and without faults."""
    for seed in range(20):
        one = run(kind, seed=seed)
        assert judge(one, true(one), NOTHING) == ""
        assert judge(one, true(one), frozenset(Fault)) == ""


TICKS = run("ticks")
SAID = TICKS.made.expected.stdout
PATH = next(iter(with_artifacts().made.expected.artifacts))
FORGED: dict[str, tuple[Run, dict[str, Any], frozenset[Fault]]] = {
    "another exit code": (TICKS, {"exit_code": 99}, NOTHING),
    "another exit code after a fault": (TICKS, {"exit_code": 99}, frozenset(Fault)),
    "a signal": (TICKS, {"outcome": "signaled", "exit_code": None, "signal": "SIGKILL"}, frozenset(Fault)),
    "success of what timed out": (run("outlasts"), {"outcome": "exited", "exit_code": 0}, frozenset(Fault)),
    "a time-out that was none": (TICKS, {"outcome": "timed_out", "exit_code": None}, frozenset(Fault)),
    "success of what was out of memory": (run("hogs"), {"outcome": "exited", "exit_code": 0}, frozenset(Fault)),
    "missing bytes": (TICKS, {"stdout": SAID[:-5]}, frozenset(Fault)),
    "missing bytes that are not counted": (TICKS, {"stdout": SAID[:-5], "stdout_bytes": len(SAID) - 5}, NOTHING),
    "missing bytes in the middle": (TICKS, {"stdout": SAID[:7] + SAID[9:]}, NOTHING),
    "another run's bytes": (TICKS, {"stdout": SAID.replace(b"word", b"ward")}, NOTHING),
    "said to be cut": (TICKS, {"stdout_truncated": True}, NOTHING),
    "cut and not said": (large(), {"stdout_truncated": False}, NOTHING),
    "cut, another tail": (large(), {"stdout": large().made.expected.stdout[:OUTPUT_BYTES]}, NOTHING),
    "bytes on the other stream": (TICKS, {"stderr": b"word 0\n", "stderr_bytes": 7}, NOTHING),
    "a missing artifact": (with_artifacts(), {"artifacts": {}}, NOTHING),
    "another artifact": (with_artifacts(), {"artifacts": {PATH: (1, "0" * 64, False)}}, NOTHING),
    "an artifact too many": (TICKS, {"artifacts": {"a": (1, "0" * 64, False)}}, NOTHING),
    "another mode": (TICKS, {"mode": "docker"}, NOTHING),
    "a fallback": (TICKS, {"fallback_from": "docker"}, NOTHING),
    "cancelled by nobody": (TICKS, {"outcome": "cancelled", "exit_code": None}, frozenset(Fault)),
    "abandoned by nobody": (TICKS, {"outcome": "abandoned"}, frozenset(Fault)),
    "a client that died by itself": (TICKS, {"outcome": "died"}, frozenset({Fault.KILL_BOX})),
    "an error for no reason": (TICKS, {"outcome": "failed", "error": failure("engine-lost")}, NOTHING),
    "an error that no fault explains": (
        TICKS,
        {"outcome": "failed", "error": failure("invalid-spec")},
        frozenset(Fault),
    ),
    "an error without a hint": (
        TICKS,
        {"outcome": "failed", "error": failure("engine-lost", hint="")},
        frozenset(Fault),
    ),
    "a killed box to be run again": (
        TICKS,
        {"outcome": "failed", "stdout": b"", "error": failure("engine-lost")},
        frozenset({Fault.KILL_BOX}),
    ),
    "an honest error with other bytes": (
        TICKS,
        {"outcome": "failed", "stdout": b"x", "error": failure("engine-lost", retryable=False)},
        frozenset({Fault.KILL_BOX}),
    ),
    "an exception": (TICKS, {"outcome": "broken", "error": failure("none")}, frozenset(Fault)),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_is_forged_is_found(name: str) -> None:
    """A result that is not true is a complaint, whatever happened to the run."""
    one, other, faults = FORGED[name]
    assert judge(one, true(one, **other), faults)


@pytest.mark.parametrize("by", ["task", "cancel", "kill"])
def test_what_is_cancelled(by: Any) -> None:
    """A run that somebody cancels may be cancelled, with the beginning of its output, and may have been quicker."""
    one = run("ticks", Cancel(by, 1.0))
    assert judge(one, true(one), NOTHING) == ""
    assert judge(one, true(one, outcome="cancelled", exit_code=None, stdout=SAID[:14]), NOTHING) == ""
    assert bool(judge(one, true(one, outcome="abandoned"), NOTHING)) is (by != "task")
    assert judge(one, true(one, outcome="cancelled", exit_code=None, stdout=b"other"), NOTHING)


def test_honest_failures() -> None:
    """What an error says is enough where a fault met the run."""
    lost = true(TICKS, outcome="failed", stdout=SAID[:14], error=failure("engine-lost", retryable=False))
    assert judge(TICKS, lost, frozenset({Fault.KILL_BOX})) == ""
    away = true(TICKS, outcome="failed", stdout=b"", error=failure("start-timeout"))
    assert judge(TICKS, away, frozenset({Fault.RESTART_ENGINE})) == ""
    assert judge(TICKS, away, frozenset({Fault.KILL_BOX}))


def test_a_plan_is_repeated() -> None:
    """The same seed gives the same runs, with each fault in it; another one gives others."""
    restartable = frozenset({"docker"})
    once = plan(7, ["local", "docker"], 100, "mark", restartable)
    assert once == plan(7, ["local", "docker"], 100, "mark", restartable)
    assert once != plan(8, ["local", "docker"], 100, "mark", restartable)
    assert [len(runs) for runs in once.values()] == [50, 50]
    faults = {mode: {each.happens.fault for each in runs if each.happens is not None} for mode, runs in once.items()}
    assert faults == {"local": set(Fault) - {Fault.RESTART_ENGINE}, "docker": set(Fault)}
    assert all(each.happens is None and each.cancel is None for each in once["local"][: warm_up(50)])
    assert {each.client for each in once["local"][-len(MORTAL) :]} == set(MORTAL)


MEASURED = Measured(rss=100 * 2**20, fds=20, runs=0, removals_failed=0, sweeps_failed=0, swept=0)


@pytest.mark.parametrize(
    ("other", "flat"),
    [
        ({"rss": 101 * 2**20, "fds": 20 + KEPT_FDS}, True),
        ({"rss": 120 * 2**20}, False),
        ({"fds": 21 + KEPT_FDS}, False),
        ({"runs": 1}, False),
    ],
)
def test_growth_is_found(other: dict[str, int], *, flat: bool) -> None:
    """A client that has grown, or holds descriptors or runs, is a failure of the soak."""
    of_mode = OfMode()
    of_mode.measured(MEASURED, dataclasses.replace(MEASURED, **other))
    report = Report(1, "mark", {"local": of_mode})
    assert report.failed is not flat


def _cgroup() -> Path:
    top = next(path for path in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")) if path.is_dir())
    if not os.access(top, os.W_OK):
        pytest.skip("no cgroup can be made here")
    return top / "cloche-soak-test"


FAKES: dict[str, Callable[[Path], Path]] = {
    "a cgroup": lambda _: _cgroup(),
    "a folder in /tmp": lambda _: Path("/tmp/cloche-soak-test"),
    "a folder in /dev/shm": lambda _: Path("/dev/shm/cloche-soak-test"),
    "a client's temporary folder": lambda folder: folder / "anything",
}


@pytest.mark.parametrize("name", FAKES)
def test_a_folder_that_is_left_is_found(name: str, tmp_path: Path) -> None:
    """What has cloche's name, or is where only clients put things, is left when it has come since."""
    before = inventory.take([], [tmp_path], "no-mark")
    fake = FAKES[name](tmp_path)
    fake.mkdir()
    try:
        left = inventory.settled(lambda: inventory.take([], [tmp_path], "no-mark"), before, within_s=0.1)
    finally:
        fake.rmdir()
    assert any(str(fake) in thing for thing in left), left
    assert Report(1, "mark", {"local": OfMode()}, left=left).failed


def test_a_process_that_is_left_is_found(tmp_path: Path) -> None:
    """A process with the mark of a script is left."""
    before = inventory.take([], [tmp_path], "mark-of-a-test")
    with subprocess.Popen(["sleep", "60"], executable="/bin/sleep", env={}) as other:
        try:
            assert not [
                thing
                for thing in inventory.take([], [tmp_path], "mark-of-a-test").changed_since(before)
                if str(other.pid) in thing
            ]
        finally:
            other.kill()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "mark-of-a-test-1"]) as script:
        try:
            now = inventory.take([], [tmp_path], "mark-of-a-test")
        finally:
            script.kill()
    assert any(f"process {script.pid}" in thing for thing in now.changed_since(before))


def test_what_must_not_change() -> None:
    """An image that is gone is found like one that has come; a leftover of somebody's that goes is none of our business."""
    before = inventory.Inventory(frozenset({"file a"}), frozenset({"image a"}))
    assert inventory.Inventory(frozenset(), frozenset({"image a"})).changed_since(before) == frozenset()
    assert len(inventory.Inventory(frozenset(), frozenset()).changed_since(before)) == 1
    assert len(inventory.Inventory(frozenset(), frozenset({"image a", "image b"})).changed_since(before)) == 1


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder for a report: with a name that no inventory looks for."""
    with tempfile.TemporaryDirectory(prefix="soak-test-") as folder:
        yield Path(folder)


def test_a_short_soak(outside: Path) -> None:
    """A short one on this machine finds nothing, and its report says what was done."""
    modes.ready("local")
    command = [sys.executable, "-m", "tests.soak", "--modes", "local", "--runs", "16", "--seed", "11"]
    done = subprocess.run(
        [*command, "--report", str(outside / "soak.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((outside / "soak.json").read_text())
    assert found["modes"]["local"]["runs"] == 16
    assert found["modes"]["local"]["ok"] > 0
    assert found["modes"]["local"]["faults"]["SIGKILL of a client"] >= 2
    assert found["left"] == []


def test_a_mode_that_must_work(outside: Path) -> None:
    """An engine that is not here is told, and a failure only where it must work."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CLOCHE_")}
    command = [sys.executable, "-m", "tests.soak", "--modes", "docker", "--report", str(outside / "soak.json")]
    done = subprocess.run(
        command, env={**environ, "CLOCHE_MUST_WORK": "docker"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "CLOCHE_TEST_DOCKER_HOST is not set" in done.stdout
