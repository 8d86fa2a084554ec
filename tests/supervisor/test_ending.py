"""How a run ends, and that nothing of it goes on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from tests.supervisor.harness import PYTHON, Bench, bundle

from cloche.spec import Limits

SHORT = Limits(timeout_s=0.4, grace_s=0.3)
STUBBORN = """
import os, signal, time
for number in range(1, 65):
    if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
        try: signal.signal(number, signal.SIG_IGN)
        except OSError: pass
"""


@pytest.mark.parametrize("code", [0, 1, 3, 42, 124, 137, 255])
def test_exit_code(bench: Bench, code: int) -> None:
    """An exit code is told as it is, whatever other programs mean by it."""
    end = bench.shell(f"exit {code}").end
    assert (end.exit_code, end.signal, end.cause) == (code, None, "none")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV", "SIGABRT", "SIGRTMAX"])
def test_signal(bench: Bench, name: str) -> None:
    """A signal that ended the script is told as a signal."""
    number = getattr(signal, name)
    end = bench.python(f"import os; os.kill(os.getpid(), {int(number)})").end
    assert (end.exit_code, end.signal, end.cause) == (None, number, "none")


def test_timeout(bench: Bench) -> None:
    """At its time the script gets SIGTERM, and what it wrote before and after is kept."""
    run = bench.shell("echo before; trap 'echo after; exit 5' TERM; sleep 100 & wait", limits=SHORT)
    assert run.stdout == b"before\nafter\n"
    assert (run.end.exit_code, run.end.cause) == (5, "timeout")
    assert 0.4e6 <= run.end.run_us < 0.7e6


def test_timeout_reaches_every_process(bench: Bench) -> None:
    """SIGTERM goes to the whole tree, stopped processes included."""
    code = """
import os, signal, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"child\\n"), os._exit(0)))
    os.setsid()
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)
time.sleep(100)
"""
    run = bench.python(code, limits=SHORT)
    assert (run.end.signal, run.end.cause) == (signal.SIGTERM, "timeout")
    assert run.stdout in {b"child\n", b""}


@pytest.mark.parametrize("grace", [0.0, 0.3])
def test_term_ignored(bench: Bench, grace: float) -> None:
    """A script that ignores every signal is killed after the grace, with all that it started."""
    with bench.box() as box:
        code = STUBBORN + "os.fork(); os.setsid() if os.getpid() != os.getsid(0) else 0\nwhile True: time.sleep(1)"
        box.feed(bundle([PYTHON, "-c", code], limits=Limits(timeout_s=0.4, grace_s=grace)))
        run = box.finish()
        box.wait_until_dead()
    assert (run.end.signal, run.end.cause) == (signal.SIGKILL, "timeout")
    assert (0.4 + grace) * 1e6 <= run.end.run_us < (0.7 + grace) * 1e6


def test_daemons_end_with_the_main_process(bench: Bench) -> None:
    """When the main process ends, what it left in other sessions is killed, and its open pipes are not waited for."""
    code = "(setsid sh -c 'trap \"\" TERM HUP; sleep 100 & sleep 100' &) ; sleep 0.05; echo done; exit 7"
    with bench.box() as box:
        box.feed(bundle(["sh", "-c", code]))
        before = time.monotonic()
        run = box.finish()
        assert time.monotonic() - before < 3
        box.wait_until_dead()
    assert run.stdout == b"done\n"
    assert (run.end.exit_code, run.end.cause) == (7, "none")


def test_orphans_are_not_taken_for_the_script(bench: Bench) -> None:
    """Processes that become the supervisor's own children end without ending the run."""
    code = """
import os, time
for i in range(50):
    if os.fork() == 0:
        if os.fork() == 0: os._exit(77)
        os._exit(76)
    os.wait()
time.sleep(0.05)
os._exit(5)
"""
    assert bench.python(code).end.exit_code == 5


