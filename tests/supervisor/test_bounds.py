"""What the supervisor takes from a script, and that it says only what is so."""

from __future__ import annotations

import json
import os
import signal

import pytest
from tests.supervisor.harness import PYTHON, Bench, bundle

from cloche.spec import Limits
from cloche.supervisor.frames import Hardening

MIB = 2**20
HOG = """
import os, sys, time
count, each = map(int, sys.argv[1:])
for _ in range(count):
    if os.fork() == 0:
        block = bytearray(each)
        for i in range(0, each, 4096): block[i] = 1
        time.sleep(100)
time.sleep(100)
"""
FAMILIES = {
    "AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16, "AF_PACKET": 17, "AF_TIPC": 30, "AF_ALG": 38, "AF_VSOCK": 40,
    "AF_XDP": 44,
}  # fmt: skip


def test_hardening_is_true(bench: Bench) -> None:
    """Every protection that the last frame claims is there, as the kernel tells the script itself."""
    code = """
import json, os
def status_of(pid): return dict(line.rstrip("\\n").split(":\\t", 1) for line in open(f"/proc/{pid}/status") if ":\\t" in line)
limits = {line[:26].strip(): line[26:].split()[:2] for line in open("/proc/self/limits")}
mounts = [line.split() for line in open("/proc/self/mountinfo")]
def refused(attempt):
    try: attempt()
    except OSError as e: return True
print(json.dumps({
    "status": status_of("self"), "supervisor": status_of(1), "limits": limits,
    "sealed": any(m[4] == "/workspace" and "ro" in m[5].split(",") for m in mounts),
    "files": [os.statvfs(p).f_files for p in ("/output", "/tmp", "/dev/shm")],
    "writes": refused(lambda: open("/workspace/x", "w")),
    "ids": [os.getresuid(), os.getresgid(), os.getgroups()], "oom": open("/proc/self/oom_score_adj").read(),
}))
"""
    options = [
        "--nproc",
        "50",
        "--nofile",
        "99",
        "--fsize",
        "12345678",
        "--inodes",
        "777",
        "--memory-watch",
        str(2**30),
    ]
    run = bench.python(code, *options)
    said = json.loads(run.stdout)
    status, claims = said["status"], run.end.hardening
    assert run.hello.pid == 1
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
        # Its own too, which it needed to seal: whoever got into it, with the script's uid, would have gained nothing.
        assert int(said["supervisor"][name], 16) == 0, name
    for held in (
        "PID_1",
        "NO_NEW_PRIVS",
        "NO_CAPABILITIES",
        "SECCOMP",
        "WORKSPACE_SEALED",
        "MEMORY_WATCH",
        "NPROC",
        "INODES",
    ):
        assert Hardening[held] in claims, held
    for absent in ("OWN_UID", "SOCKETS_UNIX_ONLY", "OOM_COUNTER"):
        assert Hardening[absent] not in claims, absent
    assert said["sealed"]
    assert said["writes"]
    assert said["files"] == [777] * 3
    assert said["limits"]["Max processes"] == ["50", "50"]
    assert said["limits"]["Max open files"] == ["99", "99"]
    assert said["limits"]["Max file size"] == ["12345678", "12345678"]
    assert said["limits"]["Max core file size"] == ["1", "1"]
    assert said["ids"] == [[1000] * 3, [1000] * 3, []] or said["ids"][2] == [65534]
    assert said["oom"].strip() == "1000"


def test_nothing_is_claimed_that_was_not_asked(bench: Bench) -> None:
    """Bounds that the backend did not ask for are not claimed."""
    claims = bench.shell("true").end.hardening
    for absent in ("NPROC", "INODES", "MEMORY_WATCH", "SOCKETS_UNIX_ONLY", "OWN_UID"):
        assert Hardening[absent] not in claims, absent


