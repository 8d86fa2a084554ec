"""The delivered folder and the script in it: what arrives, and what is refused before anything starts."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

import cloche
from cloche.testing.conformance.target import Suite, Target, assert_exited, python, shell


def write(root: Path, files: dict[str, str]) -> Path:
    """Fill a folder with text files by their relative paths."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


class Workspaces(Suite):
    """``/workspace``."""

    async def test_what_arrives(self, sandbox: cloche.Sandbox, tmp_path: Path) -> None:
        """Nested folders, odd names, empty files and folders arrive as they are, and nothing else."""
        files = {
            "main.py": "import os\nfor d, _, fs in sorted(os.walk('.')):\n    print(ascii(d), *map(ascii, sorted(fs)))\n",
            "a/b/c/deep.txt": "deep",
            "with space/ü 日本.txt": "x",
            "-dash/..dots": "x",
            "new\nline": "x",
            "empty.txt": "",
        }
        (write(tmp_path, files) / "nothing/in/it").mkdir(parents=True)
        result = await sandbox.run(cloche.Spec(script="main.py", workspace=tmp_path))
        assert_exited(result)
        expected = [
            " ".join([ascii(os.path.join(".", d) if d != "." else "."), *map(ascii, sorted(fs))])
            for d, fs in sorted((os.path.relpath(d, tmp_path), fs) for d, _, fs in os.walk(tmp_path))
        ]
        assert sorted(result.stdout.splitlines()) == sorted(expected)

    async def test_content_is_exact(self, sandbox: cloche.Sandbox, tmp_path: Path) -> None:
        """A file's bytes arrive unchanged, whatever they are."""
        data = bytes(range(256)) * 1200
        (tmp_path / "data.bin").write_bytes(data)
        source = "import sys; sys.stdout.buffer.write(open('data.bin', 'rb').read())"
        result = await sandbox.run(python(source, workspace=tmp_path))
        assert_exited(result)
        assert result.stdout_raw == data

    async def test_skill(self, sandbox: cloche.Sandbox, tmp_path: Path) -> None:
        """A script in a subfolder imports its sibling, reads by paths relative to the workspace, and runs a helper."""
        write(
            tmp_path,
            {
                "scripts/main.py": "import subprocess, sibling\nprint(sibling.NAME, open('data/in.txt').read())\n"
                "print(subprocess.run(['./scripts/helper', 'x y'], capture_output=True, text=True, check=True).stdout)\n",
                "scripts/sibling.py": "NAME = 'sibling'\n",
                "scripts/helper": '#!/bin/sh\necho "helped with $1"\n',
                "data/in.txt": "data",
            },
        )
        (tmp_path / "scripts/helper").chmod(0o755)
        result = await sandbox.run(cloche.Spec(script="scripts/main.py", workspace=tmp_path))
        assert_exited(result)
        assert result.stdout == "sibling data\nhelped with x y\n\n"

    async def test_modes(self, sandbox: cloche.Sandbox, tmp_path: Path) -> None:
        """An executable file is executable in the box, another is not; what only its owner may read can be read."""
        write(tmp_path, {"tool": "#!/bin/sh\necho ran\n", "plain": "#!/bin/sh\necho ran\n"})
        (tmp_path / "tool").chmod(0o700)
        (tmp_path / "plain").chmod(0o600)
        result = await sandbox.run(
            shell("./tool; test ! -x plain && cat plain >/dev/null && echo ok", workspace=tmp_path)
        )
        assert_exited(result)
        assert result.stdout == "ran\nok\n"

    async def test_setuid_bits_do_not_arrive(self, sandbox: cloche.Sandbox, tmp_path: Path) -> None:
        """No file of the workspace is setuid or setgid for the script's purposes: running it changes no identity."""
        write(tmp_path, {"tool": "#!/bin/sh\ngrep -E '^(Uid|Gid):' /proc/self/status\n"})
        (tmp_path / "tool").chmod(0o6755)
        script = "./tool > /tmp/a && grep -E '^(Uid|Gid):' /proc/self/status > /tmp/b && cmp /tmp/a /tmp/b && echo same"
        result = await sandbox.run(shell(script, workspace=tmp_path))
        assert_exited(result)
        assert result.stdout == "same\n"

    async def test_read_only(self, sandbox: cloche.Sandbox, target: Target, tmp_path: Path) -> None:
        """The script cannot write, remove or rename anything in the workspace, and the host's folder is unchanged. Where the
        engine seals it, modes and times stay as they are, too.
        """
        write(tmp_path, {"kept.txt": "kept", "folder/kept.txt": "kept"})
        (tmp_path / "folder").chmod(0o777)
        (tmp_path / "kept.txt").chmod(0o666)
        before = {p: (p.stat().st_mtime_ns, p.stat().st_mode) for p in [tmp_path, *tmp_path.rglob("*")]}
        result = await sandbox.run(
            python(
                """
                import os, sys
                attempts = [
                    lambda: open("kept.txt", "a"), lambda: open("new.txt", "w"), lambda: open("folder/new.txt", "w"),
                    lambda: os.unlink("kept.txt"), lambda: os.rename("kept.txt", "moved.txt"), lambda: os.mkdir("new"),
                    lambda: os.symlink("a", "b"), lambda: os.truncate("kept.txt", 0),
                    lambda: os.rmdir("folder"), lambda: os.link("kept.txt", "hard"),
                ]
                attributes = [lambda: os.chmod("kept.txt", 0o600), lambda: os.utime("kept.txt")]
                if sys.argv[1] == "True":
                    attempts += attributes
                else:
                    for each in attributes:
                        each()
                for i, attempt in enumerate(attempts):
                    try:
                        attempt()
                    except OSError as exc:
                        continue
                    print("attempt", i, "succeeded")
                print("done")
                """,
                args=[str(target.seals_workspace)],
                workspace=tmp_path,
            )
        )
        assert_exited(result)
        assert result.stdout == "done\n"
        assert {p: (p.stat().st_mtime_ns, p.stat().st_mode) for p in [tmp_path, *tmp_path.rglob("*")]} == before

    async def test_links_inside(self, sandbox: cloche.Sandbox, tmp_path: Path) -> None:
        """A symbolic link that stays inside the folder works in the box, to a file, to a folder and upwards."""
        write(tmp_path, {"a/data.txt": "data", "b/x": "x"})
        (tmp_path / "b/file").symlink_to("../a/data.txt")
        (tmp_path / "folder").symlink_to("a")
        result = await sandbox.run(shell("cat b/file folder/data.txt; readlink b/file", workspace=tmp_path))
        assert_exited(result)
        assert result.stdout == "datadata../a/data.txt\n"

    @pytest.mark.parametrize(
        "target_path", ["/etc/passwd", "../outside", "../../../../etc/passwd", "/", "a/../../outside", ".."]
    )
    async def test_links_that_leave_are_refused(
        self, sandbox: cloche.Sandbox, tmp_path: Path, target_path: str
    ) -> None:
        """A symbolic link that leaves the folder is refused, and the error names it."""
        (tmp_path / "outside").write_text("secret")
        folder = write(tmp_path / "skill", {"a/x": "x"})
        (folder / "a/leaves here").symlink_to(target_path if target_path.startswith("/") else f"../{target_path}")
        with pytest.raises(cloche.InvalidSpec, match="a/leaves here") as caught:
            await sandbox.run(python("pass", workspace=folder))
        assert caught.value.code == "invalid-spec"

    @pytest.mark.parametrize("kind", ["fifo", "socket"])
    async def test_special_files_are_refused(self, sandbox: cloche.Sandbox, tmp_path: Path, kind: str) -> None:
        """A workspace that holds a fifo or a socket is refused by name; nothing waits for a writer."""
        if kind == "fifo":
            os.mkfifo(tmp_path / "odd one")
        else:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(tmp_path / "odd one"))
        assert not stat.S_ISREG((tmp_path / "odd one").stat().st_mode)
        with pytest.raises(cloche.InvalidSpec, match="odd one"):
            await sandbox.run(python("pass", workspace=tmp_path))

    async def test_workspace_too_large(self, target: Target, tmp_path: Path) -> None:
        """A workspace over its bound is refused; stdin counts with it; one just below is taken."""
        (tmp_path / "data.bin").write_bytes(b"x" * 900_000)
        async with target.sandbox(CLOCHE_MAX_WORKSPACE_BYTES="1M") as sandbox:
            assert_exited(await sandbox.run(python("pass", workspace=tmp_path, stdin=b"x" * 1000)))
            for fields in ({"stdin": b"x" * 200_000}, {"workspace": tmp_path, "stdin": b"x" * 200_000}):
                too_large = "workspace" in fields
                if too_large:
                    with pytest.raises(cloche.WorkspaceTooLarge) as caught:
                        await sandbox.run(python("pass", **fields))
                    assert caught.value.code == "workspace-too-large"
                    assert "CLOCHE_MAX_WORKSPACE_BYTES" in caught.value.hint
                else:
                    assert_exited(await sandbox.run(python("pass", **fields)))
            (tmp_path / "more.bin").write_bytes(b"x" * 200_000)
            with pytest.raises(cloche.WorkspaceTooLarge):
                await sandbox.run(python("pass", workspace=tmp_path))

    async def test_content_with_a_workspace(self, sandbox: cloche.Sandbox, tmp_path: Path) -> None:
        """Text given beside a workspace runs in it under its name, and the host's folder is not touched."""
        write(tmp_path, {"lib.py": "X = 7\n"})
        result = await sandbox.run(
            cloche.Spec(
                name="sub/run.py",
                content="import sys; sys.path.insert(0, '.'); import lib; print(lib.X, __file__)",
                workspace=tmp_path,
            )
        )
        assert_exited(result)
        assert result.stdout == "7 /workspace/sub/run.py\n"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["lib.py"]


