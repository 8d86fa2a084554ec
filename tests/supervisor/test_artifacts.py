"""What is collected from /output."""

from __future__ import annotations

import os

import pytest
from tests.supervisor.harness import Bench, Collected

from cloche.spec import Limits


def of(artifact_bytes: int = 4 * 2**20, artifact_count: int = 256) -> Limits:
    return Limits(timeout_s=20, artifact_bytes=artifact_bytes, artifact_count=artifact_count)


def test_nested_empty_binary_and_odd_names(bench: Bench) -> None:
    """Files come with their paths and bytes, whatever they are called, sorted by path."""
    names = ["a", "deep/er/b", "deep/c", "empty", "n\new\nline", "\u00fc", " ", "...", "@c 1 end", "x" * 255]
    code = f"""
import os
for name in {names!r}:
    os.makedirs(os.path.dirname("/output/" + name), exist_ok=True)
    open("/output/" + name, "wb").write(b"" if name == "empty" else bytes(range(256)) * 100 + name.encode())
open(b"/output/\\xff", "wb").write(b"latin")
os.mkdir("/output/no files")
"""
    run = bench.python(code)
    want = {name: b"" if name == "empty" else bytes(range(256)) * 100 + name.encode() for name in names} | {
        "\udcff": b"latin"
    }
    assert {path: file.data for path, file in run.files.items()} == want
    assert all(file.size == len(file.data) and not file.truncated for file in run.files.values())
    assert list(run.files) == sorted(run.files, key=os.fsencode)
    assert run.end.artifacts_skipped == 0


@pytest.mark.parametrize("size", [9_999, 10_000, 10_001, 40_000_000])
def test_bound_of_bytes(bench: Bench, size: int) -> None:
    """A file beyond the bound is cut to it, flagged, and told with its true size."""
    run = bench.python(f"open('/output/f', 'wb').write(b'x' * {size})", limits=of(artifact_bytes=10_000))
    assert run.files == {"f": Collected(size, truncated=size > 10_000, data=b"x" * min(size, 10_000))}


def test_bound_of_bytes_in_all(bench: Bench) -> None:
    """The bound is for all files together; those that do not fit are named, with nothing of their bytes."""
    run = bench.shell("cd /output; for f in a b c; do printf 12345 >$f; done; : >d", limits=of(artifact_bytes=8))
    assert run.files == {
        "a": Collected(5, truncated=False, data=b"12345"),
        "b": Collected(5, truncated=True, data=b"123"),
        "c": Collected(5, truncated=True, data=b""),
        "d": Collected(0, truncated=False, data=b""),
    }


def test_no_bytes_at_all(bench: Bench) -> None:
    """With bounds of nothing, nothing comes."""
    assert bench.shell("echo x >/output/x", limits=of(artifact_bytes=0)).files == {
        "x": Collected(2, truncated=True, data=b"")
    }
    run = bench.shell("echo x >/output/x", limits=of(artifact_count=0))
    assert run.files == {}
    assert run.end.artifacts_skipped == 1


def test_bound_of_count(bench: Bench) -> None:
    """Beyond the bound of files the others are counted as skipped."""
    run = bench.python("for i in range(20): open(f'/output/{i}', 'w')", limits=of(artifact_count=7))
    assert len(run.files) == 7
    assert run.end.artifacts_skipped == 13


def test_sparse_file(bench: Bench) -> None:
    """A file that is large but empty costs no more than the bound."""
    run = bench.python("open('/output/s', 'w').truncate(60_000_000)", limits=of(artifact_bytes=1000))
    assert run.files == {"s": Collected(60_000_000, truncated=True, data=bytes(1000))}


@pytest.mark.parametrize("mode", ["000", "100", "200", "300", "400", "600"])
def test_locked_folders_and_files(bench: Bench, mode: str) -> None:
    """A script cannot hide artifacts by locking them: it owns them, and so does the supervisor."""
    code = "cd /output; mkdir -p d/e; echo 1 >d/e/f; echo 2 >d/f; echo 3 >g; "
    run = bench.shell(f"{code} chmod {mode} d/e/f d/f g; chmod {mode} d/e; chmod {mode} d .")
    assert {path: file.data for path, file in run.files.items()} == {"d/e/f": b"1\n", "d/f": b"2\n", "g": b"3\n"}


def test_what_is_no_file_is_skipped(bench: Bench) -> None:
    """Links, fifos, sockets and files with two names are never read, and do not hold the run up."""
    code = """
import os, socket
os.chdir("/output")
os.symlink("/etc/passwd", "link")
os.symlink("/proc/self/environ", "environ")
os.symlink("/usr", "folder")
os.mkfifo("fifo")
socket.socket(socket.AF_UNIX).bind("socket")
open("one", "w").write("x")
os.link("one", "two")
os.symlink("nowhere", "dangling")
os.mkdir("d"); os.mkfifo("d/fifo"); open("d/real", "w").write("real")
for kind in (0o020000, 0o060000):
    try: os.mknod("device", kind | 0o666, os.makedev(1, 3)); print("made")
    except PermissionError: pass
"""
    run = bench.python(code)
    assert {path: file.data for path, file in run.files.items()} == {"d/real": b"real"}
    assert run.end.artifacts_skipped == 9
    assert run.stdout == b""
    assert run.end.run_us < 5e6


def test_deep_folders(bench: Bench) -> None:
    """Folders are read to a depth of 32 and paths of 1,024 bytes; what lies deeper is counted, not followed."""
    code = """
import os
os.chdir("/output")
for i in range(200):
    open("f", "w").write(str(i))
    os.mkdir("d"); os.chdir("d")
"""
    run = bench.python(code)
    assert len(run.files) == 33
    assert run.files["d/" * 32 + "f"].data == b"32"
    assert run.end.artifacts_skipped == 1
    folders = "/".join(["x" * 250] * 4)
    long = bench.python(f"import os\nos.makedirs('/output/{folders}/{'x' * 250}')\nopen('/output/{folders}/f', 'w')")
    assert list(long.files) == [f"{folders}/f"]
    assert long.end.artifacts_skipped == 1


def test_many_files(bench: Bench) -> None:
    """Tens of thousands of entries are walked in a bounded time; as many come as the plan allows, at most 4,096."""
    code = "import os\nfor i in range(20000): os.close(os.open(f'/output/{i}', os.O_CREAT | os.O_WRONLY))"
    run = bench.python(code, limits=of(artifact_count=10**6))
    assert len(run.files) == 4096
    assert run.end.artifacts_skipped == 20000 - 4096


@pytest.mark.parametrize("end", ["exit 3", "kill -9 $$", "sleep 100"])
def test_collected_however_it_ended(bench: Bench, end: str) -> None:
    """Artifacts come after an exit, a signal and a timeout."""
    run = bench.shell(f"echo x >/output/x; {end}", limits=Limits(timeout_s=0.3, grace_s=0.1))
    assert run.files["x"].data == b"x\n"


def test_not_collected_when_not_started(bench: Bench) -> None:
    """A script that was not started has no artifacts."""
    run = bench.run(["no-such-program"])
    assert run.files == {}
