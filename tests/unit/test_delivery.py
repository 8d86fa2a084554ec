"""What of the host goes into a bundle, and what is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cloche
from cloche.runtime import workspace as module
from cloche.runtime.delivery import Bounds, Delivery, choose_interpreter, deliver
from cloche.runtime.workspace import Budget, read_workspace, resolve_inside
from cloche.spec import Limits, Spec
from cloche.supervisor.bundle import File, Folder, Link

BOUNDS = Bounds(script_bytes=1000, workspace_bytes=10_000)
UNPRIVILEGED = 65534


def delivered(bounds: Bounds = BOUNDS, **fields: object) -> Delivery:
    return deliver(Spec.model_validate(fields), Limits(), bounds)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As somebody who may not read everything: root becomes nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "skill"
    (root / "lib" / "deep").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "main.py").write_text("print(1)")
    (root / "lib" / "deep" / "d a t a ü.csv").write_bytes(b"\x00\xff")
    (root / "tool.sh").write_text("#!/bin/sh")
    (root / "tool.sh").chmod(0o755)
    (root / "link").symlink_to("lib/deep")
    (root / "lib" / "up").symlink_to("../main.py")
    return root


def test_script_alone(tmp_path: Path) -> None:
    """A file of the host is delivered alone, under its own name, with exactly the argv and environment that were told."""
    script = tmp_path / "re port.py"
    script.write_bytes(b"print(\xff)")
    (tmp_path / "secret").write_text("not delivered")
    got = delivered(script=str(script), args=("-x", ""), env={"A": "1", "LANG": "C"}, stdin=b"in")
    assert got.interpreter == "python3"
    assert got.bundle.argv == ["python3", "/workspace/re port.py", "-x", ""]
    assert got.bundle.env == {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C", "A": "1"}
    assert got.bundle.entries == [File("re port.py", b"print(\xff)")]
    assert got.bundle.stdin == b"in"


def test_inline(tmp_path: Path) -> None:
    """Inline content is a file under its name, in the folders of its name."""
    got = delivered(content="echo ü", name="a/b.sh", interpreter="dash")
    assert got.bundle.argv == ["dash", "/workspace/a/b.sh"]
    assert got.bundle.entries == [Folder("a"), File("a/b.sh", "echo ü".encode())]


def test_workspace(folder: Path) -> None:
    """A folder is delivered whole: nested and empty folders, any name, the right to execute, links that stay inside."""
    got = delivered(script="main.py", workspace=folder)
    assert list(got.bundle.entries) == [
        Folder("empty"),
        Folder("lib"),
        Folder("lib/deep"),
        File("lib/deep/d a t a ü.csv", b"\x00\xff"),
        Link("lib/up", "../main.py"),
        Link("link", "lib/deep"),
        File("main.py", b"print(1)"),
        File("tool.sh", b"#!/bin/sh", executable=True),
    ]


def test_any_file_name(tmp_path: Path) -> None:
    """A name that is no UTF-8, holds a newline or begins with a dash is delivered as it is."""
    names = [b"-rf", b"a\nb", b"\xff\xfe", "日本".encode()]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    entries = read_workspace(tmp_path, Budget(1000))
    assert {(os.fsencode(e.path), e.data) for e in entries if isinstance(e, File)} == {(n, n) for n in names}


def test_inline_in_a_workspace(folder: Path) -> None:
    """Inline content takes its place among the workspace's files, also of one with the same name."""
    got = delivered(content="new", name="main.py", workspace=folder)
    assert [e for e in got.bundle.entries if e.path == "main.py"] == [File("main.py", b"new")]
    got = delivered(content="new", name="lib/more/x.py", workspace=folder)
    paths = [e.path for e in got.bundle.entries]
    assert paths[-2:] == ["lib/more", "lib/more/x.py"]
    assert paths.count("lib") == 1


@pytest.mark.parametrize("name", ["lib", "link/x.py", "main.py/x.py"])
def test_inline_cannot_replace(folder: Path, name: str) -> None:
    """Inline content does not take a folder's place, nor go through a link or a file."""
    with pytest.raises(cloche.InvalidSpec, match="folder"):
        delivered(content="new", name=name, workspace=folder, interpreter="sh")


