"""What may be shown of the host for an interpreter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cloche.backends.local import interpreters
from cloche.errors import InterpreterMissing


@pytest.mark.parametrize(
    "folder", ["/", "/home", "/home/somebody", "/root", "/tmp", "/var", "/etc", "/opt", os.path.expanduser("~")]
)
def test_folders_that_hold_much_are_never_shown_whole(folder: str) -> None:
    """A home, what holds homes, and the host's large folders are too broad to be bound as an interpreter's prefix."""
    assert interpreters.is_broad(folder)


def test_a_prefix_of_its_own_may_be_shown(tmp_path: Path) -> None:
    """A folder that a version manager made for one interpreter may be shown."""
    assert not interpreters.is_broad(str(tmp_path / "versions" / "3.12"))


def test_a_missing_interpreter_is_named() -> None:
    """An interpreter that is not on the PATH is an error that names it."""
    with pytest.raises(InterpreterMissing, match="nosuchinterpreter"):
        interpreters.find("nosuchinterpreter")


def test_an_interpreter_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that cannot say where its parts are (a broken shim) is an error that names its path."""
    broken = tmp_path / "python9"
    broken.write_text("#!/bin/sh\necho 'pyenv: version 9 is not installed' >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InterpreterMissing, match=str(broken)):
        interpreters.find("python9")


def test_a_virtual_environment_is_shown_with_what_it_is_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the python of a virtual environment the environment is shown, and it is called by the environment's own path."""
    import venv

    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    monkeypatch.setenv("PATH", str(tmp_path / "venv" / "bin"))
    found = interpreters.find("python3")
    assert found.path == str(tmp_path / "venv" / "bin" / "python3")
    targets = [bind.target for bind in found.binds]
    assert str(tmp_path / "venv") in targets
    assert str(tmp_path) not in targets
    assert os.path.expanduser("~") not in targets


def test_of_a_shared_prefix_only_what_programs_load_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in a prefix such as ~/.local is shown alone: what else lies in that prefix may be private."""
    (tmp_path / "bin").mkdir()
    shutil.copy("/bin/sh", tmp_path / "bin" / "mylang")
    (tmp_path / "share").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = interpreters.find("mylang")
    assert [bind.target for bind in found.binds] == [str(tmp_path / "bin" / "mylang")]


def test_a_program_of_the_system_needs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies below /usr is already in the box: nothing is bound for it."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    found = interpreters.find("sh")
    assert found.binds == ()
    assert found.path is None
