"""Memory, processes, disk and output: each bounded, each bound known by its own name in the result."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import anyio
import pytest
from anyio import to_thread

import cloche
from cloche.testing.conformance import observe
from cloche.testing.conformance.target import Suite, Target, assert_exited, python, shell

MIB = 2**20
GIB = 2**30
CLIENT_GROWTH_BYTES = 16 * MIB

CLIENT_OF_A_FLOOD = """
import anyio, cloche, json, sys

def peak(reset=False):
    # Writing 5 sets the peak back to what is resident now (Linux, Documentation/filesystems/proc.rst, clear_refs).
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))

FLOOD = '''
import os, sys
os.write(1, b"HEAD\\\\n")
block = memoryview(b"x" * 2**20)
left = int(sys.argv[1])
while left:
    left -= os.write(1, block[:left])
os.write(1, b"\\\\nTAIL")
'''

async def main():
    async with cloche.Sandbox.from_env() as sandbox:
        spec = lambda n: cloche.Spec(name="main.py", content=FLOOD, args=[str(n)], timeout=60)
        await sandbox.run(spec(1000))
        before = peak(reset=True)
        result = await sandbox.run(spec(2**30))
        print(json.dumps({
            "growth": peak() - before, "outcome": result.outcome, "exit_code": result.exit_code,
            "bytes": result.stdout_bytes, "truncated": result.stdout_truncated, "kept": len(result.stdout_raw),
            "head": result.stdout[:10], "tail": result.stdout[-10:], "stderr": result.stderr,
        }))