@pytest.mark.parametrize("script", ["lib/up", "tool.sh"])
def test_script_through_an_inner_link(folder: Path, script: str) -> None:
    """A script may be a link to a file inside the workspace."""
    assert delivered(script=script, workspace=folder).bundle.argv[1] == f"/workspace/{script}"


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("out", "/etc/passwd"),
        ("out", "../x"),
        ("lib/out", "../../x"),
        ("out", "lib/../../x"),
        ("lib/deep/out", "up3/../../../../x"),
    ],
)
def test_links_that_leave(folder: Path, link: str, target: str) -> None:
    """A link that is absolute or leaves the folder is refused, with its path and its target named."""
    (folder / link).symlink_to(target)
    with pytest.raises(cloche.InvalidSpec) as caught:
        delivered(script="main.py", workspace=folder)
    assert repr(link) in caught.value.message
    assert repr(target) in caught.value.message
    assert "relative link" in caught.value.hint


def test_links_that_leave_through_another(folder: Path) -> None:
    """A link that stays inside word by word, and leaves when the links in it are followed, is refused."""
    (folder / "lib" / "deep" / "root").symlink_to("../..")
    (folder / "lib" / "deep" / "out").symlink_to("root/../x")
    with pytest.raises(cloche.InvalidSpec, match="'lib/deep/out'"):
        delivered(script="main.py", workspace=folder)


def test_links_that_leave_word_by_word(folder: Path) -> None:
    """A link that leaves word by word, and stays inside only when the links in it are followed, is refused by its name: the
    supervisor's reader would refuse it too, without a hint.
    """
    (folder / "down").symlink_to("lib/deep")
    (folder / "odd").symlink_to("down/../../main.py")
    assert (folder / "odd").resolve() == (folder / "main.py").resolve()
    with pytest.raises(cloche.InvalidSpec, match="'odd'"):
        delivered(script="main.py", workspace=folder)


def test_links_that_lead_nowhere(folder: Path) -> None:
    """A link to nothing, or in a circle, harms nobody, and is delivered."""
    (folder / "circle").symlink_to("circle")
    (folder / "nothing").symlink_to("lib/nothing")
    entries = delivered(script="main.py", workspace=folder).bundle.entries
    assert {e.path for e in entries if isinstance(e, Link)} == {"circle", "nothing", "link", "lib/up"}
    with pytest.raises(cloche.ScriptNotFound):
        delivered(script="circle", workspace=folder)
    with pytest.raises(cloche.ScriptNotFound):
        delivered(script="nothing", workspace=folder)


def test_resolution() -> None:
    """Paths are followed as the kernel follows them."""
    links = {"a": "b/c", "b/c": "../d", "x/up": "..", "loop": "loop"}
    assert resolve_inside("a/e", "", links) == "d/e"
    assert resolve_inside("up/y", "x", links) == "y"
    assert resolve_inside("./x//z", "", links) == "x/z"
    assert resolve_inside("loop", "", links) is None
    with pytest.raises(ValueError, match="leaves"):
        resolve_inside("up/../y", "x", links)


def make_socket(path: Path) -> None:
    # A socket's path is short (sun_path); relative names keep it so.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("make", [os.mkfifo, make_socket])
