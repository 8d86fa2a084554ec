"""What a program wrote: exact, separate, bounded, and there while it still runs."""

from __future__ import annotations

import time

import anyio
import pytest

import cloche
from cloche.testing.conformance.target import Suite, Target, assert_exited, python, shell

MIB = 2**20
MAX_FRAME_STREAM_BYTES = 10 * MIB - 6 * MIB
"""What output may take of all frames: the kubelet rotates a log at 10 MiB, and artifacts of 4 MiB take 5.6 in base64."""
FRAME_OVERHEAD_BYTES = 32
"""Of one output frame: magic, number, kind, offset, spaces, line end. The longest is a little more."""

WRITERS = {
    # name: (statements that write, stdout, stderr); o and e write bytes, unbuffered
    "nothing": ("pass", b"", b""),
    "no final newline": ("o(b'abc')", b"abc", b""),
    "both": ("o(b'out\\n'); e(b'err\\n')", b"out\n", b"err\n"),
    "only stderr": ("e(b'err')", b"", b"err"),
    "only newlines": ("o(b'\\n\\n\\n')", b"\n\n\n", b""),
    "all bytes": (
        "o(bytes(range(256)) * 8); e(bytes(range(255, -1, -1)))",
        bytes(range(256)) * 8,
        bytes(range(255, -1, -1)),
    ),
    "invalid utf-8": ("o(b'a\\xff\\xc3\\x28\\xed\\xa0\\x80z')", b"a\xff\xc3\x28\xed\xa0\x80z", b""),
    "nul bytes": ("o(b'a\\0b\\0'); e(b'\\0')", b"a\0b\0", b"\0"),
    "crlf": ("o(b'a\\r\\nb\\rc\\n')", b"a\r\nb\rc\n", b""),
    "64 KiB line": ("o(b'x' * 65536 + b'\\n'); e(b'y' * 65536)", b"x" * 65536 + b"\n", b"y" * 65536),
    "interleaved": (
        "for i in range(500): o(b'o%d\\n' % i); e(b'e%d\\n' % i)",
        b"".join(b"o%d\n" % i for i in range(500)),
        b"".join(b"e%d\n" % i for i in range(500)),
    ),
    "just under the cap": ("o(b'x' * (2**20 - 1)); e(b'y')", b"x" * (2**20 - 1), b"y"),
    "exactly the cap": ("o(b'x' * 2**20)", b"x" * 2**20, b""),
    "closed stdout": ("o(b'1'); os.close(1); e(b'2')", b"1", b"2"),
    "closed stderr": ("e(b'1'); os.close(2); o(b'2')", b"2", b"1"),
    "both closed": ("os.close(1); os.close(2)", b"", b""),
    "a child's": ("o(b'1'); os.system('printf 2; printf 3 >&2'); o(b'4')", b"124", b"3"),
    "cut character": ("o(b'\\xe2\\x82'); time.sleep(0.2); o(b'\\xac')", b"\xe2\x82\xac", b""),
}
PROLOGUE = """
import os, sys, time
def write(fd, data):
    while data:
        data = data[os.write(fd, data):]
def o(data): write(1, data)
def e(data): write(2, data)
"""


