"""What the suites themselves stand on: skips that become failures, guards that notice, and use from outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests import leftovers

from cloche.testing.conformance import Target, absent, must_work


def test_absent_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not here is skipped with its reason, and fails where CLOCHE_MUST_WORK names the mode."""
    monkeypatch.setenv("CLOCHE_MUST_WORK", "kubernetes, docker")
    assert must_work("docker")
    assert not must_work("local")
    with pytest.raises(pytest.fail.Exception, match="CLOCHE_MUST_WORK names docker, but there is no daemon"):
        absent("docker", "there is no daemon")
    with pytest.raises(pytest.skip.Exception, match="local: no bubblewrap"):
        absent("local", "no bubblewrap")
    with pytest.raises(pytest.fail.Exception, match="no node"):
        Target("docker").need("python3", "node")


def test_left_processes_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process of a box that stays is noticed."""
    monkeypatch.setattr(leftovers, "GRACE_S", 0.0)
    shutil.copy(shutil.which("sleep") or "/bin/sleep", tmp_path / "bwrap")
    before = leftovers.now()
    with subprocess.Popen([str(tmp_path / "bwrap"), "60"]) as process:
        try:
            assert leftovers.left_since(before) == [f"process {process.pid}, bwrap"]
        finally:
            process.kill()
    assert leftovers.left_since(before) == []


def test_left_folders_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of cloche's that stays is noticed, and so is nothing_left() of a target."""
    monkeypatch.setattr(leftovers, "GRACE_S", 0.0)
    before = leftovers.now()
    folder = Path(f"/tmp/cloche-left-{os.getpid()}")
    target = Target("local", remains=leftovers.now)
    with pytest.raises(AssertionError, match="left behind"), target.nothing_left(within_s=0):
        folder.mkdir()
    try:
        assert leftovers.left_since(before) == [f"path {folder}"]
    finally:
        folder.rmdir()
    with target.nothing_left(within_s=0):
        pass


def test_importable(target: Target, tmp_path: Path) -> None:
    """A project of somebody else's collects and runs the suite by subclassing it, with pytest and no settings of ours."""
    (tmp_path / "test_mine.py").write_text(
        textwrap.dedent(f"""
            import pytest
            from cloche.testing.conformance import ConformanceSuite, Endings, Target

            class TestMine(ConformanceSuite):
                @pytest.fixture
                def target(self) -> Target:
                    return Target({target.mode!r}, {dict(target.environ)!r})

            class TestPart(Endings):
                @pytest.fixture
                def target(self) -> Target:
                    return Target({target.mode!r}, {dict(target.environ)!r})
        """)
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -W error -p no:cacheprovider\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "test_uncaught or test_none", "."],
        cwd=tmp_path,
        env={**target.command_environment(), "CLOCHE_MUST_WORK": "", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # One test of endings in each of two classes, and one of artifacts.
    assert "3 passed" in done.stdout
