"""How a program ended: exit codes and signals, never one taken for the other."""

from __future__ import annotations

import pytest

import cloche
from cloche.testing.conformance.target import Suite, assert_exited, python, shell


class Endings(Suite):
    """Exit codes and signals."""

    @pytest.mark.parametrize("code", [0, 1, 3, 42, 255])
    async def test_exit_code(self, sandbox: cloche.Sandbox, code: int) -> None:
        """The exit code is the script's own."""
        result = await sandbox.run(python(f"raise SystemExit({code})"))
        assert_exited(result, code)
        assert result.ok is (code == 0)
        assert result.mode == sandbox.mode

    @pytest.mark.parametrize("code", [124, 130, 137, 139, 143])
    async def test_exit_code_that_looks_like_another_ending(self, sandbox: cloche.Sandbox, code: int) -> None:
        """A script that itself exits with 124, 137 and the like has exited: nothing is guessed from a number."""
        assert_exited(await sandbox.run(shell(f"exit {code}")), code)

    @pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM", "SIGSEGV", "SIGABRT", "SIGINT", "SIGPIPE", "SIGUSR1"])
    async def test_signal(self, sandbox: cloche.Sandbox, signal: str) -> None:
        """A script ended by a signal has that signal by name and no exit code."""
        result = await sandbox.run(
            python(f"""
                import os, signal
                print("before", flush=True)
                if signal.{signal} != signal.SIGKILL:
                    signal.signal(signal.{signal}, signal.SIG_DFL)
                os.kill(os.getpid(), signal.{signal})
            """)
        )
        assert (result.outcome, result.signal, result.exit_code) == (cloche.Outcome.SIGNALED, signal, None)
        assert result.stdout == "before\n"
        assert not result.ok

    async def test_a_childs_signal_is_not_the_scripts(self, sandbox: cloche.Sandbox) -> None:
        """A shell that reports a child's death by signal as 137 has exited with 137."""
        assert_exited(await sandbox.run(shell("sh -c 'kill -9 $$'; exit $?")), 137)

    async def test_uncaught_exception(self, sandbox: cloche.Sandbox) -> None:
        """A traceback goes to stderr, and the exit code is the interpreter's."""
        result = await sandbox.run(python("raise ValueError('seen')"))
        assert_exited(result, 1)
        assert "ValueError: seen" in result.stderr
        assert result.stdout == ""

    async def test_orphans_do_not_change_the_ending(self, sandbox: cloche.Sandbox) -> None:
        """Children that end before, or are reaped after, the main process do not change its exit code."""
        result = await sandbox.run(
            python("""
                import os
                for _ in range(20):
                    if os.fork() == 0:
                        if os.fork() == 0:
                            os._exit(9)
                        os._exit(8)
                raise SystemExit(5)
            """)
        )
        assert_exited(result, 5)

    async def test_usage_and_timings(self, sandbox: cloche.Sandbox) -> None:
        """The result tells what the run took: processor time, memory, and the time of each phase."""
        result = await sandbox.run(
            python("""
                import time
                block = bytearray(48 * 2**20)
                block[::4096] = b"x" * len(block[::4096])
                end = time.process_time() + 0.2
                while time.process_time() < end:
                    pass
            """)
        )
        assert_exited(result)
        assert result.usage.cpu_ms is None or 150 <= result.usage.cpu_ms <= 5000
        assert result.usage.peak_memory_bytes is None or 48 * 2**20 <= result.usage.peak_memory_bytes <= 256 * 2**20
        run_ms = result.timings_ms["run"]
        assert run_ms is not None
        assert run_ms >= 200
        assert {"queued", "prepare", "start", "run", "collect", "total"} <= result.timings_ms.keys()

    async def test_two_runs_share_nothing(self, sandbox: cloche.Sandbox) -> None:
        """What one run left in its writable places, the next one does not find."""
        leave = "for d in /tmp /output /dev/shm; do echo left > $d/left || exit 1; done"
        look = "for d in /tmp /output /dev/shm; do test ! -e $d/left || exit 1; done"
        assert_exited(await sandbox.run(shell(leave)))
        assert_exited(await sandbox.run(shell(look)))