def test_landlock_is_true(bench: Bench) -> None:
    """Where Landlock is claimed, a folder that is writable for the script's uid is not written, but for its own three."""
    code = """
import os
for path in ("/output", "/tmp", "/dev/shm", "/extra"):
    try: open(path + "/x", "w"); print(path, "written")
    except OSError as e: print(path, e.errno)
for path in ("/dev/null", "/dev/full", "/dev/zero"): open(path, "w")
for path in ("/proc/self/comm", "/proc/self/oom_score_adj"):
    try: open(path, "w"); print(path, "opened")
    except OSError as e: print(path, e.errno)
os.rename("/tmp/x", "/tmp/y"); os.mkdir("/tmp/d"); os.rename("/tmp/y", "/tmp/d/y"); os.truncate("/tmp/d/y", 5)
print("all right")
"""
    with bench.box(mounts=["--size", "100000", "--tmpfs", "/extra"]) as box:
        box.feed(bundle([PYTHON, "-c", code]))
        run = box.finish()
    if Hardening.LANDLOCK_WRITES not in run.end.hardening:
        pytest.skip("this kernel has no Landlock")
    assert run.stdout.decode().splitlines() == [
        "/output written",
        "/tmp written",
        "/dev/shm written",
        "/extra 13",
        "/proc/self/comm 13",
        "/proc/self/oom_score_adj 13",
        "all right",
    ]


OLD_KERNEL = """
import ctypes, os, platform, struct, sys
# A filter that knows of no Landlock (444 everywhere), as an older kernel, one that has it switched off, or gVisor.
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("options", [[], ["--need-landlock"]], ids=str)
def test_need_of_landlock(bench: Bench, options: list[str]) -> None:
    """Where nothing but Landlock keeps the workspace, a kernel without it is no place to start a script."""
    with bench.box(*options, prefix=[PYTHON, "-I", "-S", "-c", OLD_KERNEL]) as box:
        box.feed(bundle(["/bin/sh", "-c", "echo ran"]))
        run = box.finish()
    if options:
        assert (run.fail.code, run.started) == ("isolation-unavailable", False)
        assert "neither as a mount nor by Landlock:" in run.fail.message
    else:
        assert run.stdout == b"ran\n"
        assert Hardening.LANDLOCK_WRITES not in run.end.hardening


NEIGHBOUR = f"""
{PYTHON} -I -S -c 'import socket, time; s = socket.socket(1); s.bind("\\0outside"); s.listen(); time.sleep(100)' >&- 2>&- &
exec "$@"
"""


def test_landlock_scopes_are_true(bench: Bench) -> None:
    """Where the scopes are claimed, a script reaches no process beside its own, of its uid as that is: no signal, no
    abstract socket.
    """
    code = """
import os, signal, socket, time
pid = next(int(p) for p in os.listdir("/proc") if p.isdigit() and b"outside" in open(f"/proc/{p}/cmdline", "rb").read())
def attempt(name, f):
    try: f(); print(name, "gained")
    except OSError as e: print(name, e.errno)
for _ in range(500):
    if "@outside" in open("/proc/net/unix").read(): break
    time.sleep(0.01)
else: print("nobody listens")
attempt("connect", lambda: socket.socket(socket.AF_UNIX).connect("\\0outside"))
attempt("signal", lambda: os.kill(pid, signal.SIGUSR1))
attempt("probe", lambda: os.kill(pid, 0))
s = socket.socket(socket.AF_UNIX); s.bind("\\0mine"); s.listen(); socket.socket(socket.AF_UNIX).connect("\\0mine")
if (child := os.fork()) == 0: time.sleep(100)
os.kill(child, 9)
print("all right")
"""
    # Through stdin, so that the neighbour alone has its word in its command line.
    with bench.box(prefix=["sh", "-c", NEIGHBOUR, "engine"]) as box:
        box.feed(bundle([PYTHON, "-I", "-"], stdin=code.encode()))
        run = box.finish()
    if Hardening.LANDLOCK_SIGNALS not in run.end.hardening:
        pytest.skip("this kernel's Landlock has no scopes")
    assert run.stdout.decode().splitlines() == ["connect 1", "signal 1", "probe 1", "all right"], run.stderr


def test_memory_watch_sums_the_processes(bench: Bench) -> None:
    """Several processes that are too large together are ended, whoever of them it is, and the cause is memory."""
    argv = [PYTHON, "-I", "-S", "-c", HOG, "5", str(30 * MIB)]
    run = bench.run(argv, "--memory-watch", str(100 * MIB))
    assert (run.end.cause, run.end.signal, run.end.oom_kills) == ("memory", signal.SIGKILL, 1)
    assert run.end.run_us < 5e6


def test_memory_watch_lets_the_rest_be(bench: Bench) -> None:
    """Processes below the bound are left alone."""
    argv = [PYTHON, "-I", "-S", "-c", HOG, "2", str(30 * MIB)]
    run = bench.run(argv, "--memory-watch", str(100 * MIB), limits=Limits(timeout_s=0.6, grace_s=0.1))
    assert run.end.cause == "timeout"


def test_shared_memory_counts_once(bench: Bench) -> None:
    """Pages that forked processes share are counted once."""
    code = f"""