def test_siblings_are_not_taken_for_the_script(bench: Bench) -> None:
    """A process made with CLONE_PARENT is the supervisor's child, and not the script."""
    code = """
import ctypes, os, time
pid = ctypes.CDLL(None).syscall({nr}, 0x8000 | 17, 0, 0, 0, 0)
if pid == 0: os._exit(77)
time.sleep(0.1)
print(pid > 0, os.getppid())
os._exit(6)
""".replace("{nr}", {"x86_64": "56", "aarch64": "220"}[os.uname().machine])
    run = bench.run([PYTHON, "-u", "-c", code])
    assert run.stdout == b"True 1\n"
    assert run.end.exit_code == 6


def test_fork_storm_ends(bench: Bench) -> None:
    """A script that forks as fast as it can, up to its bound, ends at its time."""
    code = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    with bench.box("--nproc", "300") as box:
        box.feed(bundle([PYTHON, "-S", "-c", code], limits=SHORT))
        run = box.finish()
        box.wait_until_dead()
    assert run.end.cause == "timeout"
    assert run.end.run_us < 1.5e6


def test_closed_output(bench: Bench) -> None:
    """A script that closes its output goes on to its own end."""
    run = bench.shell("echo out; exec 1>&- 2>&-; sleep 0.1; exit 9")
    assert run.stdout == b"out\n"
    assert run.end.exit_code == 9


def test_cancel(bench: Bench) -> None:
    """SIGTERM from outside cancels the run: the script may end in the grace, output and artifacts are kept."""
    code = "echo one; echo kept >/output/kept; trap 'echo two; exit 4' TERM; echo ready; while :; do sleep 0.02; done"
    for number in (signal.SIGTERM, signal.SIGINT):
        with bench.box() as box:
            box.feed(bundle(["sh", "-c", code]))
            box.read_until(b" o ")
            time.sleep(0.1)
            box.stop(number)
            run = box.finish()
            box.wait_until_dead()
        assert run.stdout == b"one\nready\ntwo\n"
        assert (run.end.exit_code, run.end.cause) == (4, "cancel")
        assert run.files["kept"].data == b"kept\n"
        assert run.end.run_us < 2e6


def test_cancel_of_a_stubborn_script(bench: Bench) -> None:
    """A cancelled script that ignores SIGTERM is killed after the grace."""
    with bench.box() as box:
        box.feed(bundle([PYTHON, "-c", STUBBORN + "print('ready', flush=True)\nwhile True: time.sleep(1)"]))
        box.read_until(b" o ")
        box.stop()
        run = box.finish()
    assert (run.end.signal, run.end.cause) == (signal.SIGKILL, "cancel")


def test_other_signals_do_nothing(bench: Bench) -> None:
    """The supervisor heeds no other signal."""
    with bench.box() as box:
        box.feed(bundle(["sh", "-c", "echo ready; sleep 0.4; echo done"]))
        box.read_until(b" o ")
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE, signal.SIGALRM, signal.SIGCHLD, signal.SIGXCPU):
            box.stop(number)
        run = box.finish()
    assert run.stdout == b"ready\ndone\n"
    assert (run.end.exit_code, run.end.cause) == (0, "none")


def test_the_script_cannot_cancel(bench: Bench) -> None:
    """The script can send the supervisor no signal, in no way that names it."""
    code = """
import os, ctypes
libc = ctypes.CDLL(None, use_errno=True)
for pid in (1, -1, os.getppid(), 0x100000001):
    for number in (0, 2, 9, 15, 19):
        try:
            if libc.kill(ctypes.c_long(pid), number): raise OSError(ctypes.get_errno(), "")
            print("sent", pid, number)
        except OSError as e:
            if e.errno != 1: print(pid, number, e.errno)
print("alive")
"""
    run = bench.run([PYTHON, "-I", "-c", code])
    assert run.stdout == b"alive\n"
    assert (run.end.exit_code, run.end.cause) == (0, "none")


def test_signals_from_inside_the_box_are_no_cancel(bench: Bench) -> None:
    """Whatever gets past the filter: a SIGTERM of a process in the box does not cancel."""
    if os.geteuid() != 0 or shutil.which("nsenter") is None:
        pytest.skip("only root, with nsenter, can send a signal from inside that the filter does not see")
    with bench.box() as box:
        box.feed(bundle(["sh", "-c", "echo ready; sleep 0.6; echo done"]))
        box.read_until(b" o ")
        for name in ("TERM", "INT"):
            subprocess.run(["nsenter", "-t", str(box.pid), "-p", "sh", "-c", f"kill -{name} 1"], check=True)
        run = box.finish()
    assert run.stdout == b"ready\ndone\n"
    assert (run.end.exit_code, run.end.cause) == (0, "none")