class Streams(Suite):
    """stdout and stderr."""

    @pytest.mark.parametrize("name", WRITERS)
    async def test_exact(self, sandbox: cloche.Sandbox, name: str) -> None:
        """stdout and stderr arrive byte for byte, apart from each other, uncut below the cap."""
        code, out, err = WRITERS[name]
        result = await sandbox.run(cloche.Spec(name="main.py", content=f"{PROLOGUE}\n{code}\nos._exit(0)\n"))
        assert_exited(result)
        assert result.stdout_raw == out
        assert result.stderr_raw == err
        assert (result.stdout, result.stderr) == (out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
        assert (result.stdout_bytes, result.stderr_bytes) == (len(out), len(err))
        assert not result.stdout_truncated
        assert not result.stderr_truncated

    async def test_events_in_order(self, sandbox: cloche.Sandbox) -> None:
        """A run's events are one Started, then outputs that join without a gap, then one Finished; run() is their fold."""
        spec = shell("for i in 1 2 3; do echo out$i; echo err$i >&2; sleep 0.1; done; exit 4")
        events = [event async for event in sandbox.stream(spec)]
        assert isinstance(events[0], cloche.Started)
        assert isinstance(events[-1], cloche.Finished)
        assert (events[-1].outcome, events[-1].exit_code) == (cloche.Outcome.EXITED, 4)
        assert all(isinstance(event, cloche.Output) for event in events[1:-1])
        got = {"stdout": b"", "stderr": b""}
        for event in events[1:-1]:
            assert isinstance(event, cloche.Output)
            assert event.offset == len(got[event.stream])
            got[event.stream] += event.data
        assert got == {"stdout": b"out1\nout2\nout3\n", "stderr": b"err1\nerr2\nerr3\n"}
        result = await sandbox.run(spec)
        assert (result.stdout_raw, result.stderr_raw) == (got["stdout"], got["stderr"])

    async def test_output_arrives_while_the_script_runs(self, sandbox: cloche.Sandbox) -> None:
        """An event of the output is there long before the script ends."""
        started = time.monotonic()
        arrived = None
        last = started
        async for event in sandbox.stream(python("import time; print('now', flush=True); time.sleep(3)", timeout=20)):
            if isinstance(event, cloche.Output) and arrived is None:
                assert event.data == b"now\n"
                arrived = time.monotonic()
            last = time.monotonic()
        assert arrived is not None
        assert last - arrived > 2, f"the output came {last - arrived:.2f} s before the end of a script that slept 3 s"
        assert last - started < 15

    async def test_head_and_tail_are_kept(self, sandbox: cloche.Sandbox) -> None:
        """Output over the cap is cut in its middle, flagged and counted exactly; each stream for itself."""
        result = await sandbox.run(
            python("""
                import sys
                for i in range(400_000):
                    sys.stdout.write(f"{i:09}\\n")
                sys.stderr.write("short")
            """)
        )
        assert_exited(result)
        raw = result.stdout_raw
        assert (result.stdout_bytes, result.stdout_truncated) == (4_000_000, True)
        assert len(raw) <= MIB
        assert len(raw) > MIB // 2
        assert raw.startswith(b"".join(b"%09d\n" % i for i in range(1000)))
        assert raw.endswith(b"".join(b"%09d\n" % i for i in range(399_000, 400_000)))
        assert (result.stderr_raw, result.stderr_truncated, result.stderr_bytes) == (b"short", False, 5)

    async def test_one_byte_writes_stay_within_the_frame_budget(self, sandbox: cloche.Sandbox) -> None:
        """1 MiB in unbuffered writes of one byte, on both streams, costs no more frames than a pod's log can hold."""
        spec = python(
            """
            import os
            for i in range(2**20):
                os.write(1, b"%d" % (i % 10))
                if i % 16 == 0:
                    os.write(2, b"!")
            """,
            timeout=60,
        )
        frames = 0
        got = {"stdout": bytearray(), "stderr": bytearray()}
        async for event in sandbox.stream(spec):
            if isinstance(event, cloche.Output):
                frames += FRAME_OVERHEAD_BYTES + len(event.data) * 4 // 3
                got[event.stream] += event.data
        assert bytes(got["stdout"]) == (b"0123456789" * (MIB // 10 + 1))[:MIB]
        assert bytes(got["stderr"]) == b"!" * (MIB // 16)
        assert frames <= MAX_FRAME_STREAM_BYTES, f"{frames} bytes of frames"

    async def test_more_than_the_cap_never_blocks_the_script(self, sandbox: cloche.Sandbox) -> None:
        """A script that writes far over the cap goes on to its own end."""
        source = "import os\nfor _ in range(200): os.write(1, b'x' * 2**20); os.write(2, b'y' * 2**19)\nos._exit(7)"
        result = await sandbox.run(python(source, timeout=30))
        assert_exited(result, 7)
        assert result.stdout_truncated
        assert result.stderr_truncated
        # A write to a pipe may be short only when a signal comes: none does.
        assert (result.stdout_bytes, result.stderr_bytes) == (200 * MIB, 100 * MIB)

    async def test_a_slow_reader_does_not_stop_the_clock(self, sandbox: cloche.Sandbox) -> None:
        """A client that does not read for a while gains the script no time."""
        finished = None
        stalled = False
        async for event in sandbox.stream(python("while True: print('x' * 1000)", timeout=1)):
            if isinstance(event, cloche.Output) and not stalled:
                stalled = True
                await anyio.sleep(2.5)
            if isinstance(event, cloche.Finished):
                finished = event
        assert finished is not None
        assert finished.outcome is cloche.Outcome.TIMED_OUT
        assert 990 <= finished.run_ms < 2000

    async def test_smaller_cap(self, target: Target) -> None:
        """The cap is a setting, and head and tail together never exceed it."""
        async with target.sandbox(CLOCHE_MAX_OUTPUT_BYTES="4096") as sandbox:
            result = await sandbox.run(python("import sys; sys.stdout.write('a' * 5000 + 'z' * 5000)"))
        assert_exited(result)
        assert (result.stdout_bytes, result.stdout_truncated) == (10_000, True)
        assert 2048 <= len(result.stdout_raw) <= 4096
        assert result.stdout_raw[:1] == b"a"
        assert result.stdout_raw[-1:] == b"z"