SAME = {
    "main.py": ("python3", "import sys; print('hello', sys.argv[1]); print('err', file=sys.stderr); sys.exit(3)"),
    "main.sh": ("bash", 'echo "hello $1"; echo err >&2; exit 3'),
    "main.js": ("node", "console.log('hello', process.argv[2]); console.error('err'); process.exitCode = 3"),
    "main.pl": ("perl", 'print "hello $ARGV[0]\\n"; print STDERR "err\\n"; exit 3'),
    "main.rb": ("ruby", "puts \"hello #{ARGV[0]}\"; warn 'err'; exit 3"),
    "main.php": ("php", '<?php echo "hello $argv[1]\\n"; fwrite(STDERR, "err\\n"); exit(3);'),
    "main": ("sh", 'echo "hello $1"; echo err >&2; exit 3'),
    "run": ("perl", '#!/usr/bin/env perl\nprint "hello $ARGV[0]\\n"; print STDERR "err\\n"; exit 3'),
}
OPTIONAL = {"ruby", "php"}
"""Interpreters that a box may lack without any loss to the suite."""


class Interpreters(Suite):
    """Which program runs the script."""

    @pytest.mark.parametrize("name", SAME)
    async def test_by_suffix(self, sandbox: cloche.Sandbox, target: Target, tmp_path: Path, name: str) -> None:
        """Text, a file alone and a file in a workspace run the same, by the interpreter of their suffix or shebang."""
        interpreter, source = SAME[name]
        if interpreter not in OPTIONAL:
            target.need(interpreter)
        (tmp_path / name).write_text(source)
        specs = [
            cloche.Spec(name=name, content=source, args=["you & me"]),
            cloche.Spec(script=str(tmp_path / name), args=["you & me"]),
            cloche.Spec(script=name, workspace=tmp_path, args=["you & me"]),
            cloche.Spec(script=name, workspace=tmp_path, interpreter=interpreter, args=["you & me"]),
        ]
        for spec in specs:
            if interpreter not in target.interpreters:
                with pytest.raises(cloche.InterpreterMissing, match=interpreter):
                    await sandbox.run(spec)
                continue
            result = await sandbox.run(spec)
            assert_exited(result, 3)
            assert (result.stdout, result.stderr) == ("hello you & me\n", "err\n")

    async def test_missing_interpreter(self, sandbox: cloche.Sandbox) -> None:
        """An interpreter that the box lacks is an error that names it, not a result."""
        with pytest.raises(cloche.InterpreterMissing, match="no-such-program") as caught:
            await sandbox.run(cloche.Spec(name="main.py", content="pass", interpreter="no-such-program"))
        assert caught.value.code == "interpreter-missing"
        assert caught.value.hint

    async def test_script_alone(self, sandbox: cloche.Sandbox, tmp_path: Path) -> None:
        """A script without a workspace is delivered alone: its neighbours on the host stay there."""
        write(tmp_path, {"main.py": "import os; print(os.listdir('.'))", "neighbour.txt": "secret"})
        result = await sandbox.run(cloche.Spec(script=str(tmp_path / "main.py")))
        assert_exited(result)
        assert result.stdout == "['main.py']\n"
