"""Taking all there is: processes, memory that is in no process, files, fds, output. The run ends in order, and the host lives."""

from __future__ import annotations

import time

import pytest
from anyio import to_thread
from tests.escape.attack import ENDING, FILLER, assert_unharmed, attack, script

import cloche
from cloche.testing.conformance import Target, assert_exited, observe

MIB = 2**20


def _available_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


async def test_pids_full(sandbox: cloche.Sandbox, target: Target) -> None:
    """With every place for a process taken, by processes that ignore all signals, the supervisor still ends the run.

    Guard: the pids bound (cgroup or RLIMIT_NPROC), and the supervisor needs no new process.
    """
    word = observe.marker()
    setup = r"""
made = 0
try:
    while made < 2000:
        pid = os.fork()
        if pid == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError:
    pass
import threading
threads = 0
try:
    while threads < 2000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        threads += 1
except RuntimeError:
    pass
"""
    after = "verdict('filled', **({'refused': 'nothing gained'} if 10 < made + threads < 128 else {'gained': made + threads}))\n"
    source = script({}, setup, after + "sys.stdout.flush()").replace(
        f"sys.stderr.write({ENDING!r})", "os.write(2, b'')"
    ) + (f"\nsys.stdout.flush(); os.write(2, {ENDING.encode()!r}); os._exit(0)\n")
    # gVisor takes some 5 MiB of memory for each process.
    result = await sandbox.run(cloche.Spec(name="attack.py", content=source, args=[word], timeout=20, memory="2Gi"))
    assert_unharmed(result)
    assert '"refused": "nothing gained"' in result.stdout, result.stdout[:300]
    if target.on_this_host:
        assert await to_thread.run_sync(observe.gone, word)


HOARDS = {
    # Memory that no process has mapped: each step says how much it took; they end at 768 MiB.
    "memfd": r"""
fds = []
def take():
    fd = call("memfd_create", b"hoard", 0)
    fds.append(fd)
    return sum(os.write(fd, b"x" * MIB) for _ in range(4))
""",
    "shared memory": r"""
LIBC.shmat.restype = ctypes.c_void_p
def take():
    ident = LIBC.shmget(0, 4 * MIB, 0o1600)
    if ident < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    address = LIBC.shmat(ident, None, 0)
    ctypes.memset(address, 1, 4 * MIB)
    LIBC.shmdt(ctypes.c_void_p(address))
    return 4 * MIB
""",
    "deleted files": r"""
fds = []
def take():
    fd = os.open("/dev/shm/x%d" % len(fds), os.O_CREAT | os.O_RDWR)
    os.unlink("/dev/shm/x%d" % len(fds))
    fds.append(fd)
    return sum(os.write(fd, b"x" * MIB) for _ in range(4))
""",
    "pipes": r"""
fds = []
def take():
    ends = os.pipe2(os.O_NONBLOCK)
    fds.append(ends)
    quietly(fcntl.fcntl, ends[1], 1031, MIB)
    return os.write(ends[1], b"x" * MIB)
""",
    "sockets": r"""
fds = []
def take():
    pair = socket.socketpair()
    fds.append(pair)
    pair[0].setblocking(False)
    held = 0
    try:
        while True:
            held += pair[0].send(b"x" * 65536)
    except BlockingIOError:
        return held
""",
    "anonymous shared": r"""
maps = []
def take():
    m = mmap.mmap(-1, 4 * MIB)
    maps.append(m)
    return m.write(b"x" * (4 * MIB))
""",
    "children": r"""
pids = []
def take():
    pid = os.fork()
    if pid == 0:
        kept = b"x" * (4 * MIB)
        time.sleep(60)
    pids.append(pid)
    time.sleep(0.01)
    if any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids):
        raise OSError(errno.ENOMEM, "one was killed")
    return 4 * MIB
""",
}
LIMIT = 96 * MIB
SLACK = 48 * MIB
"""What may be taken between two looks of a watch that stands in for a cgroup."""


@pytest.mark.parametrize("kind", HOARDS)
async def test_hoards(sandbox: cloche.Sandbox, kind: str) -> None:
    """Memory outside of any process is bounded like the rest: the script is refused more, or is out of memory.

    Where it is not, the posture says so.

    Guards: the memory cgroup; without one, the supervisor's watch, and the filter on memory that it cannot see.
    """
    before = _available_bytes()
    source = script(
        {},
        HOARDS[kind]
        + r"""
taken = 0
try:
    while taken < 768 * MIB:
        taken += take()
        os.write(2, b"%d\n" % taken)
except OSError as exc:
    os.write(2, b"%d %s\n" % (taken, errno.errorcode[exc.errno].encode()))
""",
    )
    result = await sandbox.run(cloche.Spec(name="attack.py", content=source, memory=LIMIT, timeout=20, pids=64))
    taken = max((int(line.split()[0]) for line in result.stderr.splitlines() if line[:1].isdigit()), default=0)
    unbounded = [
        g for g in (await sandbox.posture()).guarantees if "memory" in g.name and g.state is not cloche.State.IN_FORCE
    ]
    if not unbounded:
        assert taken <= LIMIT + SLACK, f"held {taken / MIB:.0f} MiB of {LIMIT / MIB:.0f}"
    match result.outcome:
        case cloche.Outcome.EXITED:
            assert_exited(result)
            assert result.stdout.endswith(FILLER + ENDING)
        case outcome:
            assert outcome is cloche.Outcome.OUT_OF_MEMORY, result
    assert before - _available_bytes() < 512 * MIB


