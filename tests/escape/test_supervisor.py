"""Attacks on the supervisor: signals, memory, limits, its fds and its frames. The run must end as if there had been none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from tests.escape import attacks_on_supervisor as attacks
from tests.escape.attack import ENDING, FILLER, PREAMBLE, assert_unharmed, attack, script, verdicts

import cloche
from cloche.testing.conformance import assert_exited

TABLES = {
    "signals": attacks.SIGNALS,
    "owners": attacks.OWNERS,
    "barrage": attacks.BARRAGE,
    "resources": attacks.RESOURCES,
    "memory": attacks.MEMORY,
}


@pytest.mark.parametrize("table", TABLES)
async def test_refused(sandbox: cloche.Sandbox, table: str) -> None:
    """The supervisor cannot be signalled, traced, read, limited or slowed. Guards: see each table."""
    await attack(sandbox, TABLES[table], setup=attacks.SETUP, no_gain_in_a_guest=attacks.SHOWN_BY_GVISOR)


STAND_IN = """
import signal, sys, time
for number in set(signal.valid_signals()) - {9, 19}:
    signal.signal(number, lambda n, _: print("signal", n, flush=True))
print("ready", flush=True)
while True:
    time.sleep(60)
"""
NEED_RIGHTS = {"map_files", "timerslack"}
NO_GAIN_BY_CHANCE = {"kcmp", "get_robust_list", "stack", "root", "file by its root", "auxv"}
"""Attempts whose success outside depends on the kernel's options or on what the host has."""


