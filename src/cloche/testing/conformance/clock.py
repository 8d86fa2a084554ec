"""Time: the limit is kept, to the second, whatever the script does about it."""

from __future__ import annotations

import time

import anyio
import pytest
from anyio import to_thread

import cloche
from cloche.testing.conformance import observe
from cloche.testing.conformance.target import Suite, Target, assert_exited, python, shell

LIMIT_S = 1.0

STUBBORN = {
    "sleeps": "time.sleep(60)",
    "spins": "while True: pass",
    "ignores SIGTERM": "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
    "ignores every signal": "for s in set(signal.valid_signals()) - {9, 19}: signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
    "blocks every signal": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\ntime.sleep(60)",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "writes without end": "while True: os.write(1, b'x' * 65536)",
    "closed its streams": "os.close(1); os.close(2)\ntime.sleep(60)",
    "waits for a stubborn child": "subprocess.run(['sh', '-c', 'trap \"\" TERM; while :; do sleep 1; done', *sys.argv[1:]])",
    "answers SIGTERM by forking": (
        "def on(*_):\n    for _ in range(5): os.fork()\nsignal.signal(signal.SIGTERM, on)\nwhile True: time.sleep(0.01)"
    ),
}

ORPHANS = {
    # What the main process leaves behind; it then ends with exit code 6.
    "a child": "if os.fork() == 0: time.sleep(60)",
    "a child that holds the pipes and ignores signals": (
        "if os.fork() == 0:\n    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); time.sleep(60)"
    ),
    "a daemon": (
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.closerange(0, 3); os.chdir('/'); time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.wait()"
    ),
    "a daemon that holds the pipes": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)\nos.wait()"
    ),
    "a stopped child": "if os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)",
    "a chain of forks": ("if os.fork() == 0:\n    while True:\n        if os.fork(): os._exit(0)\n"),
    "many children": "for _ in range(50):\n    if os.fork() == 0: time.sleep(60)",
    "a writer without end": "if os.fork() == 0:\n    while True: os.write(1, b'x' * 1000)",
    "another program": "subprocess.Popen(['sleep', '61.' + sys.argv[1].encode().hex()], start_new_session=True)",
}
IMPORTS = "import os, signal, subprocess, sys, time\nprint('before', flush=True)\n"


def _script(body: str, word: str) -> cloche.Spec:
    # A kernel of the box's own takes several MiB for each process.
    return cloche.Spec(name="main.py", content=IMPORTS + body, args=[word], timeout=LIMIT_S, memory="1Gi")


class Clock(Suite):
    """The time limit, and what is left when a run is over."""

    @pytest.mark.parametrize("name", STUBBORN)
    async def test_timed_out(self, sandbox: cloche.Sandbox, target: Target, name: str) -> None:
        """The run is over within 1 s of its limit, keeps what was written before, and its whole tree is gone."""
        word = observe.marker()
        begin = time.monotonic()
        result = await sandbox.run(_script(STUBBORN[name], word))
        took = time.monotonic() - begin
        assert (result.outcome, result.exit_code, result.signal) == (cloche.Outcome.TIMED_OUT, None, None)
        assert result.stdout.startswith("before\n")
        run_ms = result.timings_ms["run"]
        assert run_ms is not None
        assert LIMIT_S * 990 <= run_ms < LIMIT_S * 1000 + 1000
        started_ms = sum(result.timings_ms[phase] or 0 for phase in ("queued", "prepare", "start"))
        assert took < started_ms / 1000 + LIMIT_S + 1
        if target.on_this_host:
            assert await to_thread.run_sync(observe.gone, word)

    async def test_a_signal_is_caught_in_the_grace(self, sandbox: cloche.Sandbox) -> None:
        """Before it is killed, a script gets SIGTERM and a short while to end by itself; it has timed out all the same."""
        result = await sandbox.run(
            python(
                """
                import signal, sys, time
                def stop(*_):
                    print("stopping", flush=True)
                    sys.exit(0)
                signal.signal(signal.SIGTERM, stop)
                time.sleep(60)
                """,
                timeout=2,  # an interpreter that has not been started for long takes its time until it has the handler
            )
        )
        assert result.outcome is cloche.Outcome.TIMED_OUT
        assert result.stdout == "stopping\n"

    @pytest.mark.parametrize("name", ORPHANS)
    async def test_nothing_outlives_the_main_process(self, sandbox: cloche.Sandbox, target: Target, name: str) -> None:
        """The result comes when the main process ends, whoever holds its pipes; what it left behind is killed."""
        word = observe.marker()
        begin = time.monotonic()
        spec = cloche.Spec(
            name="main.py", content=f"{IMPORTS}{ORPHANS[name]}\nos._exit(6)\n", args=[word], timeout=20, memory="1Gi"
        )
        result = await sandbox.run(spec)
        took = time.monotonic() - begin
        assert_exited(result, 6)
        assert result.stdout.startswith("before\n")
        assert took < 10, f"the result came after {took:.1f} s"
        if target.on_this_host:
            assert await to_thread.run_sync(observe.gone, word)
            if name == "another program":
                assert await to_thread.run_sync(observe.gone, "61." + word.encode().hex())

    async def test_the_queue_does_not_count(self, target: Target) -> None:
        """The clock of a run starts with the script, not with the wait for a free place."""
        async with target.sandbox(CLOCHE_MAX_CONCURRENT="1") as sandbox:
            results: list[cloche.Result] = []

            async def one() -> None:
                results.append(await sandbox.run(shell("sleep 0.7", timeout=1.5)))

            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(one)
        for result in results:
            assert_exited(result)
        queued = sorted(result.timings_ms["queued"] or 0 for result in results)
        assert queued[0] < 500
        assert queued[-1] > 2 * 700

    async def test_queue_timeout(self, target: Target) -> None:
        """A run that waited too long for a place is refused as ``queue-timeout``; the running one is not disturbed."""
        async with target.sandbox(CLOCHE_MAX_CONCURRENT="1", CLOCHE_QUEUE_TIMEOUT="0.3") as sandbox:
            results: list[cloche.Result] = []

            async def long() -> None:
                results.append(await sandbox.run(shell("sleep 1.5")))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(long)
                await anyio.sleep(0.2)
                with pytest.raises(cloche.QueueTimeout) as caught:
                    await sandbox.run(shell("true"))
        assert caught.value.code == "queue-timeout"
        assert caught.value.retryable
        assert_exited(results[0])

    async def test_limit_from_the_settings(self, target: Target) -> None:
        """Without a limit of its own a run has that of the settings."""
        async with target.sandbox(CLOCHE_TIMEOUT="0.5") as sandbox:
            result = await sandbox.run(shell("sleep 30"))
        assert result.outcome is cloche.Outcome.TIMED_OUT