import os, time
block = bytearray({60 * MIB})
for i in range(0, len(block), 4096): block[i] = 1
for _ in range(6):
    if os.fork() == 0:
        time.sleep(0.5)
        os._exit(0)
for _ in range(6): os.wait()
"""
    run = bench.python(code, "--memory-watch", str(110 * MIB))
    assert (run.end.exit_code, run.end.cause) == (0, "none")


def test_memory_watch_works_while_the_script_is_being_ended(bench: Bench) -> None:
    """A script that uses its grace to take memory does not get it, and the first cause stays."""
    code = f"""
import signal, time
def late(*_):
    block = bytearray({300 * MIB})
    for i in range(0, len(block), 4096): block[i] = 1
    time.sleep(100)
signal.signal(signal.SIGTERM, late)
time.sleep(100)
"""
    run = bench.python(code, "--memory-watch", str(100 * MIB), limits=Limits(timeout_s=0.3, grace_s=4))
    assert (run.end.cause, run.end.signal) == ("timeout", signal.SIGKILL)
    assert run.end.run_us < 3e6


def test_memory_that_no_process_shows_is_refused(bench: Bench) -> None:
    """Under the watch there is no memory that stands in no process's size; without it there may be."""
    code = """
import ctypes, os
try: os.memfd_create("x"); print("memfd")
except OSError as e: print(e.errno)
print(ctypes.CDLL(None).shmget(0, 4096, 0o1666) >= 0)
import mmap
for file in (lambda: -1, lambda: os.open("/dev/zero", os.O_RDWR)):
    try: mmap.mmap(file(), 4096); print("held")
    except OSError as e: print(e.errno)
fd = os.open("/dev/shm/file", os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 4096)
mmap.mmap(fd, 4096); print("shared")
mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); print("private")
"""
    with_watch = bench.run([PYTHON, "-c", code], "--memory-watch", str(100 * MIB))
    without = bench.run([PYTHON, "-c", code])
    zero = "13" if Hardening.LANDLOCK_WRITES in with_watch.end.hardening else "held"
    assert with_watch.stdout.decode().split() == ["1", "False", "1", zero, "shared", "private"]
    assert without.stdout.decode().split() == ["memfd", "True", "held", "held", "shared", "private"]


def test_nproc(bench: Bench) -> None:
    """The script can hold only so many processes at a time."""
    code = """
import os, time
n = 0
try:
    while n < 200:
        if os.fork() == 0: time.sleep(100)
        n += 1
except BlockingIOError: pass
print(n)
"""
    made = int(bench.python(code, "--nproc", "20").stdout)
    # The supervisor and the script itself are two of them.
    assert 15 <= made <= 19