anyio.run(main)
"""


class Limits(Suite):
    """What a script may use."""

    async def test_memory(self, sandbox: cloche.Sandbox) -> None:
        """A script that takes more memory than it may is ``out_of_memory``, with what it wrote before."""
        result = await sandbox.run(
            python(
                """
                print("before", flush=True)
                kept = []
                while True:
                    kept.append(b"x" * 2**22)
                """,
                memory="64Mi",
                timeout=30,
            )
        )
        assert (result.outcome, result.exit_code, result.signal) == (cloche.Outcome.OUT_OF_MEMORY, None, None)
        assert result.stdout == "before\n"
        assert not result.ok

    async def test_memory_of_many_processes(self, sandbox: cloche.Sandbox) -> None:
        """The bound holds for all processes of a run together, not for each."""
        result = await sandbox.run(
            python(
                """
                import os, time
                for _ in range(8):
                    if os.fork() == 0:
                        kept = b"x" * (32 * 2**20)
                        time.sleep(20)
                        os._exit(0)
                kept = b"x" * (32 * 2**20)
                time.sleep(20)
                """,
                memory="128Mi",
                timeout=10,
            )
        )
        # The kernel picks whom it kills. If that was never the main process, its time ran out.
        died = result.outcome is cloche.Outcome.OUT_OF_MEMORY
        assert died or (result.outcome is cloche.Outcome.TIMED_OUT and result.usage.oom_kills > 0), result

    async def test_enough_memory(self, sandbox: cloche.Sandbox) -> None:
        """Memory below the bound is really there."""
        result = await sandbox.run(python("kept = b'x' * (150 * 2**20); print(len(kept))", memory="256Mi"))
        assert_exited(result)

    async def test_killed_without_memory_trouble(self, sandbox: cloche.Sandbox) -> None:
        """A script that kills itself with SIGKILL was not out of memory."""
        result = await sandbox.run(shell("kill -9 $$", memory="64Mi"))
        assert (result.outcome, result.signal) == (cloche.Outcome.SIGNALED, "SIGKILL")

    async def test_fork_bomb(self, sandbox: cloche.Sandbox, target: Target) -> None:
        """A fork bomb meets its bound, the host stays responsive, the run ends in time, and nothing of it is left."""
        word = observe.marker()
        slowest = 0.0

        async def watch() -> None:
            nonlocal slowest
            while True:
                begin = time.monotonic()
                await anyio.run_process(["/bin/true"])
                slowest = max(slowest, time.monotonic() - begin)
                await anyio.sleep(0.1)

        source = """
            import os, time
            end = time.monotonic() + 20
            refused = 0
            while time.monotonic() < end:
                try:
                    os.fork()
                except OSError:
                    refused += 1
        """
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            result = await sandbox.run(python(source, args=[word], timeout=2, pids=64, memory="1Gi"))
            tasks.cancel_scope.cancel()
        assert result.outcome is cloche.Outcome.TIMED_OUT
        assert slowest < 2, f"starting /bin/true on the host took {slowest:.1f} s"
        if target.on_this_host:
            assert await to_thread.run_sync(observe.gone, word)

    async def test_pids(self, sandbox: cloche.Sandbox) -> None:
        """Never more processes and threads than the bound; the script sees the refusal and can go on."""
        result = await sandbox.run(
            python(
                """
                import os, signal
                children = []
                try:
                    while len(children) < 500:
                        pid = os.fork()
                        if pid == 0:
                            signal.pause()
                        children.append(pid)
                except OSError as exc:
                    print(exc.errno)
                print(len(children))
                """,
                pids=40,
                memory="1Gi",  # a kernel of the box's own takes several MiB for each process
            )
        )
        assert_exited(result)
        errno, children = map(int, result.stdout.split())
        assert errno == 11
        assert 20 <= children <= 40

    async def test_few_pids(self, sandbox: cloche.Sandbox) -> None:
        """A bound so low that an engine's own helpers would meet it holds all the same, and lets the script start."""
        result = await sandbox.run(
            python(
                """
                import os, signal
                children = []
                try:
                    while len(children) < 100:
                        pid = os.fork()
                        if pid == 0:
                            signal.pause()
                        children.append(pid)
                except OSError:
                    pass
                print(len(children))
                """,
                pids=5,
            )
        )
        assert_exited(result)
        assert 1 <= int(result.stdout) <= 5

    @pytest.mark.parametrize("folder", ["/tmp", "/output", "/dev/shm"])
    async def test_disk(self, sandbox: cloche.Sandbox, target: Target, folder: str) -> None:
        """A writable place is bounded at 64 MiB or less, or at least a file in it: the script sees that, and can go on."""
        result = await sandbox.run(
            python(
                """
                import errno, os, sys
                written = 0
                fd = os.open(sys.argv[1] + "/full", os.O_CREAT | os.O_WRONLY)
                try:
                    while written < 300 * 2**20:
                        written += os.write(fd, b"x" * 2**20)
                except OSError as exc:
                    print(errno.errorcode[exc.errno], written)
                os.unlink(sys.argv[1] + "/full")
                """,
                args=[folder],
                memory="256Mi",
            )
        )
        assert_exited(result)
        name, written = result.stdout.split()
        assert name in ({"ENOSPC"} if target.bounds_disks else {"ENOSPC", "EFBIG"})
        assert 4 * MIB <= int(written) <= 64 * MIB

    async def test_all_disks_at_once(self, sandbox: cloche.Sandbox, target: Target) -> None:
        """All writable places full together do not cost the run its memory."""
        result = await sandbox.run(
            python("""
                import errno, os
                for folder in ("/tmp", "/output", "/dev/shm"):
                    fd = os.open(folder + "/full", os.O_CREAT | os.O_WRONLY)
                    try:
                        while os.write(fd, b"x" * 2**20):
                            pass
                    except OSError as exc:
                        print(errno.errorcode[exc.errno])
                print("alive", len(b"x" * 2**24))
            """)
        )
        assert_exited(result)
        *full, alive = result.stdout.splitlines()
        assert len(full) == 3
        assert set(full) <= ({"ENOSPC"} if target.bounds_disks else {"ENOSPC", "EFBIG"})
        assert alive == "alive 16777216"

    async def test_multiprocessing(self, sandbox: cloche.Sandbox) -> None:
        """What needs /dev/shm, semaphores and pipes between processes works."""
        result = await sandbox.run(
            python("""
                import multiprocessing
                def square(x): return x * x
                if __name__ == "__main__":
                    with multiprocessing.get_context("fork").Pool(2) as pool:
                        print(pool.map(square, range(5)))
            """)
        )
        assert_exited(result)
        assert result.stdout == "[0, 1, 4, 9, 16]\n"

    async def test_threads(self, sandbox: cloche.Sandbox) -> None:
        """Threads start: the refusal of clone3 makes the C library fall back."""
        source = (
            "import threading as t; a = [t.Thread(target=print, args=(1,)) for _ in range(8)]; [x.start() for x in a]"
        )
        result = await sandbox.run(python(source))
        assert_exited(result)
        assert result.stdout.count("1") == 8

    async def test_no_core_dump(self, sandbox: cloche.Sandbox) -> None:
        """A crash writes no core file anywhere."""
        result = await sandbox.run(
            python("import os, resource; print(resource.getrlimit(resource.RLIMIT_CORE)); os.abort()")
        )
        assert result.signal == "SIGABRT"
        assert result.stdout in {"(0, 0)\n", ""}
        assert list(result.artifacts) == []

    def test_a_gibibyte_of_output(self, target: Target) -> None:
        """1 GiB of output is counted to the byte, its head and tail are kept, and the client grows by 16 MiB at most."""
        done = subprocess.run(
            [sys.executable, "-c", CLIENT_OF_A_FLOOD],
            env=target.command_environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        got = json.loads(done.stdout)
        assert (got["outcome"], got["exit_code"], got["stderr"]) == ("exited", 0, "")
        assert (got["bytes"], got["truncated"]) == (GIB + 10, True)
        assert got["kept"] <= MIB
        assert (got["head"], got["tail"]) == ("HEAD\nxxxxx", "xxxxx\nTAIL")
        assert got["growth"] <= CLIENT_GROWTH_BYTES, f"the client grew by {got['growth'] / MIB:.1f} MiB"
