"""The supervisor as root among other processes, with a script of another uid: as in a container with an init of its own."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.supervisor import builds
from tests.supervisor.harness import ENV, PYTHON, Bench, Run, bundle, fresh_uid

from cloche.spec import Limits
from cloche.supervisor.bundle import File
from cloche.supervisor.frames import Data, Decoder, Hardening

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give the script a uid of its own")

SHORT = Limits(timeout_s=0.4, grace_s=0.2)
DAEMONS = """
import os, signal, time
for i in range(6):
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if i % 2: os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(100)
time.sleep(0.1)
print("done")
"""
WITHOUT_KILL = "CAP_SETUID,CAP_SETGID,CAP_SETPCAP,CAP_CHOWN,CAP_DAC_OVERRIDE,CAP_FOWNER"


def python(
    bench: Bench,
    code: str,
    *options: str,
    limits: Limits | None = None,
    capabilities: str = "ALL",
    first: bool = False,
) -> Run:
    """A run that left nothing behind."""
    with bench.beside(*options, capabilities=capabilities, first=first) as box:
        box.feed(bundle([PYTHON, "-I", "-S", "-u", "-c", code], limits=limits))
        run = box.finish()
        assert box.left() == []
    return run


@pytest.mark.parametrize("first", [False, True])
def test_identity(bench: Bench, first: bool) -> None:
    """The script has exactly the uid and gid that were named, no groups and no capabilities; the last frame says so."""
    code = """
import os, json
status = dict(line.rstrip("\\n").split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), status]))
open("/output/mine", "w").write("x")
"""
    uid, gid = fresh_uid(), fresh_uid()
    with bench.beside(ids=(uid, gid), first=first, groups=(fresh_uid(), 0)) as box:
        box.feed(bundle([PYTHON, "-I", "-S", "-c", code]))
        run = box.finish()
    assert run.stderr == b""
    uids, gids, groups, status = json.loads(run.stdout)
    assert (uids, gids, groups) == ([uid] * 3, [gid] * 3, [])
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert Hardening.OWN_UID in run.end.hardening
    assert (Hardening.PID_1 in run.end.hardening) is first is (run.hello.pid == 1)
    assert run.files["mine"].data == b"x"


BARE_CONTAINER = """
set -e
mount -t tmpfs none "$1"
cd "$1"
mkdir usr proc dev tmp
mount --rbind /usr usr
mount -t proc proc proc
for name in bin lib lib64; do if [ -L "/$name" ]; then cp -d "/$name" "$name"; fi; done
touch dev/null supervisor
mount --bind /dev/null dev/null
mount --bind "$2" supervisor
shift 2
exec chroot . /supervisor run "$@"
"""
"""What an engine does at the least: a root of its own and PID 1, and no no_new_privs, which bubblewrap always sets."""


def test_no_new_privs(shipped: Bench, folder: Path) -> None:
    """Where no engine has set no_new_privs, the supervisor does."""
    root = folder / "bare-container"
    root.mkdir()
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", BARE_CONTAINER, "container"]
    command += [str(root), str(shipped.build.path), "--script-uid", str(fresh_uid()), "--script-gid", str(fresh_uid())]
    given = bundle(["grep", "-h", "NoNewPrivs", "/proc/1/status", "/proc/self/status"])
    done = subprocess.run(command, input=given, capture_output=True, timeout=20, check=False)
    frames = list(Decoder().feed(done.stdout))
    told = b"".join(frame.data for frame in frames if isinstance(frame, Data))
    assert told == b"NoNewPrivs:\t0\nNoNewPrivs:\t1\n", (frames, done.stderr)


SHARED = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
made = libc.shmget(0, 4096, 0o1600)
assert made >= 0 and libc.shmat(made, None, 0) not in (None, ctypes.c_void_p(-1).value)
print(os.nice(0), flush=True)
os._exit(0)
"""


def test_shared_memory(bench: Bench) -> None:
    """Shared memory, which outlives whoever made it, goes with the script; others' stays."""
    libc = ctypes.CDLL(None, use_errno=True)
    others = libc.shmget(0, 4096, 0o1600)
    try:
        uid, gid = fresh_uid(), fresh_uid()
        with bench.beside(ids=(uid, gid)) as box:
            box.feed(bundle([PYTHON, "-I", "-S", "-c", SHARED]))
            run = box.finish()
        assert run.stderr == b""
        left = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
        assert [words for words in left if int(words[7]) == uid] == []
        assert others in [int(words[1]) for words in left]
    finally:
        libc.shmctl(others, 0, None)


@pytest.mark.parametrize(("first", "priority"), [(True, b"0\n"), (False, b"19\n")])
def test_priority(bench: Bench, first: bool, priority: bytes) -> None:
    """Beside others that carry what it says, a script has the lowest priority, so that it cannot starve them."""
    run = python(bench, "import os; print(os.nice(0))", first=first)
    assert run.stdout == priority