async def test_fds(sandbox: cloche.Sandbox) -> None:
    """A script out of fds, in each of many processes, is out of them itself; its supervisor is not. Guard: RLIMIT_NOFILE."""
    setup = r"""
def hold():
    held = []
    try:
        while len(held) < 100_000:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError as exc:
        return exc.errno == errno.EMFILE, len(held)
children = []
for _ in range(20):
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        full, n = hold()
        os.write(write_end, b"y" if full and n < 70_000 else b"n")
        time.sleep(60)
    children.append(os.read(read_end, 1))
"""
    await attack(sandbox, {"endless fds": "[c for c in children if c != b'y']"}, setup=setup)


async def test_raising_own_limits(sandbox: cloche.Sandbox) -> None:
    """A limit that was set cannot be raised again. Guard: hard limits, and no capability."""
    setup = r"""
import resource
def raised(which):
    soft, hard = resource.getrlimit(which)
    assert hard != resource.RLIM_INFINITY, "was never set"
    # The C library's call: Python's own turns EPERM into ValueError.
    call("prlimit64", 0, which, struct.pack("QQ", 2**40, 2**40), None)
    return resource.getrlimit(which)
def spared(number):
    with open("/proc/self/oom_score_adj", "w", buffering=1) as file:
        file.write(f"{number}\n")
"""
    attempts = {name: f"raised(resource.{name})" for name in ("RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_CORE")}
    spared = {f"oom_score_adj {number}": f"spared({number}) or True" for number in (-1000, 0, 500, 998, 999)}
    # gVisor keeps the number and never looks at it.
    await attack(sandbox, attempts | spared, setup=setup, no_gain_in_a_guest=spared)


async def test_what_the_whole_machine_shares(sandbox: cloche.Sandbox) -> None:
    """What the kernel has one number of for all, whoever takes them, a script cannot take: events of asynchronous I/O,
    pseudo-terminals. Guard: the filter; no device for terminals, or Landlock.
    """
    attempts = {
        "asynchronous io": "call('io_setup', 1, ctypes.create_string_buffer(8)) == 0",
        "a terminal": "openable('/dev/ptmx', os.O_RDWR)",
    }
    # gVisor's are its own.
    await attack(sandbox, attempts, no_gain_in_a_guest=("a terminal",))


QUOTAS = r"""
import contextlib, ctypes, fcntl, os, select, signal, socket, time
libc = ctypes.CDLL(None, use_errno=True)
kept = []
def until_refused(take, most):
    with contextlib.suppress(OSError):
        for _ in range(most):
            kept.append(take())
def pending():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 64))
    for number in range(20000):
        with contextlib.suppress(OSError, ValueError):
            signal.pthread_kill(__import__("threading").get_ident(), 34 + number % 30)
def timer():
    made = ctypes.c_long()
    if libc.timer_create(1, None, ctypes.byref(made)): raise OSError
    return made
def wide():
    ends = os.pipe()
    with contextlib.suppress(OSError): fcntl.fcntl(ends[1], 1031, 2**20)
    return ends
pending()
until_refused(timer, 100000)
until_refused(wide, 1000)
until_refused(lambda: libc.inotify_init() if libc.inotify_init() >= 0 else (_ for _ in ()).throw(OSError()), 500)
open("/output/kept", "w").write("kept")
print("the end", flush=True)
"""


async def test_every_quota_of_a_user(sandbox: cloche.Sandbox) -> None:
    """A script that uses up what the kernel gives a user (queued signals, timers, pages of pipes, watches), which may be its
    guard's too, has its output, its artifacts and its end all the same.
    """
    if (await sandbox.posture()).isolation is cloche.Isolation.KERNEL:
        pytest.skip("a kernel of the box's own has other quotas, and bounds some of these by memory alone")
    result = await sandbox.run(cloche.Spec(name="attack.py", content=QUOTAS, timeout=30))
    assert_exited(result)
    assert result.stdout == "the end\n"
    assert [(a.path, a.data) for a in result.artifacts] == [("kept", b"kept")]


async def test_endless_output_everywhere(sandbox: cloche.Sandbox) -> None:
    """Eight processes that write without end to both streams neither delay nor swell the run's end.

    Guard: bounded rings, and the clock does not wait for readers or writers.
    """
    source = (
        "import os\nfor _ in range(3): os.fork()\nwhile True:\n    os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)"
    )
    begin = time.monotonic()
    result = await sandbox.run(cloche.Spec(name="attack.py", content=source, timeout=1))
    assert result.outcome is cloche.Outcome.TIMED_OUT
    assert time.monotonic() - begin < 5
    assert len(result.stdout_raw) <= MIB
    assert result.stdout_bytes > 4 * MIB


async def test_inodes(sandbox: cloche.Sandbox) -> None:
    """Very many empty files end in ENOSPC or fit into the run's memory; the run goes on. Guard: bounded tmpfs, memory bound."""
    setup = r"""
made = 0
try:
    while made < 60_000:
        os.close(os.open("/tmp/%d" % made, os.O_CREAT | os.O_WRONLY))
        made += 1
except OSError as exc:
    assert exc.errno == errno.ENOSPC, exc
"""
    await attack(sandbox, {"filled": "False"}, setup=setup, timeout=30)
