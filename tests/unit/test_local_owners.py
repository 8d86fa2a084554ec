"""The locked file that tells the living from the dead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fcntl", reason="the local mode needs Linux")

from cloche.backends.local import owners


def die_holding_a_lock(folder: Path, name: str, noted: Path) -> None:
    """A process that becomes an owner and is killed."""
    code = (
        "import os, sys; from pathlib import Path; from cloche.backends.local.owners import Owner\n"
        "Owner(Path(sys.argv[1]), sys.argv[2]).note(Path(sys.argv[3])); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), name, str(noted)], check=False)
    assert done.returncode == -9


def test_a_killed_owner_is_found_with_what_it_noted(tmp_path: Path) -> None:
    """The owner of a killed process is dead, and what it noted is given out once."""
    die_holding_a_lock(tmp_path, "o1", Path("/somewhere"))
    assert list(owners.dead(tmp_path)) == [("o1", [Path("/somewhere")])]
    assert list(owners.dead(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_is_never_touched(tmp_path: Path) -> None:
    """An owner whose process lives is not among the dead, whoever looks, and its file stays."""
    owner = owners.Owner(tmp_path, "o2")
    owner.note(Path("/somewhere"))
    code = (
        "import sys; from pathlib import Path; from cloche.backends.local.owners import dead\n"
        "print(list(dead(Path(sys.argv[1]))))"
    )
    seen = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert seen.stdout.strip() == "[]"
    assert list(owners.dead(tmp_path)) == []
    owner.close()
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link that looks like an owner's file is not opened."""
    (tmp_path / "target").write_text("/\n")
    (tmp_path / "o3.owner").symlink_to(tmp_path / "target")
    assert list(owners.dead(tmp_path)) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root uses /run/cloche")
def test_somebody_elses_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state folder that others may write to is refused."""
    (tmp_path / "cloche").mkdir(mode=0o777)
    (tmp_path / "cloche").chmod(0o777)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(PermissionError):
        owners.state_folder()