AN_IMAGES_FOLDERS = """
import os, stat
for path in ("/workspace", "/tmp"):
    found = os.stat(path)
    print(path, oct(stat.S_IMODE(found.st_mode)), found.st_uid)
for path in ("/workspace/new", "/workspace/theirs", "/tmp/theirs"):
    try:
        os.rename("/tmp/mine", path) if path == "/tmp/theirs" else os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        print("written:", path)
    except PermissionError:
        pass
"""


@pytest.mark.parametrize("modes", ["0777 0777", "1777 0755", "0700 0777", "0755 1777"])
def test_folders_of_an_image(shipped: Bench, folder: Path, modes: str) -> None:
    """Where the image itself has a /workspace and no engine covers it, that is not the script's to write, whatever its mode; nor
    is what others have in a /tmp that the image left open to everybody, or closed.
    """
    root = folder / f"container {modes}"
    root.mkdir()
    workspace, tmp = modes.split()
    prepare = f"""mkdir workspace
touch workspace/theirs tmp/theirs
chown 12345 workspace
chmod {workspace} workspace
chmod {tmp} tmp
"""
    script = BARE_CONTAINER.replace("shift 2\n", prepare + "shift 2\n")
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "container"]
    command += [str(root), str(shipped.build.path), "--script-uid", str(fresh_uid()), "--script-gid", str(fresh_uid())]
    code = "open('/tmp/mine', 'w').close()\n" + AN_IMAGES_FOLDERS
    done = subprocess.run(
        command, input=bundle([PYTHON, "-I", "-S", "-c", code]), capture_output=True, timeout=20, check=False
    )
    frames = list(Decoder().feed(done.stdout))
    told = b"".join(frame.data for frame in frames if isinstance(frame, Data)).decode()
    assert told.splitlines() == ["/workspace 0o755 0", "/tmp 0o1777 0"], (told, frames, done.stderr)


@pytest.mark.parametrize("capabilities", ["ALL", WITHOUT_KILL])
@pytest.mark.parametrize("first", [False, True])
def test_everything_dies(bench: Bench, capabilities: str, first: bool) -> None:
    """What the script leaves in other sessions, deaf or stopped, is killed with it, also where root may not kill."""
    run = python(bench, DAEMONS, capabilities=capabilities, first=first)
    assert run.stdout == b"done\n"
    assert (run.end.exit_code, run.end.cause) == (0, "none")
    assert run.end.run_us < 1e6


@pytest.mark.parametrize("capabilities", ["ALL", WITHOUT_KILL])
def test_timeout(bench: Bench, capabilities: str) -> None:
    """At its time the tree gets SIGTERM and, after the grace, SIGKILL."""
    code = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(4))\ntime.sleep(100)"
    polite = python(bench, code, limits=SHORT, capabilities=capabilities)
    assert (polite.end.exit_code, polite.end.cause) == (4, "timeout")
    begun = time.monotonic()
    code = DAEMONS + "signal.signal(15, signal.SIG_IGN)\ntime.sleep(100)"
    stubborn = python(bench, code, limits=SHORT, capabilities=capabilities)
    assert (stubborn.end.signal, stubborn.end.cause) == (signal.SIGKILL, "timeout")
    assert 0.6e6 <= stubborn.end.run_us < 1.2e6
    assert time.monotonic() - begun < 3


def test_cancel(bench: Bench) -> None:
    """SIGTERM to the supervisor cancels the run."""
    with bench.beside() as box:
        box.feed(bundle(["sh", "-c", "echo ready; trap 'exit 6' TERM; while :; do sleep 0.02; done"]))
        box.read_until(b" o ")
        time.sleep(0.1)
        box.stop()
        run = box.finish()
        assert box.left() == []
    assert (run.end.exit_code, run.end.cause) == (6, "cancel")


@pytest.mark.parametrize("capabilities", ["ALL", WITHOUT_KILL])
def test_hunted_helper(bench: Bench, folder: Path, capabilities: str) -> None:
    """A script that stops and kills whatever helper it meets dies all the same."""
    if shutil.which("cc") is None:
        builds.absent("there is no C compiler")
    hunter = folder / "helper-hunter"
    if not hunter.exists():
        builds.compile_c(["cc", *builds.CFLAGS, "-O2", "-static"], [builds.HERE / "helper_hunter.c"], hunter)
    with bench.beside(capabilities=capabilities) as box:
        entries = [File("hunter", hunter.read_bytes(), executable=True)]
        box.feed(bundle(["./hunter"], entries=entries, env={**ENV, "PATH": "/workspace"}, limits=SHORT))
        begun = time.monotonic()
        run = box.finish()
        assert box.left() == []
    assert run.stdout == b"hunting\n" * 4
    assert (run.end.signal, run.end.cause) == (signal.SIGKILL, "timeout")
    assert time.monotonic() - begun < 4


