"""The doctor on this machine: nothing is wrong with a healthy box, and of a weakened one exactly what is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.doctor.ask import broken, doctor
from tests.doctor.weak import Weakness, write
from tests.supervisor.harness import public_folder

from cloche.testing.conformance import must_work

SIZE = "44695552"
"""Of a writable mount, for the memory that the probe's box has: a sixth of 256 MiB, in whole units."""
WEAK: Mapping[str, tuple[Weakness, set[str], str]] = {
    "network": (Weakness(leave_out=[["--unshare-net"]]), {"network", "namespaces"}, "process"),
    "ipc": (Weakness(leave_out=[["--unshare-ipc"]]), {"namespaces"}, "process"),
    "host name": (
        Weakness(leave_out=[["--unshare-uts"], ["--hostname", "cloche"]]),
        {"namespaces"},
        "process",
    ),
    "processes": (
        Weakness(instead=[(["--proc", "/proc"], ["--dev-bind", "/proc", "/proc"])]),
        {"process-visibility"},
        "process",
    ),
    "writable /usr": (
        Weakness(instead=[(["--ro-bind-try", "/usr", "/usr"], ["--bind-try", "/usr", "/usr"])]),
        {"read-only-root"},
        "namespace",
    ),
    "writable root": (Weakness(leave_out=[["--remount-ro", "/"]]), {"read-only-root"}, "namespace"),
    "unbounded /tmp": (
        Weakness(instead=[(["--size", SIZE, "--tmpfs", "/tmp"], ["--tmpfs", "/tmp"])]),
        {"disk-limit"},
        "namespace",
    ),
    "device": (Weakness(more=["--dev-bind", "/dev/tty0", "/dev/tty0"]), {"devices"}, "namespace"),
    "credential": (
        Weakness(more=["--ro-bind", "/etc/hostname", "/run/secrets/kubernetes.io/serviceaccount/token"]),
        {"no-credentials"},
        "process",
    ),
}
"""What is taken away, what the doctor then finds broken, and the level that is left."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with public_folder() as path:
        yield path


def bubblewrap() -> str:
    real = shutil.which("bwrap")
    if real is None:
        if must_work("local"):
            pytest.fail("there is no bubblewrap in the system", pytrace=False)
        pytest.skip("there is no bubblewrap in the system")
    return real


def test_healthy() -> None:
    """Everything is in force, the level is the mode's, and nothing was merely claimed that a probe can see."""
    status, report = doctor("local")
    assert broken(report) == set()
    assert (status, report["ok"], report["proved"], report["error"]) == (0, True, True, None)
    assert (report["mode"], report["level"], report["required"]) == ("local", "namespace", "namespace")
    assert all(check["verdict"] != "not-ok" for check in report["checks"] if check["needed"])
    unknown = [g["name"] for g in report["guarantees"] if g["state"] == "unknown"]
    assert set(unknown) <= {"cpu-limit", "no-leftovers"}, "only what a busy machine or one without cgroups cannot tell"
    assert [g["name"] for g in report["guarantees"] if g["evidence"].startswith("not probed")] in (
        [],
        ["kernel-memory-limit"],
    )


def test_a_level_that_is_not_reached() -> None:
    """What the mode cannot give is not given because somebody asks for it."""
    status, report = doctor("local", "--require", "container")
    assert (status, report["ok"], report["level"], report["required"]) == (1, False, "namespace", "container")


@pytest.mark.parametrize("name", WEAK)
def test_weakened(folder: Path, name: str) -> None:
    """One thing is taken away behind cloche's back: that is found, and nothing else."""
    weakness, expected, level = WEAK[name]
    write(folder, bubblewrap(), weakness)
    status, report = doctor("local", path=folder)
    assert report["error"] is None, report["error"]
    found = broken(report)
    if name == "network" and any(
        "metadata" in g["evidence"] for g in report["guarantees"] if g["name"] == "no-credentials"
    ):
        found.discard("no-credentials")  # this machine has a metadata service, and it answers
    assert found == expected, [g for g in report["guarantees"] if g["name"] in found ^ expected]
    assert (status, report["ok"], report["level"]) == (1, False, level)


def test_proved_at_the_start(folder: Path) -> None:
    """With CLOCHE_PROVE=start no script runs in a box that is weaker than its mode says, and one that is not runs as ever."""
    script = folder / "main.sh"
    script.write_text("echo ran")
    write(folder, bubblewrap(), WEAK["network"][0])
    for path, status, printed in ((f"{folder}:{os.environ['PATH']}", 125, ""), (os.environ["PATH"], 0, "ran\n")):
        done = subprocess.run(
            [sys.executable, "-m", "cloche", "run", "--mode", "local", str(script)],
            env={"PATH": path, "CLOCHE_PROVE": "start"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (status, printed), done.stderr
        assert ("[isolation-unavailable]" in done.stderr) is (status == 125)


def test_a_bubblewrap_that_changes_nothing(folder: Path) -> None:
    """The detour itself breaks nothing: what the tests above find is what they took away."""
    write(folder, bubblewrap(), Weakness())
    status, report = doctor("local", path=folder)
    assert (status, broken(report)) == (0, set())


def test_settings_that_make_no_sense() -> None:
    """An error is told as JSON too, and nothing was looked at."""
    status, report = doctor("local", settings={"CLOCHE_TIMEOUT": "soon"})
    assert (status, report["ok"], report["error"]["code"]) == (125, False, "invalid-settings")


def test_usage() -> None:
    """A level that there is not, and a mode beside all modes."""
    for options in (["--require", "perfect"], ["--all"]):
        done = subprocess.run(
            [sys.executable, "-m", "cloche", "doctor", "--mode", "local", *options], capture_output=True, check=False
        )
        assert done.returncode == 2