@pytest.mark.parametrize("unix_only", [True, False])
def test_socket_families(bench: Bench, unix_only: bool) -> None:
    """With --sockets unix there are AF_UNIX sockets and no others; without it those of an ordinary network too, never more."""
    code = f"""
import socket, json, ctypes
said = {{}}
for name, number in {FAMILIES!r}.items():
    for kind in ("socket", "socketpair"):
        try:
            if kind == "socket": socket.socket(number, socket.SOCK_DGRAM if number != 38 else socket.SOCK_SEQPACKET).close()
            else: socket.socketpair(number, socket.SOCK_STREAM)
            said[name + " " + kind] = 0
        except OSError as e: said[name + " " + kind] = e.errno
libc = ctypes.CDLL(None, use_errno=True)
said["high bits"] = [libc.syscall(NR, ctypes.c_long(0x100000002), 1, 0), ctypes.get_errno()]
a, b = socket.socketpair(); a.send(b"x"); said["works"] = b.recv(1).decode()
print(json.dumps(said))
""".replace("NR", str({"x86_64": 41, "aarch64": 198}[os.uname().machine]))
    run = bench.run([PYTHON, "-c", code], *(["--sockets", "unix"] if unix_only else []))
    said = json.loads(run.stdout)
    assert said.pop("works") == "x"
    result, error = said.pop("high bits")
    assert ((result, error) == (-1, 1)) is unix_only
    allowed = {"AF_UNIX socket", "AF_UNIX socketpair"}
    if not unix_only:
        allowed |= {f"{name} socket" for name in ("AF_INET", "AF_INET6", "AF_NETLINK")}
    for name, error in said.items():
        # A kernel without IPv6 says EAFNOSUPPORT by itself.
        assert error in ({0, 97} if name in allowed else {1}), (name, error)
    assert (Hardening.SOCKETS_UNIX_ONLY in run.end.hardening) is unix_only


def test_the_supervisor_is_out_of_reach(bench: Bench) -> None:
    """A script of the same uid can neither limit, nor slow, nor trace, nor read its supervisor."""
    code = """
import ctypes, os, resource
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    ctypes.set_errno(0)
    return libc.syscall(*args) != -1
import platform
X = platform.machine() == "x86_64"
nr = lambda x86, arm: x86 if X else arm
gained = []
def attempt(name, f):
    try:
        if f() is not False: gained.append(name)
    except OSError: pass
attempt("prlimit", lambda: resource.prlimit(1, resource.RLIMIT_CPU, (1, 1)))
attempt("getting limits", lambda: resource.prlimit(1, resource.RLIMIT_CPU))
attempt("affinity", lambda: os.sched_setaffinity(1, {0}))
attempt("scheduler", lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)))
attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, 1, 19))
attempt("priority of the uid", lambda: os.setpriority(os.PRIO_USER, os.getuid(), 19))
attempt("priority of the group", lambda: os.setpriority(os.PRIO_PGRP, 1, 19))
attempt("ioprio", lambda: call(nr(251, 30), 1, 1, 3 << 13))
attempt("ptrace", lambda: call(nr(101, 117), 16, 1, 0, 0))
attempt("memory", lambda: open("/proc/1/mem", "rb"))
attempt("environment", lambda: open("/proc/1/environ", "rb").read())
attempt("pidfd", lambda: os.pidfd_open(1))
attempt("pidfd by folder", lambda: call(424, os.open("/proc/1", os.O_RDONLY), 15, 0, 0))
attempt("tgkill", lambda: call(nr(234, 131), 1, 1, 15))
attempt("oom score", lambda: open("/proc/1/oom_score_adj", "w").write("1000"))
attempt("its links", lambda: os.readlink("/proc/1/exe"))
print(gained)
"""
    run = bench.run([PYTHON, "-I", "-c", code])
    assert run.stdout == b"[]\n", run.stderr
    assert (run.end.exit_code, run.end.cause) == (0, "none")


def test_a_supervisor_that_protects_nobody_refuses(bench: Bench) -> None:
    """Neither PID 1 nor of another uid than the script: it could be killed, so nothing is started."""
    with bench.box(first=False) as box:
        box.feed(bundle(["true"]))
        run = box.finish()
    assert run.fail.code == "isolation-unavailable"
    assert "neither PID 1 nor of another uid" in run.fail.message
    assert not run.started


def test_another_uid_needs_the_right_to_give_it(bench: Bench) -> None:
    """An unprivileged supervisor says that it cannot give the script another uid, and starts nothing."""
    run = bench.shell("true", "--script-uid", "1234", "--script-gid", "1234")
    assert run.fail.code == "isolation-unavailable"
    assert "may not give the script a uid of its own" in run.fail.message