@contextlib.contextmanager
def pids_cgroup(limit: int) -> Iterator[Path]:
    """A cgroup that holds so many processes; gives the file that takes them."""
    top = Path("/sys/fs/cgroup/pids" if Path("/sys/fs/cgroup/pids").is_dir() else "/sys/fs/cgroup")
    place = top / f"supervisor-tests-{os.getpid()}"
    try:
        place.mkdir()
        (place / "pids.max").write_text(str(limit))
    except OSError as exc:
        with contextlib.suppress(OSError):
            place.rmdir()
        pytest.skip(f"no cgroup can bound the number of processes here: {exc}")
    try:
        yield place / "cgroup.procs"
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                place.rmdir()
                break
            time.sleep(0.02)


def test_a_script_that_holds_every_pid(bench: Bench) -> None:
    """Where the script has taken all pids, so that no helper can be forked, it dies all the same."""
    code = """
import os, signal, time
signal.signal(15, signal.SIG_IGN)
while True:
    try: os.fork()
    except OSError: time.sleep(0.001)
"""
    with pids_cgroup(40) as procs, bench.beside() as box:
        procs.write_text(str(box.pid))
        box.feed(bundle([PYTHON, "-I", "-S", "-c", code], limits=SHORT))
        run = box.finish()
        assert box.left() == []
    assert run.end.cause == "timeout"
    assert run.end.run_us < 2e6


def test_the_script_cannot_reach_the_supervisor(bench: Bench) -> None:
    """No signal, no limit, no look into it."""
    code = """
import os, resource
p = os.getppid()
def attempt(name, f):
    try: f()
    except OSError as e: return
    print("gained", name)
for number in (0, 2, 9, 15, 18, 19): attempt(f"signal {number}", lambda: os.kill(p, number))
attempt("group", lambda: os.kill(-p, 9))
attempt("all", lambda: os.kill(-1, 9))
attempt("prlimit", lambda: resource.prlimit(p, resource.RLIMIT_CPU, (1, 1)))
attempt("fd", lambda: os.listdir(f"/proc/{p}/fd"))
attempt("memory", lambda: open(f"/proc/{p}/mem", "rb"))
print("alive")
"""
    assert python(bench, code).stdout == b"alive\n"


def test_files_are_not_the_scripts(bench: Bench) -> None:
    """Where the workspace is no sealed mount, its owner is the supervisor: the script reads it and cannot change it."""
    code = "cat f; echo x >f; echo x >new; rm -f f; chmod 777 f; mv f g; ls"
    with bench.beside() as box:
        # bubblewrap's tmpfs is open to all here, as an image's folder may be: only what is in it is told.
        box.feed(bundle(["sh", "-c", code], entries=[File("f", b"data\n")]))
        run = box.finish()
    assert run.stdout.startswith(b"data\n")
    assert b"Permission denied" in run.stderr


def test_memory_watch_sees_what_hides(bench: Bench) -> None:
    """The watch counts a process that made itself unreadable, and not those of other uids."""
    code = f"""
import ctypes, os, time
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
block = bytearray({150 * 2**20})
for i in range(0, len(block), 4096): block[i] = 1
time.sleep(100)
"""
    with bench.beside("--memory-watch", str(100 * 2**20)) as box:
        box.feed(bundle([PYTHON, "-c", code], limits=Limits(timeout_s=5)))
        run = box.finish()
    assert (run.end.cause, run.end.signal) == ("memory", signal.SIGKILL)
    modest = python(bench, "import time; time.sleep(0.3)", "--memory-watch", str(40 * 2**20))
    assert modest.end.exit_code == 0


def test_a_killed_supervisor_takes_the_script_with_it(bench: Bench) -> None:
    """When the supervisor itself is killed, the script's main process does not outlive it."""
    with bench.beside() as box:
        box.feed(bundle(["sh", "-c", "echo ready; exec sleep 100"]))
        box.read_until(b" o ")
        assert len(box.left()) == 1
        box.stop(signal.SIGKILL)
        box.wait_until_dead(3)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("ids", "why"), [((0, 5), "uid 0"), ((5, 0), "gid 0")])
def test_no_script_as_root(bench: Bench, first: bool, ids: tuple[int, int], why: str) -> None:
    """A script is never started with uid or gid 0."""
    with bench.beside(ids=ids, first=first) as box:
        box.feed(bundle(["true"]))
        run = box.finish()
    assert run.fail.code == "isolation-unavailable"
    assert why in run.fail.message


def test_no_script_as_root_by_omission(bench: Bench) -> None:
    """Root that was not told a uid for the script starts nothing."""
    with bench.beside(named=False, first=True) as box:
        box.feed(bundle(["true"]))
        run = box.finish()
    assert "uid 0" in run.fail.message
