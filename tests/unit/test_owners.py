"""The locked file that tells the living from the dead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fcntl", reason="the local mode needs Linux")

from cloche.backends import owners


def die_holding_a_lock(folder: Path, name: str, noted: Path) -> None:
    """A process that becomes an owner and is killed."""
    code = (
        "import os, sys; from pathlib import Path; from cloche.backends.owners import Owner\n"
        "Owner(Path(sys.argv[1]), sys.argv[2]).note(Path(sys.argv[3])); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), name, str(noted)], check=False)
    assert done.returncode == -9


def test_a_killed_owner_is_found_with_what_it_noted(tmp_path: Path) -> None:
    """The owner of a killed process is dead, and what it noted is given out once."""
    die_holding_a_lock(tmp_path, "o1", Path("/somewhere"))
    assert list(owners.dead(tmp_path)) == [owners.Dead("o1", [Path("/somewhere")])]
    assert list(owners.dead(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_is_never_touched(tmp_path: Path) -> None:
    """An owner whose process lives is not among the dead, whoever looks, and its file stays."""
    owner = owners.Owner(tmp_path, "o2")
    owner.note(Path("/somewhere"))
    code = (
        "import sys; from pathlib import Path; from cloche.backends.owners import dead\n"
        "print(list(dead(Path(sys.argv[1]))))"
    )
    seen = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert seen.stdout.strip() == "[]"
    assert list(owners.dead(tmp_path)) == []
    owner.close()
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_removed_is_found_again(tmp_path: Path) -> None:
    """A dead owner of which something is left is found by the next sweep too."""
    die_holding_a_lock(tmp_path, "o1", Path("/somewhere"))
    for owner in owners.dead(tmp_path):
        owner.left = True
    assert [owner.name for owner in owners.dead(tmp_path)] == ["o1"]
    assert list(tmp_path.iterdir()) == []


def test_when_the_dead_was_found_is_written_down_once(tmp_path: Path) -> None:
    """A sweep that leaves the file of a dead owner writes the time into it; the next ones tell how long ago that was."""
    die_holding_a_lock(tmp_path, "o1", Path("/somewhere"))
    file = tmp_path / "o1.owner"
    for _ in range(2):
        for owner in owners.dead(tmp_path):
            assert owner.found_s < 30
            owner.left = True
    first, mark = file.read_text().splitlines()
    assert (first, mark[:14]) == ("/somewhere", "found dead at ")
    file.write_text(f"{first}\nfound dead at {int(mark[14:]) - 3600}\n")
    (owner,) = owners.dead(tmp_path)
    assert (owner.folders, owner.notes) == ([Path("/somewhere")], [])
    assert 3600 <= owner.found_s < 3630


def test_an_owner_can_be_made_while_others_sweep(tmp_path: Path) -> None:
    """However often others sweep in the very moment, a new owner gets its lock, and nobody takes it for dead."""
    code = (
        "import sys; from pathlib import Path; from cloche.backends.owners import dead\n"
        "print('up', flush=True)\n"
        "while True:\n    for _ in dead(Path(sys.argv[1])): pass"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as sweeper:
        try:
            assert sweeper.stdout is not None
            sweeper.stdout.readline()
            for i in range(2000):
                owner = owners.Owner(tmp_path, f"o{i}")
                assert (tmp_path / f"o{i}.owner").exists()
                owner.close()
        finally:
            sweeper.kill()


@pytest.mark.parametrize("umask", [0o077, 0o022, 0])
def test_a_folder_of_ours_has_its_mode_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    """The state folder and what is in it have the mode that boxes need, also under a strict umask, and are repaired."""
    before = os.umask(umask)
    try:
        for _ in range(2):
            folder = owners.own_folder(tmp_path / "state", 0o755)
            assert folder.stat().st_mode & 0o777 == 0o755
            folder.chmod(0o700)
    finally:
        os.umask(before)


def test_a_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link that looks like an owner's file is not opened."""
    (tmp_path / "target").write_text("/\n")
    (tmp_path / "o3.owner").symlink_to(tmp_path / "target")
    assert list(owners.dead(tmp_path)) == []


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """A state folder that others may write to is not used."""
    (tmp_path / "cloche").mkdir()
    (tmp_path / "cloche").chmod(0o777)
    with pytest.raises(PermissionError, match="not a folder of ours alone"):
        owners.own_folder(tmp_path / "cloche", 0o700)
