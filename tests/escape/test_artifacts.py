"""What lies in /output must not lead the client anywhere, nor stop it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

from tests.escape.attack import attack, script

import cloche
from cloche.testing.conformance import Target
from cloche.testing.conformance.terminal import command

ODD = r"""
os.chdir("/output")
os.symlink("/etc/passwd", "passwd")
os.symlink("../../../../../../../etc/shadow", "shadow")
os.symlink("/proc/1/environ", "environ")
os.symlink("/", "root")
os.symlink("/proc/self/root", "self")
os.symlink(".", "loop")
os.mkdir("folder")
os.symlink("/etc", "folder/etc")
os.mkfifo("fifo")
os.mkfifo("folder/fifo")
socket.socket(socket.AF_UNIX).bind("socket")
quietly(os.link, "/etc/passwd", "hard link to passwd")
quietly(os.link, "/workspace/attack.py", "hard link to the workspace")
open("twice", "w").write("x")
os.link("twice", "folder/twice")
quietly(os.mknod, "device", stat.S_IFCHR | 0o666, os.makedev(1, 9))
quietly(os.mknod, "block", stat.S_IFBLK | 0o666, os.makedev(254, 0))
NAMES = [b"new\nline", b"tab\t", b"..\\..\\windows", b"...", b".. ", b"..%2f..%2fetc", b"-rf", b"$(id)", b"`id`", b"a;b",
         b"'", b'"', b"\xff\xfe not utf-8", b"\x1b[2Jescape", b"\x7f", b"C:", b"con", b"~", b"*", b"\xe2\x80\xae",
         b"x" * 255, b" ", b"\r", b"a\\b", b"@c 0 hello 1 1 0"]
for name in NAMES:
    with open(name, "wb") as file:
        file.write(b"content")
