"""What is kept of the output, exactly, and how much the frames of a run are together."""

from __future__ import annotations

import os

import pytest
from tests.supervisor.harness import PYTHON, Bench, Run

from cloche.spec import Limits
from cloche.supervisor.frames import Data

CAP = 10_000
TAIL = CAP // 4
FRAME = 6000
SIZES = {
    0, 1, 2, 3, TAIL - 1, TAIL, TAIL + 1, FRAME - 1, FRAME, FRAME + 1, CAP - TAIL - 1, CAP - TAIL, CAP - TAIL + 1,
    CAP - 1, CAP, CAP + 1, CAP + TAIL - 1, CAP + TAIL, CAP + TAIL + 1, 3 * CAP, 100_003,
}  # fmt: skip


def pattern(size: int) -> bytes:
    """Bytes that tell where they stand."""
    return b"".join(i.to_bytes(4, "big") for i in range(size // 4 + 1))[:size]


PATTERN = """
import os, sys
size = int(sys.argv[1])
data = memoryview(b"".join(i.to_bytes(4, "big") for i in range(size // 4 + 1))[:size])
for stream in map(int, sys.argv[2]):
    rest = data
    while rest: rest = rest[os.write(stream, rest):]
"""


def check(run: Run, cap: int, sizes: dict[str, int]) -> None:
    """Head and tail are the right bytes, together at most the cap, and the counts are right."""
    tail = cap // 4
    end = run.end
    for stream, size, told, truncated in (
        ("stdout", sizes.get("stdout", 0), end.stdout_bytes, end.stdout_truncated),
        ("stderr", sizes.get("stderr", 0), end.stderr_bytes, end.stderr_truncated),
    ):
        whole = pattern(size)
        assert told == size
        assert truncated is (size > cap)
        pieces = run.pieces("stdout" if stream == "stdout" else "stderr")
        want = [(0, whole)] if size <= cap else [(0, whole[: cap - tail]), (size - tail, whole[size - tail :])]
        assert pieces == [(offset, data) for offset, data in want if data]


@pytest.mark.parametrize("size", sorted(SIZES))
def test_head_and_tail(bench: Bench, size: int) -> None:
    """Up to the cap all is kept, beyond it three quarters of head and a quarter of tail, to the byte."""
    run = bench.run([PYTHON, "-I", "-S", "-c", PATTERN, str(size), "1"], limits=Limits(timeout_s=20, output_bytes=CAP))
    check(run, CAP, {"stdout": size})


@pytest.mark.parametrize("cap", [0, 1, 2, 3, 4, 5, 7, 8, FRAME * 4, FRAME * 4 + 4])
def test_small_and_odd_caps(bench: Bench, cap: int) -> None:
    """The same holds for a cap of nothing, of a few bytes, and where frames end with the head."""
    for size in {cap - 1, cap, cap + 1, 2 * cap + 3, 50_000}:
        if size >= 0:
            argv = [PYTHON, "-I", "-S", "-c", PATTERN, str(size), "12"]
            run = bench.run(argv, limits=Limits(timeout_s=20, output_bytes=cap))
            check(run, cap, {"stdout": size, "stderr": size})


def test_streams_are_capped_apart(bench: Bench) -> None:
    """A full stderr takes nothing of stdout."""
    code = f"{PATTERN}\nos.write(1, b'x' * 100)"
    run = bench.run([PYTHON, "-I", "-S", "-c", code, "1000000", "2"], limits=Limits(timeout_s=20, output_bytes=CAP))
    assert run.stdout == b"x" * 100
    assert run.end.stderr_truncated
    assert not run.end.stdout_truncated


def test_flood_never_blocks(bench: Bench) -> None:
    """Output far beyond the cap is drained, counted, and costs the reader nothing."""
    size = 64 * 2**20
    code = f"import os\nfor _ in range({size // 2**16}): os.write(1, b'x' * {2**16})"
    run = bench.python(code, limits=Limits(timeout_s=20, output_bytes=CAP))
    assert run.end.stdout_bytes == size
    assert len(run.raw) < 2 * CAP
    assert run.end.exit_code == 0


def test_one_byte_writes(bench: Bench) -> None:
    """A MiB in writes of one byte on each stream costs little more frames than in one piece."""
    code = "import os\nw = os.write\nfor i in range(2**20): w(1, b'o'); w(2, b'e')"
    run = bench.python(code, limits=Limits(timeout_s=60))
    assert run.stdout == b"o" * 2**20
    assert run.stderr == b"e" * 2**20
    payload = 2 * 2**20 * 4 / 3
    print(f"frames of 2 MiB in writes of one byte: {len(run.raw)} bytes, {len(run.raw) / payload:.3f} of their base64")
    assert len(run.raw) < payload + 2 * (1024 + 2**20 // FRAME + 10) * 64


def test_chatter_is_seen_but_bounded(bench: Bench) -> None:
    """A script that writes single bytes all the time is seen live to its end, in a bounded number of frames."""
    code = "import os, time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: os.write(1, b'x'); time.sleep(0.0002)"
    run = bench.python(code, limits=Limits(timeout_s=2, grace_s=0.1))
    frames = [frame for frame in run.frames if isinstance(frame, Data)]
    total = run.end.stdout_bytes
    assert sum(len(frame.data) for frame in frames) == total > 500
    assert 20 < len(frames) <= 1024 + total // FRAME + 1
    # In each fifth of the run something was sent.
    for fifth in range(5):
        assert any(total * fifth / 5 <= frame.offset < total * (fifth + 1) / 5 for frame in frames)


def test_binary_and_interleaved(bench: Bench) -> None:
    """Every byte value arrives, in order within its stream."""
    code = "import os\nfor i in range(256): os.write(1, bytes([i])); os.write(2, bytes([255 - i]))"
    run = bench.python(code)
    assert run.stdout == bytes(range(256))
    assert run.stderr == bytes(range(255, -1, -1))


def test_frames_cannot_be_forged(bench: Bench) -> None:
    """What looks like a frame in the output is output, and the supervisor's own descriptors are out of reach."""
    code = """
import os
os.write(1, b"@c 2 end exit 0 none 1 1 1 0 0 0 0 0 0 0\\n")
os.write(2, b"\\n@c 3 fail protocol-error QQ==\\n")
for path in ("/proc/1/fd/1", "/proc/1/fd/3", "/proc/1/fd", "/proc/1/mem", "/proc/1/task/1/fd/3", "/proc/1/root", "/proc/1/cwd"):
    for flags in (os.O_WRONLY, os.O_RDONLY, os.O_RDWR):
        try:
            fd = os.open(path, flags)
            print("opened", path, os.write(fd, b"@c 9 end\\n") if flags else os.listdir(fd))
        except OSError as e:
            pass
os._exit(3)
"""
    run = bench.python(code)
    assert run.stdout == b"@c 2 end exit 0 none 1 1 1 0 0 0 0 0 0 0\n"
    assert run.stderr == b"\n@c 3 fail protocol-error QQ==\n"
    assert run.end.exit_code == 3


def test_output_after_the_end_of_the_main_process_counts(bench: Bench) -> None:
    """What a pipe still holds when the script ends is not lost."""
    for _ in range(5):
        size = 60_000
        run = bench.run([PYTHON, "-I", "-S", "-c", PATTERN + "os._exit(0)", str(size), "12"])
        assert run.stdout == run.stderr == pattern(size)


def test_random_writes(bench: Bench) -> None:
    """Writes of random sizes on both streams keep head, tail and counts exact."""
    seed = int.from_bytes(os.urandom(4), "big")
    code = f"""
import os, random
r = random.Random({seed})
data = b"".join(i.to_bytes(4, "big") for i in range(60_000))
at = [0, 0, 0]
while max(at) < 200_000:
    stream, n = r.choice((1, 2)), int(r.expovariate(1 / r.choice((3, 300, 9000)))) + 1
    at[stream] += os.write(stream, data[at[stream]:at[stream] + n])
print(at, file=open("/output/sizes", "w"))
"""
    run = bench.run([PYTHON, "-c", code], limits=Limits(timeout_s=20, output_bytes=50_001))
    _, out, err = eval(run.files["sizes"].data)
    check(run, 50_001, {"stdout": out, "stderr": err})
