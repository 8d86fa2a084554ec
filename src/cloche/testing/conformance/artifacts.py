"""What a script leaves in ``/output``: regular files, bounded, and never anything that points elsewhere."""

from __future__ import annotations

import hashlib

import pytest

import cloche
from cloche.testing.conformance.target import Suite, Target, assert_exited, python, shell

MIB = 2**20


class Artifacts(Suite):
    """``/output``."""

    async def test_collected(self, sandbox: cloche.Sandbox) -> None:
        """Nested, empty, binary and oddly named files come back exact, with size and digest, in a stable order."""
        result = await sandbox.run(
            python("""
                import os
                os.makedirs("/output/a/b c/ü")
                os.makedirs("/output/empty folder")
                files = {"z.txt": b"z", "empty": b"", "all.bin": bytes(range(256)) * 100, "a/b c/ü/deep.txt": b"deep",
                         "..dots": b"d", "-dash": b"-", "new\\nline": b"n"}
                for name, data in files.items():
                    with open("/output/" + name, "wb") as file:
                        file.write(data)
            """)
        )
        assert_exited(result)
        expected = {
            "z.txt": b"z",
            "empty": b"",
            "all.bin": bytes(range(256)) * 100,
            "a/b c/ü/deep.txt": b"deep",
            "..dots": b"d",
            "-dash": b"-",
            "new\nline": b"n",
        }
        assert {a.path: a.data for a in result.artifacts} == expected
        for artifact in result.artifacts:
            assert artifact.size == len(expected[artifact.path])
            assert artifact.sha256 == hashlib.sha256(expected[artifact.path]).hexdigest()
            assert not artifact.truncated

    async def test_private(self, sandbox: cloche.Sandbox) -> None:
        """What only the script's own user may read is collected like the rest."""
        result = await sandbox.run(shell("umask 077; mkdir /output/folder; echo mine > /output/folder/file"))
        assert_exited(result)
        assert [(a.path, a.data) for a in result.artifacts] == [("folder/file", b"mine\n")]
        assert result.artifacts_skipped == 0

    async def test_none(self, sandbox: cloche.Sandbox) -> None:
        """A script that leaves nothing has no artifacts."""
        result = await sandbox.run(shell("mkdir /output/folder; echo x > /tmp/elsewhere"))
        assert_exited(result)
        assert list(result.artifacts) == []

    async def test_file_too_large(self, sandbox: cloche.Sandbox) -> None:
        """A file over the bound comes as its beginning, flagged, with its true size."""
        result = await sandbox.run(
            python("""
                with open("/output/large.bin", "wb") as file:
                    for i in range(6 * 2**20 // 8):
                        file.write(b"%07d\\n" % i)
            """)
        )
        assert_exited(result)
        (artifact,) = result.artifacts
        assert (artifact.path, artifact.size, artifact.truncated) == ("large.bin", 6 * MIB, True)
        assert 0 < len(artifact.data) <= 4 * MIB
        assert (
            artifact.data == b"".join(b"%07d\n" % i for i in range(len(artifact.data) // 8 + 1))[: len(artifact.data)]
        )

    async def test_all_together_are_bounded(self, target: Target) -> None:
        """The bound holds for all files together; what does not fit is cut or left out, and said so."""
        async with target.sandbox(CLOCHE_MAX_ARTIFACT_BYTES="100000") as sandbox:
            result = await sandbox.run(python("for i in range(5): open(f'/output/{i}', 'wb').write(b'x' * 40_000)"))
        assert_exited(result)
        assert sum(len(a.data) for a in result.artifacts) <= 100_000
        assert sum(not a.truncated for a in result.artifacts) == 2
        assert all(len(a.data) == 40_000 for a in result.artifacts if not a.truncated)

    async def test_only_regular_files(self, sandbox: cloche.Sandbox) -> None:
        """Links, fifos and sockets are neither followed nor read nor waited for; files beside them still come."""
        result = await sandbox.run(
            python(
                """
                import os, socket
                os.chdir("/output")
                os.mkdir("folder")
                open("folder/kept.txt", "w").write("kept")
                os.symlink("/etc/passwd", "link")
                os.symlink("folder/kept.txt", "inner link")
                os.symlink("/usr", "folder link")
                os.symlink("..", "folder/up")
                os.symlink("missing", "dangling")
                os.mkfifo("fifo")
                socket.socket(socket.AF_UNIX).bind("socket")
                open("one", "w").write("two names")
                os.link("one", "two")
                """,
                timeout=10,
            )
        )
        assert_exited(result)
        assert [(a.path, a.data) for a in result.artifacts] == [("folder/kept.txt", b"kept")]

    async def test_closed_by_their_owner(self, sandbox: cloche.Sandbox) -> None:
        """Files and folders without any permission neither stop the collection nor change the ending."""
        result = await sandbox.run(
            python("""
                import os
                os.makedirs("/output/closed/inner")
                open("/output/closed/inner/file", "w").write("x")
                open("/output/unreadable", "w").write("x")
                open("/output/kept", "w").write("kept")
                os.chmod("/output/unreadable", 0)
                os.chmod("/output/closed", 0)
            """)
        )
        assert_exited(result)
        assert ("kept", b"kept") in [(a.path, a.data) for a in result.artifacts]

    async def test_ten_thousand_files(self, sandbox: cloche.Sandbox) -> None:
        """More files than the bound end the collection, not the run, and in good time."""
        result = await sandbox.run(
            python("for i in range(10_000): open(f'/output/{i:05}', 'w').write(str(i))", timeout=30)
        )
        assert_exited(result)
        assert 0 < len(result.artifacts) <= 1000
        assert all(a.data.decode() == str(int(a.path)) for a in result.artifacts)
        collect_ms = result.timings_ms["collect"]
        assert collect_ms is None or collect_ms < 5000

    @pytest.mark.parametrize(
        ("ending", "outcome"),
        [
            ("raise SystemExit(9)", cloche.Outcome.EXITED),
            ("os.kill(os.getpid(), 9)", cloche.Outcome.SIGNALED),
            ("time.sleep(60)", cloche.Outcome.TIMED_OUT),
        ],
        ids=["failed", "killed", "timed out"],
    )
    async def test_collected_however_it_ended(
        self, sandbox: cloche.Sandbox, ending: str, outcome: cloche.Outcome
    ) -> None:
        """Artifacts are collected also from a script that failed, died or ran out of time."""
        source = f"import os, time\nopen('/output/partial.txt', 'w').write('partial')\n{ending}"
        result = await sandbox.run(cloche.Spec(name="main.py", content=source, timeout=1))
        assert result.outcome is outcome
        assert [(a.path, a.data) for a in result.artifacts] == [("partial.txt", b"partial")]

    async def test_events(self, sandbox: cloche.Sandbox) -> None:
        """An artifact is an event of its own, before the last one."""
        events = [event async for event in sandbox.stream(shell("echo made > /output/made.txt"))]
        assert [type(event).__name__ for event in events] == ["Started", "Artifact", "Finished"]
        artifact = events[1]
        assert isinstance(artifact, cloche.Artifact)
        assert (artifact.path, artifact.data, artifact.size) == ("made.txt", b"made\n", 5)
