"""Many runs at once, and clients that die or sweep beside them: what every engine whose boxes outlive a client is tried with."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio
import psutil

import cloche
from cloche.testing.conformance import Target, assert_exited, shell

FLAT_BYTES = 8 * 2**20
CROWD = """
import anyio, cloche
async def main():
    async with cloche.Sandbox.from_env() as sandbox:
        spec = cloche.Spec(name="a.sh", content="echo up; sleep 60", timeout=90)
        up = 0
        async def one():
            nonlocal up
            async for event in sandbox.stream(spec):
                if isinstance(event, cloche.Output):
                    up += 1
                    if up == RUNS:
                        print("all are up", flush=True)
        async with anyio.create_task_group() as group:
            for _ in range(RUNS):
                group.start_soon(one)
anyio.run(main)
"""
SWEEPER = "import anyio, cloche\nasync def main():\n    async with cloche.Sandbox.from_env(): pass\nanyio.run(main)"


def kill_in_the_middle(target: Target, runs: int, then: Callable[[], object] = lambda: None) -> None:
    """A client of so many runs, all of which have begun, is killed by SIGKILL; ``then`` is called just before."""
    environ = target.command_environment(CLOCHE_MAX_CONCURRENT=str(runs))
    crowd = [sys.executable, "-c", CROWD.replace("RUNS", str(runs))]
    with subprocess.Popen(crowd, env=environ, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"all are up\n"
        then()
        client.send_signal(signal.SIGKILL)


async def open_and_close(target: Target) -> None:
    """What sweeps."""
    async with target.sandbox():
        pass


async def sweep_beside_a_run(target: Target, *, lasts_s: int, after_s: float) -> str:
    """What a run prints beside which other clients sweep, three times, from when it has gone on for so long."""
    async with target.sandbox() as sandbox:
        results: list[cloche.Result] = []

        async def one() -> None:
            results.append(await sandbox.run(shell(f"sleep {lasts_s}; echo done", timeout=20)))

        async with anyio.create_task_group() as group:
            group.start_soon(one)
            await anyio.sleep(after_s)
            for _ in range(3):
                await anyio.run_process([sys.executable, "-c", SWEEPER], env=target.command_environment())
    return results[0].stdout


@contextmanager
def _flat(kept_fds: int) -> Iterator[None]:
    me = psutil.Process()
    gc.collect()
    before, fds = me.memory_info().rss, me.num_fds()
    yield
    gc.collect()
    assert me.memory_info().rss - before < FLAT_BYTES
    assert me.num_fds() - fds <= kept_fds  # connections that are kept


async def leave_nothing(target: Target, *, runs: int, warm_up: int, at_once: int, kept_fds: int) -> None:
    """So many runs, each with its exit code, leave nothing in the client: memory and descriptors stay flat, no removal fails."""
    async with target.sandbox(CLOCHE_MAX_CONCURRENT=str(at_once)) as sandbox:

        async def many(count: int) -> None:
            async with anyio.create_task_group() as group:
                for i in range(count):
                    group.start_soon(one, i)

        async def one(i: int) -> None:
            assert_exited(await sandbox.run(shell(f"exit {i % 5}"), wait_cleanup=True), i % 5)

        await many(warm_up)
        with _flat(kept_fds):
            await many(runs)
        assert sandbox.counters.removals_failed == 0