@pytest.mark.parametrize("table", ["signals", "owners", "resources", "memory"])
def test_the_attacks_are_real(table: str) -> None:
    """On the bare host, against a stand-in of the same user, the same attempts succeed: in the box a guard refuses."""
    attempts = {name: code for name, code in TABLES[table].items() if "child" not in name and name != "ptrace traceme"}
    with subprocess.Popen([sys.executable, "-c", STAND_IN], stdout=subprocess.PIPE, text=True) as stand_in:
        assert stand_in.stdout is not None
        assert stand_in.stdout.readline() == "ready\n"
        done = subprocess.run(
            [sys.executable, "-c", script(attempts, attacks.SETUP)],
            env={**os.environ, "ATTACKED_PID": str(stand_in.pid)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        time.sleep(0.1)
        stand_in.kill()
        felt = stand_in.stdout.read()
    assert done.returncode == 0, done.stderr
    said = verdicts(done.stdout)
    assert said.keys() == attempts.keys()
    assert not {name: how for name, how in said.items() if "broken" in how}
    if table == "owners":
        assert f"signal {signal.SIGTERM.value}\n" in felt
        return
    if table == "signals":
        assert f"signal {signal.SIGTERM.value}\n" in felt
    # EFAULT: it was allowed to look, at an address that the stand-in does not have.
    failed = {name: how for name, how in said.items() if "gained" not in how and how.get("refused") != "EFAULT"}
    if not _may_trace():
        failed.clear()
    assert not failed.keys() - NEED_RIGHTS - NO_GAIN_BY_CHANCE, failed


def _may_trace() -> bool:
    """Whether this host lets a user trace processes of their own (Yama's ptrace_scope)."""
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope") as file:
            return os.geteuid() == 0 or file.read().strip() == "0"
    except FileNotFoundError:
        return True


async def test_forged_frames(sandbox: cloche.Sandbox) -> None:
    """Frames that the script writes to every fd and path it can find are output like any other, or lost; never believed.

    Guard: the script holds no fd of the supervisor, and the payload of a frame is encoded.
    """
    source = "\n".join(
        [
            PREAMBLE,
            attacks.FORGERY,
            "everywhere_at_once()",
            f"sys.stdout.write({FILLER!r} + {ENDING!r})",
            f"sys.stderr.write({ENDING!r})",
        ]
    )
    result = await sandbox.run(cloche.Spec(name="attack.py", content=source))
    assert_unharmed(result)
    assert list(result.artifacts) == []
    names: dict[str, object] = {}
    exec(attacks.FORGERY.split("def ")[0], names)  # the frames, as the attacker makes them
    frames = names["frames"]
    assert isinstance(frames, list)
    # To stdout each frame went four times: by its fd and by the three paths that reopen it.
    assert result.stdout_raw == b"".join(frame * 4 for frame in frames) + (FILLER + ENDING).encode()
    assert result.stderr_raw == b"".join(frames) + ENDING.encode()


async def test_inherited_fds(sandbox: cloche.Sandbox) -> None:
    """The script starts with stdin, stdout and stderr and no other fd. Guard: the supervisor closes what it inherited."""
    await attack(
        sandbox,
        {
            "more than three fds": "[fd for fd in START if fd > 2]",
            "a high fd": "[fd for fd in range(3, 65536) if is_open(fd)]",
        },
        setup="START = [int(fd) for fd in os.listdir('/proc/self/fd')]\n"
        "START = [fd for fd in START if os.path.exists('/proc/self/fd/%d' % fd)]\n"
        "def is_open(fd):\n    return quietly(os.fstat, fd) is not None\n",
    )


EVERYTHING_IN_SIGHT = r"""
def strike():
    mine = {os.getpid(), os.getppid()}
    for sig in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGINT):
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) not in mine:
                quietly(os.kill, int(entry), sig)
                for thread in quietly(os.listdir, "/proc/%s/task" % entry) or []:
                    quietly(call, "tkill", int(thread), sig)
        for pid in range(1, 400):
            if pid not in mine:
                quietly(os.kill, pid, sig)
            if -pid not in (-os.getpgrp(),) and pid > 1:
                quietly(os.kill, -pid, sig)
forked(strike)
"""


async def test_everything_in_sight(sandbox: cloche.Sandbox) -> None:
    """SIGSTOP, SIGTERM and SIGKILL at every process, thread, group and number in sight harm only the script's own.

    Guard: the process namespace, PID 1's immunity, the filter on calls that name the supervisor.
    """
    await attack(sandbox, {"struck": "False"}, setup=EVERYTHING_IN_SIGHT)


async def test_children_given_to_the_supervisor(sandbox: cloche.Sandbox) -> None:
    """Children that clone gives to the supervisor (CLONE_PARENT), and thousands of orphans, are not taken for the script.

    Guard: the supervisor waits for the script by its pid and reaps all others.
    """
    setup = r"""
def give(code, flags):
    pid = call("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(code)
for i in range(50):
    give(77, 0x8000)
for i in range(300):
    pid = quietly(os.fork)
    if pid is None:
        time.sleep(0.01)  # the supervisor has yet to reap
        continue
    if pid == 0:
        quietly(os.fork) == 0 and os._exit(78)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
"""
    await attack(sandbox, {"given": "False"}, setup=setup)


async def test_the_script_cannot_outlive_by_stopping(sandbox: cloche.Sandbox) -> None:
    """A script that stops itself and every child, with all output blocked, still times out.

    Guard: the clock is the supervisor's.
    """
    source = "import os, signal\nfor _ in range(5):\n    if os.fork() == 0: os.kill(os.getpid(), 19)\nprint('last', flush=True)\n"
    source += "os.kill(os.getpid(), 19)"
    result = await sandbox.run(cloche.Spec(name="attack.py", content=source, timeout=1))
    assert result.outcome is cloche.Outcome.TIMED_OUT
    assert result.stdout == "last\n"


async def test_own_pipes_abused(sandbox: cloche.Sandbox) -> None:
    """Reading, shrinking, filling and making non-blocking the script's own pipes costs only its own output.

    Guard: frames leave by another pipe, which no process of the script holds.
    """
    setup = r"""
fd = quietly(os.open, "/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
os.write(1, b"stolen?\n")
stolen = quietly(os.read, fd, 100) if fd is not None else None
for pipe in (1, 2):
    quietly(fcntl.fcntl, pipe, 1031, 4096)
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    for _ in range(100):
        quietly(os.write, pipe, b"z" * 4096)
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags)
os.write(1, b"\n")
"""
    result = await sandbox.run(cloche.Spec(name="attack.py", content=script({}, setup)))
    assert_exited(result)
    assert result.stdout.endswith(FILLER + ENDING)
    assert result.stderr.endswith(ENDING)