SPEAKERS = ["sleep 100", "while :; do echo flood; done", "yes | cat >&2 & yes", "sleep 0.02; echo x; sleep 100"]


@pytest.mark.parametrize("code", SPEAKERS)
def test_gone_reader(bench: Bench, code: str) -> None:
    """Without a reader the run is pointless: the supervisor ends at once and takes everything with it."""
    for _ in range(4):
        with bench.box() as box:
            box.feed(bundle(["sh", "-c", code]))
            box.read_until(b"start")
            box.output.close()
            box.wait(5)
            box.wait_until_dead()


def test_reader_that_goes_while_frames_are_written(bench: Bench) -> None:
    """It makes no difference whether the supervisor learns it from a write or while it waits."""
    for _ in range(8):
        with bench.box() as box:
            box.feed(bundle(["yes"], limits=Limits(timeout_s=20, output_bytes=100 * 2**20)))
            box.read_until(b"start")
            end = time.monotonic() + 0.05
            while time.monotonic() < end:
                os.read(box.output.fileno(), 2**20)
            box.output.close()
            box.wait(3)
            box.wait_until_dead()


@pytest.mark.parametrize("code", ["sleep 100", "yes"])
def test_gone_reader_of_a_socket(bench: Bench, code: str) -> None:
    """The same where an engine reads from a socket."""
    ours, theirs = socket.socketpair()
    with ours, bench.box(frames=theirs.fileno()) as box:
        theirs.close()
        box.feed(bundle(["sh", "-c", code]))
        got = b""
        while b"start" not in got:
            got += ours.recv(65536)
        ours.close()
        box.wait(5)
        box.wait_until_dead()


def test_reader_gone_before_the_bundle(bench: Bench) -> None:
    """A box whose owner goes before he has fed it ends."""
    with bench.box() as box:
        box.read_until(b"hello")
        box.feed(b"")
        box.output.close()
        assert box.wait(5) == 1


def test_slow_reader_loses_nothing(bench: Bench) -> None:
    """A reader that pauses gets everything, and the supervisor sleeps meanwhile."""
    size = 900_000
    code = f"import os\nfor i in range({size // 1000}):\n os.write(1, b'o' * 1000); os.write(2, b'e' * 1000)"
    with bench.box() as box:
        box.feed(bundle([PYTHON, "-c", code], limits=Limits(timeout_s=20, output_bytes=4 * 2**20)))
        box.read_until(b"start")
        time.sleep(0.5)
        before = cpu_s(box.pid)
        time.sleep(1)
        assert cpu_s(box.pid) - before < 0.2, "the supervisor spins while it waits for its reader"
        run = box.finish()
    assert run.stdout == b"o" * size
    assert run.stderr == b"e" * size


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_slow_reader_does_not_stop_the_clock(bench: Bench) -> None:
    """A script that floods a reader who pauses is ended at its time, and so far as it came its output is whole."""
    limits = Limits(timeout_s=0.5, grace_s=0.2, output_bytes=4 * 2**20)
    with bench.box() as box:
        box.feed(bundle(["sh", "-c", "yes & yes >&2 & wait"], limits=limits))
        box.read_until(b"start")
        time.sleep(2)
        run = box.finish()
    assert run.end.cause == "timeout"
    assert run.end.run_us < 1.2e6
    assert run.end.stdout_bytes == len(run.stdout) > 0
    assert run.end.stderr_bytes == len(run.stderr) > 0
    # The two share the room that there is for a slow reader; who comes first may fill it.
    assert len(run.stdout) + len(run.stderr) > 300_000


def test_live_output(bench: Bench) -> None:
    """Output appears while the script still runs."""
    with bench.box() as box:
        box.feed(bundle(["sh", "-c", "echo early; sleep 0.5; echo late"]))
        begun = time.monotonic()
        box.read_until(b" o ")
        assert time.monotonic() - begun < 0.4
        assert box.finish().stdout == b"early\nlate\n"
