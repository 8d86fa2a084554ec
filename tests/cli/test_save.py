"""Artifacts are written below the folder, and never through a link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cloche
from cloche.cli.save import check_folder, save
from cloche.events import Artifact
from cloche.result import ArtifactInfo


def artifact(path: str, data: bytes = b"new") -> ArtifactInfo:
    return ArtifactInfo.of(Artifact(path, len(data), data))


def test_written(tmp_path: Path) -> None:
    """Each artifact is a file below the folder, which is made if need be; what was there is replaced."""
    out = tmp_path / "a" / "out"
    out.mkdir(parents=True)
    (out / "old.txt").write_text("old")
    save(out, [artifact("old.txt"), artifact("d/e/ü\n-x", b"\x00\xff"), artifact("d/empty", b"")])
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == {"old.txt": b"new", "d/e/ü\n-x": b"\x00\xff", "d/empty": b""}
    save(tmp_path / "new", [artifact("\udcff")])
    assert os.listdir(os.fsencode(tmp_path / "new")) == [b"\xff"]


def test_link_in_the_files_place(tmp_path: Path) -> None:
    """A link where the file is to be is replaced; what it points to is untouched."""
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").symlink_to(victim)
    os.link(victim, out / "b")
    save(out, [artifact("a"), artifact("b")])
    assert victim.read_text() == "untouched"
    assert not (out / "a").is_symlink()
    assert (out / "a").read_bytes() == (out / "b").read_bytes() == b"new"


def test_link_in_a_folders_place(tmp_path: Path) -> None:
    """A link on the way is not followed: nothing is written, and the error says so."""
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "d").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(cloche.InvalidSpec, match="cannot be written") as caught:
        save(out, [artifact("d/a")])
    assert "--output" in caught.value.hint
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x", "", "a//b", "./a", "a/."])
def test_paths_are_checked_again(tmp_path: Path, path: str) -> None:
    """A path that leads out of the folder is refused, although the decoder would not have let it through."""
    with pytest.raises(cloche.ProtocolError):
        save(tmp_path / "out", [artifact(path)])
    assert not (tmp_path / "x").exists()


def test_folder_in_the_files_place(tmp_path: Path) -> None:
    """A folder where a file is to be is an error, and nothing half-written is left beside it."""
    (tmp_path / "a").mkdir()
    with pytest.raises(cloche.InvalidSpec, match="Is a directory, at artifact 'a'"):
        save(tmp_path, [artifact("a")])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_checked_before(tmp_path: Path) -> None:
    """Whether the folder can be used is found out without making it."""
    check_folder(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    for bad in ("file", "file/below"):
        with pytest.raises(cloche.InvalidSpec, match="is not a folder"):
            check_folder(tmp_path / bad)


def test_no_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder below a current one that was removed is refused."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(cloche.InvalidSpec, match="current folder does not exist"):
        check_folder(Path("out"))
