"""The limits hold, shown by reaching them, and whoever dies leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import anyio
import pytest
from anyio import to_thread
from tests.engines.vm.guest.stage import CHOSEN, SLOW, cgroups, none_left, note, python

import cloche
from cloche.testing.conformance import observe

pytestmark = pytest.mark.anyio

HOG = "print('before', flush=True)\nkept = []\nwhile True:\n    kept.append(b'x' * 2**22)\n"
CHILD_HOG = """
import os, time
pid = os.fork()
if pid == 0:
    kept = []
    while True:
        kept.append(b"x" * 2**22)
print(os.WTERMSIG(os.waitpid(pid, 0)[1]))
time.sleep(0.3)
print("alive")
"""
BOMB = """
import os, time
children = []
refused = None
while len(children) < 500 and refused is None:
    try:
        pid = os.fork()
    except OSError as exc:
        refused = exc.errno
        break
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    children.append(pid)
print(refused, len(children))
"""
BURN = """
import os, sys, time
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            pass
        os._exit(0)
for _ in range(int(sys.argv[1])):
    os.wait()
"""
KILLED_CLIENT = """
import anyio, cloche, sys
async def main():
    async with cloche.Sandbox.from_env() as sandbox:
        source = "import time; print('running', flush=True); time.sleep(60)"
        async for event in sandbox.stream(cloche.Spec(name="main.py", content=source, args=[sys.argv[1]])):
            print(type(event).__name__, flush=True)
anyio.run(main)
"""


@pytest.fixture
async def sandbox() -> AsyncIterator[cloche.Sandbox]:
    async with cloche.Sandbox.from_env({"CLOCHE_MODE": "local", "CLOCHE_FALLBACK": "false"}) as sandbox:
        yield sandbox


async def test_a_memory_hog(sandbox: cloche.Sandbox) -> None:
    """A script over its memory is ``out_of_memory``; where a cgroup bounds it, the kernel's own counter says so."""
    result = await sandbox.run(python(HOG, memory="64Mi", timeout=30 * SLOW))
    assert (result.outcome, result.stdout) == (cloche.Outcome.OUT_OF_MEMORY, "before\n")
    if CHOSEN != "none":
        assert result.usage.oom_kills > 0
        assert (result.usage.peak_memory_bytes or 0) <= 84 * 2**20


async def test_a_child_over_the_memory(sandbox: cloche.Sandbox) -> None:
    """A child that takes too much dies alone: the main process goes on, and no manager ends the box for it."""
    result = await sandbox.run(python(CHILD_HOG, memory="64Mi", timeout=30 * SLOW))
    if CHOSEN == "none":
        assert result.outcome is cloche.Outcome.OUT_OF_MEMORY  # the watch ends the whole
        return
    assert (result.outcome, result.exit_code, result.stdout) == (cloche.Outcome.EXITED, 0, "9\nalive\n"), result
    assert result.usage.oom_kills == 1


async def test_a_bomb(sandbox: cloche.Sandbox) -> None:
    """A script cannot have more processes than its bound, and its run ends with all of them."""
    result = await sandbox.run(python(BOMB, pids=40, timeout=60 * SLOW))
    assert result.ok, result
    errno, children = result.stdout.split()
    assert errno == "11"
    assert 30 <= int(children) <= 40


async def test_cpu(sandbox: cloche.Sandbox) -> None:
    """Two busy processes for three seconds get half a cpu, where a cgroup bounds it, and more where none does."""
    result = await sandbox.run(python(BURN, args=["2"], cpus=0.5, timeout=60 * SLOW))
    assert result.ok, result
    run_ms, cpu_ms = result.timings_ms["run"], result.usage.cpu_ms
    assert run_ms is not None
    assert cpu_ms is not None
    share = cpu_ms / run_ms
    note("cpu_share_of_half", share)
    if CHOSEN == "none":
        assert share > 0.6
    else:
        assert 0.3 < share < 0.6


async def test_a_client_killed(sandbox: cloche.Sandbox) -> None:
    """Of a client that dies by SIGKILL no process is left, and after the next open no cgroup."""
    await sandbox.close()
    before, word = cgroups(), observe.marker()
    environ = {**os.environ, "CLOCHE_MODE": "local"}
    del environ["CLOCHE_MUST_WORK"]

    def kill_one() -> None:
        with subprocess.Popen(
            [sys.executable, "-c", KILLED_CLIENT, word], env=environ, stdout=subprocess.PIPE
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"Started\n"
            assert client.stdout.readline() == b"Output\n"
            if CHOSEN != "none":
                assert cgroups() - before
            client.send_signal(signal.SIGKILL)

    await to_thread.run_sync(kill_one)
    assert await to_thread.run_sync(lambda: observe.gone(word, within_s=2.0 * SLOW)), observe.processes_with(word)
    async with cloche.Sandbox.from_env({"CLOCHE_MODE": "local"}) as another:
        assert (await another.run(python("pass"))).ok
    left = await to_thread.run_sync(none_left, before)
    assert not left, left


async def test_a_run_cancelled(sandbox: cloche.Sandbox) -> None:
    """A task cancelled at any moment leaves no process of its box, and the sandbox can go on."""
    word = observe.marker()
    for after_ms in (0, 5, 10, 20, 40, 80, 160):
        with anyio.move_on_after(after_ms * SLOW / 1000):
            await sandbox.run(python("import time; time.sleep(60)", args=[word]))
    assert await to_thread.run_sync(lambda: observe.gone(word, within_s=2.0 * SLOW)), observe.processes_with(word)
    assert (await sandbox.run(python("pass"))).ok


def test_the_command_line() -> None:
    """``cloche run --json`` says the same as the library, and leaves nothing."""
    before = cgroups()
    begin = time.perf_counter()
    environ = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG", "XDG_RUNTIME_DIR"}}
    script = os.path.join(os.environ["SCENE_RESULTS"], "hog.py")
    with open(script, "w", encoding="utf-8") as file:
        file.write(HOG)
    command = [sys.executable, "-m", "cloche", "run", "--mode", "local", "--json", "--memory", "64Mi", script]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    note("command_ms", 1000 * (time.perf_counter() - begin))
    assert done.returncode == 137, done.stderr
    assert json.loads(done.stdout)["outcome"] == "out_of_memory"
    left = none_left(before)
    assert not left, left