def test_special_files(folder: Path, make: object) -> None:
    """A fifo or a socket in the workspace is refused by its path, without being opened."""
    assert callable(make)
    make(folder / "lib" / "special")
    with pytest.raises(cloche.InvalidSpec, match=r"'lib/special'.*neither"):
        delivered(script="main.py", workspace=folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_devices(folder: Path) -> None:
    """A device in the workspace is refused by its path."""
    os.mknod(folder / "null", 0o20666, os.makedev(1, 3))
    with pytest.raises(cloche.InvalidSpec, match=r"'null'.*neither"):
        delivered(script="main.py", workspace=folder)


def test_unreadable(tmp_path: Path) -> None:
    """What cannot be read is named, a file of the workspace, a folder of it, or the script."""
    for made in tmp_path.parents:
        # What pytest made for this session is closed to others; what is above it is the machine's.
        if not made.name.startswith("pytest-"):
            break
        made.chmod(0o755)
    tmp_path.chmod(0o755)
    for name in ("file", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("")
    (tmp_path / "file" / "b").write_text("")
    (tmp_path / "file" / "b").chmod(0)
    (tmp_path / "folder" / "b").mkdir(mode=0)
    (tmp_path / "s.py").write_text("")
    (tmp_path / "s.py").chmod(0)
    with unprivileged():
        for name in ("file", "folder"):
            with pytest.raises(cloche.InvalidSpec, match=r"'b'.*Permission denied") as caught:
                delivered(script="a.py", workspace=tmp_path / name)
            assert "readable" in caught.value.hint
        with pytest.raises(cloche.ScriptNotFound, match=r"s\.py.*Permission denied"):
            delivered(script=str(tmp_path / "s.py"))
    (tmp_path / "folder" / "b").chmod(0o755)


@pytest.mark.parametrize(
    ("script", "inside", "error", "message"),
    [
        ("nope.py", True, cloche.ScriptNotFound, "no script 'nope.py' in the workspace"),
        ("lib", True, cloche.ScriptNotFound, "is a folder"),
        ("link", True, cloche.ScriptNotFound, "is a folder"),
        ("nope.py", False, cloche.ScriptNotFound, "no script at"),
        ("", False, cloche.ScriptNotFound, "is a folder"),
        ("main.py/x.py", False, cloche.ScriptNotFound, "cannot be read"),
        ("main.py/x.py", True, cloche.ScriptNotFound, "no script"),
    ],
)
def test_no_such_script(folder: Path, script: str, inside: bool, error: type[cloche.ClocheError], message: str) -> None:
    """A script that is missing or no file is script-not-found, with a hint."""
    fields = {"script": script, "workspace": folder} if inside else {"script": f"{folder}/{script}"}
    with pytest.raises(error, match=message) as caught:
        delivered(**fields)
    assert caught.value.hint


@pytest.mark.parametrize("inside", [True, False])
def test_script_is_a_fifo(tmp_path: Path, inside: bool) -> None:
    """A fifo in the script's place does not stop anybody."""
    os.mkfifo(tmp_path / "s.py")
    fields = {"script": "s.py", "workspace": tmp_path} if inside else {"script": str(tmp_path / "s.py")}
    with pytest.raises(cloche.ScriptNotFound, match="not a regular file"):
        delivered(**fields)


def test_script_that_is_a_link_out(folder: Path, tmp_path: Path) -> None:
    """A script that is a link out of the workspace is refused, not read."""
    (tmp_path / "outside.py").write_text("")
    (folder / "s.py").symlink_to("../outside.py")
    with pytest.raises(cloche.InvalidSpec, match=r"'s\.py'.*leaves"):
        delivered(script="s.py", workspace=folder)


def test_bad_workspace(tmp_path: Path) -> None:
    """A workspace that is missing or no folder is refused."""
    (tmp_path / "file").write_text("")
    for name in ("nope", "file"):
        with pytest.raises(cloche.InvalidSpec, match=f"workspace .*{name}.* cannot be read") as caught:
            delivered(script="a.py", workspace=tmp_path / name)
        assert "folder that exists" in caught.value.hint


def test_script_too_large(tmp_path: Path) -> None:
    """A script over its bound is refused in every form; one at the bound is not."""
    (tmp_path / "s.py").write_bytes(b"x" * 1001)
    for fields in (
        {"script": str(tmp_path / "s.py")},
        {"script": "s.py", "workspace": tmp_path},
        {"content": "x" * 1001, "name": "s.py"},
        {"content": "x" * 1001, "name": "s.py", "workspace": tmp_path},
    ):
        with pytest.raises(cloche.ScriptTooLarge, match=r"s\.py.*1000 bytes"):
            delivered(**fields)
    (tmp_path / "s.py").write_bytes(b"x" * 1000)
    delivered(script=str(tmp_path / "s.py"))


@pytest.mark.parametrize("with_stdin", [True, False])
def test_workspace_too_large(tmp_path: Path, with_stdin: bool) -> None:
    """Workspace and stdin together have a bound, which can be reached and not passed."""
    (tmp_path / "s.py").write_bytes(b"")
    (tmp_path / "data").write_bytes(b"x" * (6000 if with_stdin else 10_000))
    stdin = b"x" * 4000 if with_stdin else None
    delivered(script="s.py", workspace=tmp_path, stdin=stdin)
    (tmp_path / "more").write_bytes(b"x")
    with pytest.raises(cloche.WorkspaceTooLarge, match="10000 bytes"):
        delivered(script="s.py", workspace=tmp_path, stdin=stdin)


def test_too_large_is_found_early(tmp_path: Path) -> None:
    """A huge file is refused by its size: nothing of it is read."""
    (tmp_path / "s.py").write_text("")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)  # sparse; reading it would take minutes
    with pytest.raises(cloche.WorkspaceTooLarge):
        delivered(script="s.py", workspace=tmp_path)
    with pytest.raises(cloche.WorkspaceTooLarge):
        delivered(content="", name="s.py", stdin=b"x" * 10_001)


def test_endless_file(tmp_path: Path) -> None:
    """A file that is longer than it says (as in /proc) is read up to the bound and no further."""
    fd = os.open("/dev/zero", os.O_RDONLY)
    try:
        assert module.read_all(fd, 5000) is None
    finally:
        os.close(fd)


def test_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries have a bound in number and in depth, whatever their size."""
    for i in range(11):
        (tmp_path / f"f{i}").write_text("")
    monkeypatch.setattr(module, "MAX_ENTRIES", 10)
    with pytest.raises(cloche.WorkspaceTooLarge, match="more than 10 entries"):
        read_workspace(tmp_path, Budget(100))
    monkeypatch.undo()
    (tmp_path / "/".join(["d"] * 70)).mkdir(parents=True)
    with pytest.raises(cloche.InvalidSpec, match="nested too deeply"):
        read_workspace(tmp_path, Budget(100))


def test_race(tmp_path: Path) -> None:
    """A folder or file that is exchanged for a link or a fifo between listing and opening is neither followed nor read."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("/etc")
    with module._Place(str(tmp_path), os.open(tmp_path, os.O_RDONLY)) as place:
        with pytest.raises(OSError, match=r"directory|symbolic"):
            place.folder("b")
        (tmp_path / "c").symlink_to("/etc/passwd")
        with pytest.raises(OSError, match="symbolic"):
            place.open("c")
        os.mkfifo(tmp_path / "d")
        with pytest.raises(OSError, match="changed while it was read"):
            module._file(place, "d", "d", Budget(100))


def test_no_descriptor_is_left(folder: Path) -> None:
    """Neither success nor refusal leaves a file open."""
    before = len(os.listdir("/proc/self/fd"))
    delivered(script="main.py", workspace=folder)
    os.mkfifo(folder / "lib" / "deep" / "fifo")
    with pytest.raises(cloche.InvalidSpec):
        delivered(script="main.py", workspace=folder)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("path", "first_line", "interpreter"),
    [
        ("a.py", "#!/bin/bash", "python3"),
        ("A.PY", "", "python3"),
        ("a.sh", "", "bash"),
        ("a.bash", "", "bash"),
        ("a.js", "", "node"),
        ("a.mjs", "", "node"),
        ("a.rb", "", "ruby"),
        ("a.pl", "", "perl"),
        ("a.php", "", "php"),
        ("a", "#!/usr/bin/env python3", "python3"),
        ("a", "#! /usr/bin/env  python3.12 ", "python3.12"),
        ("a", "#!/bin/bash\r", "bash"),
        ("a", "#!/usr/local/bin/node", "node"),
        ("a.txt", "#!/usr/bin/perl", "perl"),
        ("a", "#!/usr/bin/perl -w", "sh"),
        ("a", "#!/usr/bin/env -S python3 -u", "sh"),
        ("a", "#!/opt/venv/bin/python3", "sh"),
        ("a", "#!python3", "sh"),
        ("a", "#!/bin/../../x", "sh"),
        ("a", "#!/bin/-x", "sh"),
        ("a", " #!/bin/bash", "sh"),
        ("a", "", "sh"),
        ("a.unknown", "echo", "sh"),
        ("dir.py/a", "", "sh"),
    ],
)
def test_interpreter(path: str, first_line: str, interpreter: str) -> None:
    """The suffix chooses, else a shebang with a bare interpreter, else it is sh."""
    assert choose_interpreter(path, f"{first_line}\nrest\n".encode()) == interpreter
    assert choose_interpreter(path, first_line.encode()) == interpreter