deep = 0
fd = os.open(".", os.O_RDONLY)
for _ in range(1500):
    os.mkdir("deeper", dir_fd=fd)
    fd = os.open("deeper", os.O_RDONLY, dir_fd=fd)
    deep += 1
    if deep == 1500:
        os.close(os.open("at the bottom", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    if deep % 100 == 0:
        os.closerange(fd + 1, fd + 2)
sparse = os.open("sparse", os.O_CREAT | os.O_WRONLY)
quietly(os.ftruncate, sparse, MIB)
os.mkdir("closed")
open("closed/x", "w").write("x")
os.chmod("closed", 0)
"""
NAMES = 25


def _check_paths(paths: list[str]) -> None:
    for path in paths:
        assert not path.startswith("/")
        assert not any(part in {"", ".", ".."} for part in path.split("/"))
        assert "\0" not in path


async def test_odd_artifacts(sandbox: cloche.Sandbox) -> None:
    """Links, fifos, devices, endless depth, odd names and closed folders give no artifact that is not the script's own file.

    Guard: the collector opens each part with O_NOFOLLOW, takes regular files with one link, and the client checks paths again.
    """
    # Left by the depth: a process holds at most a thousand fds or so.
    setup = ODD.replace("    deep += 1\n", "    deep += 1\n    if deep > 1: os.close(before)\n    before = fd\n")
    result = await attack(sandbox, {"made": "deep != 1500"}, setup=setup, timeout=20)
    _check_paths([artifact.path for artifact in result.artifacts])
    odd = [artifact for artifact in result.artifacts if artifact.path != "sparse" and "deeper" not in artifact.path]
    assert {artifact.data for artifact in odd} <= {b"content", b"x"}
    assert sum(artifact.data == b"content" for artifact in odd) == NAMES
    assert not {"passwd", "shadow", "environ", "twice", "folder/twice", "fifo", "socket", "device", "block"} & {
        artifact.path for artifact in result.artifacts
    }
    assert not any(
        "hard link" in artifact.path or artifact.path.startswith(("root/", "self/", "loop/", "folder/etc/"))
        for artifact in result.artifacts
    )


async def test_closed_output(sandbox: cloche.Sandbox) -> None:
    """A script that closes /output itself, or puts it out of reach, loses its artifacts and nothing else."""
    for act in ("os.chmod('/output', 0)", "os.chmod('/output', 0o300)", "os.chmod('/output', 0o500)"):
        if sandbox.mode == "kubernetes":  # there /output is the node's, and open to all
            await attack(sandbox, {"closed": act}, setup="open('/output/x', 'w').close()\n")
        else:
            await attack(sandbox, {"closed": "False"}, setup=f"open('/output/x', 'w').close()\n{act}\n")


def test_written_by_the_command(target: Target, tmp_path: Path) -> None:
    """``--output DIR`` writes regular files below DIR and nothing elsewhere, whatever the names are."""
    source = tmp_path / "attack.py"
    source.write_text(
        script({}, ODD.replace("for _ in range(1500)", "for _ in range(20)").replace("deep == 1500", "deep == 20"))
    )
    folder, outside = tmp_path / "out", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    before = set(tmp_path.rglob("*"))
    done = subprocess.run(
        command("run", "--output", str(folder), "--json", str(source)),
        env=target.command_environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["outcome"] == "exited"
    made = set(tmp_path.rglob("*")) - before
    assert made
    for path in made:
        assert path.is_relative_to(folder)
        kind = path.lstat().st_mode
        assert stat.S_ISDIR(kind) or stat.S_ISREG(kind), path
        assert not kind & (stat.S_ISUID | stat.S_ISGID)
        if stat.S_ISREG(kind):
            assert path.stat().st_nlink == 1
    contents = {p.read_bytes() for p in made if p.is_file() and p.name not in ("sparse", "at the bottom")}
    assert contents <= {b"content", b"x"}


def test_existing_links_are_not_followed(target: Target, tmp_path: Path) -> None:
    """A link that already stands in the output folder is not written through: what it points to stays as it was."""
    outside = tmp_path / "outside.txt"
    outside.write_text("kept")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "report.txt").symlink_to(outside)
    (folder / "sub").symlink_to(elsewhere)
    source = tmp_path / "attack.py"
    source.write_text(
        "import os\nopen('/output/report.txt', 'w').write('stolen')\n"
        "os.mkdir('/output/sub')\nopen('/output/sub/x.txt', 'w').write('stolen')\n"
    )
    done = subprocess.run(
        command("run", "--output", str(folder), str(source)),
        env=target.command_environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr
    assert outside.read_text() == "kept"
    assert os.listdir(elsewhere) == []


async def test_many_artifacts(sandbox: cloche.Sandbox) -> None:
    """20,000 files in 2,000 folders neither stop nor slow the end. Guard: bounds in number and in all."""
    setup = r"""
for i in range(2000):
    os.makedirs("/output/%d" % i)
    for j in range(10):
        os.close(os.open("/output/%d/%d" % (i, j), os.O_CREAT | os.O_WRONLY))
"""
    result = await attack(sandbox, {"made": "False"}, setup=setup, timeout=30)
    assert len(result.artifacts) <= 1000
    _check_paths([artifact.path for artifact in result.artifacts])


async def test_a_workspace_that_traverses(sandbox: cloche.Sandbox, tmp_path: Path) -> None:
    """Names in the workspace that look like ways out arrive as names, and lead nowhere.

    Guard: names are parts of paths checked on both sides; the reader creates nothing through a link.
    """
    skill = tmp_path / "skill"
    for name in ("..\\evil", "...", "..;", "%2e%2e", "a/..b/..c", "~", "$HOME", "C:\\x", " ..", ".. "):
        path = skill / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (skill / "inside").symlink_to("a/../...")
    result = await attack(
        sandbox,
        {
            "elsewhere": "[f for f, d, files in everywhere(('/proc', '/workspace')) if {'..\\\\evil', '%2e%2e'} & set(files)]",
            "lost": "STRANGE - set(os.listdir('/workspace'))",
        },
        setup=f"STRANGE = set({sorted(os.listdir(skill))!r})",
        workspace=skill,
    )
    assert list(result.artifacts) == []
