"""Reading and changing what belongs to the host: its files, environment, processes and settings."""

from __future__ import annotations

import ctypes
import itertools
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest
from tests.escape.attack import attack

import cloche
from cloche.testing.conformance import Target, observe

PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/etc", "/opt", "/srv", "/usr/share", str(Path.home()))


@pytest.fixture
def secret_files(tmp_path: Path) -> Iterator[list[Path]]:
    """Files of the host with a telling name and content, wherever this user may write; removed at the end."""
    name = f"secret-{secrets.token_hex(8)}"
    with ExitStack() as stack:
        made: list[Path] = []
        for place in [*PLACES, str(tmp_path), f"/run/user/{os.getuid()}"]:
            # What is shown of /usr is shown on purpose: only what is not a system path must stay hidden.
            if place.startswith("/usr") or not os.access(place, os.W_OK) or any(p.parent == Path(place) for p in made):
                continue
            path = Path(place, name)
            path.write_text("the host's own")
            path.chmod(0o644)
            stack.callback(path.unlink)
            made.append(path)
        assert made
        yield made


async def test_host_files(sandbox: cloche.Sandbox, secret_files: list[Path], tmp_path: Path) -> None:
    """No file of the host's users can be read: by its path, through /proc, by climbing, or by looking everywhere.

    Guard: a root of the box's own that shows system paths only.
    """
    (tmp_path / "skill").mkdir()
    ways = {
        "by its path": "{0}",
        "by the root of pid 1": "/proc/1/root{0}",
        "by my root": "/proc/self/root{0}",
        "by climbing": "/workspace/../../../../..{0}",
        "by climbing from cwd": "../../../../../../..{0}",
        "by my cwd": "/proc/self/cwd/../../../..{0}",
        "by a task": "/proc/thread-self/root{0}",
    }
    attempts = {
        f"{path.parent} {way}": f"read({pattern.format(path)!r})"
        for path in secret_files
        for way, pattern in ways.items()
    }
    attempts["anywhere"] = f"[f for f, d, files in everywhere() if {secret_files[0].name!r} in files]"
    for path in (
        "/etc/shadow",
        "/root/.ssh",
        "/root/.bashrc",
        "/proc/kcore",
        "/proc/kmsg",
        "/proc/1/environ",
        "/dev/mem",
        "/dev/kmsg",
        "/dev/vda",
        "/dev/sda",
        "/sys/kernel/debug",
        "/sys/firmware",
        "/boot",
        "/var/run/docker.sock",
        "/run/docker.sock",
        "/run/containerd/containerd.sock",
        "/run/dbus/system_bus_socket",
        "/etc/ssh",
        "/proc/vmcore",
        "/proc/kpagecount",
        # An image has such folders of its own.
        *(("/var/lib", "/home", "/var/log") if sandbox.mode == "local" else ()),
    ):
        attempts[path] = f"looked({path!r})"
    setup = """
def looked(path):
    if os.path.isdir(path):
        return os.listdir(path)
    if stat.S_ISSOCK(os.stat(path).st_mode):
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(path)
            return path
    return read(path)
"""
    await attack(
        sandbox,
        attempts,
        setup=setup,
        also_refused=("ENOTDIR", "ENXIO", "ENODEV", "ECONNREFUSED", "EIO"),
        workspace=tmp_path / "skill",
    )


async def test_devices(sandbox: cloche.Sandbox) -> None:
    """The box has the harmless devices and no other. Guard: a /dev of its own."""
    guest = (await sandbox.posture()).isolation is cloche.Isolation.KERNEL
    setup = (
        f"GUEST = {guest}"
        """
HARMLESS = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)}
if GUEST:
    HARMLESS |= {(10, 200), (10, 229)}  # gVisor's own tun and fuse; to use them takes capabilities
def harmful():
    for folder, _, files in os.walk("/dev"):
        for name in files:
            path = os.path.join(folder, name)
            status = quietly(os.lstat, path)
            if status is None or not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                continue
            device = (os.major(status.st_rdev), os.minor(status.st_rdev))
            if stat.S_ISBLK(status.st_mode) or device not in HARMLESS and device[0] not in range(136, 144):
                yield path
"""
    )
    await attack(sandbox, {"a device": "list(harmful())"}, setup=setup)


async def test_host_environment(sandbox: cloche.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the client's environment is in the box, in no process's environment.

    Guards: a cleared environment, for bubblewrap and by it; the script's is exact; the supervisor's cannot be read.
    """
    word = f"secret{secrets.token_hex(8)}"
    monkeypatch.setenv("OF_THE_HOST", word)
    for _ in range(2):  # a part of the first box may have been started before the variable was there
        await attack(
            sandbox,
            {
                "mine": f"[n for n, v in os.environ.items() if {word!r} in v or n == 'OF_THE_HOST']",
                "at start": f"{word!r}.encode() in open('/proc/self/environ', 'rb').read()",
                "of others": f"[p for p in os.listdir('/proc') if p.isdigit() and {word!r}.encode() in"
                " (quietly(read, '/proc/%s/environ' % p, 2**17) or b'')]",
            },
        )


async def test_host_processes(sandbox: cloche.Sandbox, target: Target) -> None:
    """No process but the box's own is seen or reached. Guard: a process namespace and a /proc of its own."""
    word = observe.marker()
    # Beside the supervisor there are the service's own processes; tests/opensandbox attacks these.
    seen = "int(p) not in (1, os.getpid(), os.getppid())" if sandbox.mode != "opensandbox" else "int(p) > 100"
    async with await anyio.open_process([sys.executable, "-c", "import time; time.sleep(60)", word]) as other:
        try:
            await attack(
                sandbox,
                {
                    "a command line": f"[p for p in os.listdir('/proc') if p.isdigit() and {word!r}.encode() in"
                    " (quietly(read, '/proc/%s/cmdline' % p, 4096) or b'')]",
                    "more than mine": f"[p for p in os.listdir('/proc') if p.isdigit() and {seen}]",
                    "a signal": f"os.kill({other.pid}, 9)",
                    "its memory": f"openable('/proc/{other.pid}/mem')",
                    "the parent of pid 1": "open('/proc/1/stat').read().rsplit(')', 1)[1].split()[1] != '0'",
                },
            )
            assert other.returncode is None
        finally:
            other.kill()


IPC_CREATE = 0o1666
"""IPC_CREAT (linux/ipc.h), for everybody to read and write."""
KEYS = itertools.count(0x43_0000 + os.getpid() % 0x1_0000 * 0x10)


@pytest.fixture
def host_ipc() -> Iterator[tuple[int, str]]:
    """Shared memory, semaphores and queues that every user of the host may use: the key of the first three, a name."""
    libc, key = ctypes.CDLL(None), next(KEYS)
    name = f"/of-the-host-{key:x}"
    made = [libc.shmget(key, 4096, IPC_CREATE), libc.semget(key, 1, IPC_CREATE), libc.msgget(key, IPC_CREATE)]
    queue = libc.mq_open(name.encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
    try:
        assert min(*made, queue) >= 0, "the host has none of these"
        yield key, name
    finally:
        libc.shmctl(made[0], 0, None)
        libc.semctl(made[1], 0, 0)
        libc.msgctl(made[2], 0, None)
        libc.mq_unlink(name.encode())
        os.close(queue)


async def test_host_ipc(sandbox: cloche.Sandbox, host_ipc: tuple[int, str]) -> None:
    """What processes of the host share without files is not there, open to everybody as it is, nor listed; and what a
    script makes of the kind is gone with its box. Guard: an IPC namespace.
    """
    key, name = host_ipc
    own, libc = next(KEYS), ctypes.CDLL(None)
    setup = f"""
def ipc(name, *args):
    ctypes.set_errno(0)
    result = getattr(LIBC, name)(*args)
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return "%s %d" % (name, result)
for name, *args in (("shmget", {own}, 4096, {IPC_CREATE}), ("semget", {own}, 1, {IPC_CREATE}), ("msgget", {own}, {IPC_CREATE}),
                    ("mq_open", b"{name}-own", os.O_CREAT | os.O_RDWR, 0o666, None)):
    print(name, quietly(ipc, name, *args))
"""
    attempts = {
        "shared memory": f"ipc('shmget', {key}, 0, 0)",
        "semaphores": f"ipc('semget', {key}, 0, 0)",
        "a queue of messages": f"ipc('msgget', {key}, 0)",
        "a queue by its name": f"ipc('mq_open', {name.encode()!r}, os.O_RDONLY)",
        **{
            f"a list: {kind}": f"[n for n in open('/proc/sysvipc/{kind}').read().split() if n == '{key}']"
            for kind in ("shm", "sem", "msg")
        },
    }
    result = await attack(sandbox, attempts, setup=setup)
    assert "msgget msgget" in result.stdout, "the script made none itself"
    assert libc.shmget(own, 0, 0) == libc.semget(own, 0, 0) == libc.msgget(own, 0) == -1
    assert libc.mq_open(f"{name}-own".encode(), os.O_RDONLY) == -1
    for kind in ("shm", "sem", "msg"):
        assert str(key) in Path("/proc/sysvipc", kind).read_text().split()


async def test_host_names(sandbox: cloche.Sandbox) -> None:
    """Neither the host's name nor the box's place among its control groups is told. Guards: UTS and cgroup namespaces."""
    attempts = {
        "the host's name": f"os.uname().nodename == {os.uname().nodename!r}",
        "the same in /proc": f"read('/proc/sys/kernel/hostname', 256).decode().strip() == {os.uname().nodename!r}",
    }
    if sandbox.mode == "local":  # container engines show the place where the host has cgroup v1
        attempts |= {
            f"control groups of {pid}": f"[line for line in open('/proc/{pid}/cgroup') if not line.endswith(':/\\n')]"
            for pid in ("self", 1)
        }
    await attack(sandbox, attempts)


async def test_writing_outside(sandbox: cloche.Sandbox, target: Target, tmp_path: Path) -> None:
    """Nothing can be made, changed or removed outside /output, /tmp and /dev/shm, in any folder that can be seen.

    Guard: read-only mounts, those that bubblewrap makes itself included; Landlock's write rules where the kernel has them. In
    pods the workspace is kept by Landlock alone, which has no rule for modes and times.
    """
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path, tmp_path / "folder", tmp_path / "file"):
        path.chmod(0o777)
    setup = """
WRITABLE = ("/output", "/tmp", "/dev/shm", "/proc", "/sys", "/dev/mqueue")
def folders():
    for folder, found, files in everywhere(WRITABLE):
        yield folder, files
def made():
    for folder, _ in folders():
        path = os.path.join(folder, "made-by-attack")
        for act in (lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)), lambda: os.mkdir(path),
                    lambda: os.symlink("/", path), lambda: os.mkfifo(path)):
            try:
                act()
            except OSError:
                continue
            return path
def opened():
    for folder, files in folders():
        for name in files:
            path = os.path.join(folder, name)
            status = quietly(os.lstat, path)
            if status is not None and stat.S_ISREG(status.st_mode) and quietly(openable, path):
                return path
def changed():
    for folder, files in folders():
        for name in files[:2]:
            path = os.path.join(folder, name)
            status = quietly(os.lstat, path)
            if status is not None and stat.S_ISCHR(status.st_mode):
                continue  # who may write to a device may set its times
            acts = [os.unlink, lambda p: os.rename(p, p + "x")]
            if not os.path.islink(path):  # /dev/stderr leads to the script's own pipe, and any link's times may be set to now
                acts += [lambda p: os.truncate(p, 0)]
                if SEALED or not path.startswith("/workspace/"):
                    acts += [lambda p: os.utime(p), lambda p: os.chmod(p, 0o777)]
            for act in acts:
                try:
                    act(path)
                except OSError:
                    continue
                return path
"""
    await attack(
        sandbox,
        {"made": "made()", "opened": "opened()", "changed": "changed()"},
        setup=f"SEALED = {target.seals_workspace}\n{setup}",
        workspace=tmp_path,
        timeout=50,
    )
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


async def test_attributes(sandbox: cloche.Sandbox) -> None:
    """No file has an attribute set, nor its list of access: none is bounded, and what all may write to can be on the disk of
    the engine's host (a pod's termination log is). Guard: the filter.
    """
    attempts = {
        "of the workspace": "os.setxattr('/workspace/attack.py', 'user.x', b'x' * 3000) or True",
        "access of the workspace": "os.setxattr('/workspace/attack.py', 'system.posix_acl_access', b'\\2\\0\\0\\0') or True",
        "of its own": "os.setxattr(open('/tmp/x', 'w').name, 'user.x', b'x') or True",
        "setxattrat": "call('setxattrat', -100, b'/tmp/x', 0, b'user.y', VALUE, 16) == 0",
        "anywhere": "[p for f, _, files in everywhere() for n in files[:3] for p in [os.path.join(f, n)]"
        " if not os.path.islink(p) and quietly(lambda: os.setxattr(p, 'user.z', b'x') or True)]",
    }
    await attack(
        sandbox,
        attempts,
        setup="BYTE = ctypes.create_string_buffer(b'x')\nVALUE = struct.pack('QII', ctypes.addressof(BYTE), 1, 0)\n"
        "open('/tmp/x', 'w').close()",
        also_refused=("ENOTSUP", "EOPNOTSUPP"),
        timeout=50,
    )


async def test_termination_log(sandbox: cloche.Sandbox) -> None:
    """The file in which a pod may leave a message, on the node's disk, cannot be written. Guard: Landlock."""
    attempts = {
        "write": "openable('/dev/termination-log', os.O_WRONLY)",
        "truncate": "os.truncate('/dev/termination-log', 1000) or True",
        "by a path descriptor": "openable('/proc/self/fd/%d' % os.open('/dev/termination-log', os.O_PATH), os.O_WRONLY)",
    }
    await attack(sandbox, attempts)


WATCHED = (
    "kernel/core_pattern",
    "kernel/printk",
    "kernel/hostname",
    "kernel/panic",
    "kernel/modprobe",
    "vm/swappiness",
    "vm/overcommit_memory",
    "fs/file-max",
    "net/ipv4/ip_forward",
    "kernel/sysrq",
    "kernel/randomize_va_space",
)


async def test_kernel_settings(sandbox: cloche.Sandbox) -> None:
    """No setting of the kernel can be opened for writing, be cloche root or not, and none has changed afterwards.

    Guard: the script is not the host's root, not even as a number; /proc and /sys are read-only or not there.
    """
    paths = [path for name in WATCHED if (path := Path("/proc/sys", name)).exists()]
    before = {path: path.read_text() for path in paths}
    attempts = {f"write {path}": f"openable({str(path)!r})" for path in paths}
    setup = """
def writable(top):
    for folder, folders, files in os.walk(top):
        if top == "/proc" and folder == "/proc":
            folders[:] = [f for f in folders if not f.isdigit() and f not in ("self", "thread-self", "sys")]
        for name in files:
            path = os.path.join(folder, name)
            # Who opens /proc/pressure for writing gets a trigger for himself.
            if not path.startswith("/proc/pressure/") and quietly(rewritten, path):
                yield path
def rewritten(path):
    # Some can be opened by anybody, and refuse the write. The old value is no change.
    if os.stat(path).st_rdev == os.makedev(1, 3):
        return None  # container engines hide a file behind /dev/null
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    old = quietly(read, path, 4096)
    os.write(fd, old or b"0")
    return path
"""
    attempts["anything in /proc/sys"] = "list(writable('/proc/sys'))"
    attempts["anything in /proc"] = "list(writable('/proc'))"
    attempts["anything in /sys"] = "list(writable('/sys'))"
    attempts["sysrq"] = "openable('/proc/sysrq-trigger')"
    attempts["a cgroup"] = (
        "[f for f, d, files in os.walk('/sys/fs/cgroup') if quietly(os.mkdir, f + '/made') is None][:0]"
    )
    await attack(sandbox, attempts, setup=setup)
    assert {path: path.read_text() for path in paths} == before


async def test_fill_everything(sandbox: cloche.Sandbox) -> None:
    """Every mount, every folder of / and /dev filled up to 1 GiB: the bounded ones say ENOSPC, the others refuse, the run lives.

    Guard: bounded tmpfs, all else read-only.
    """
    before = os.statvfs("/tmp")
    setup = """
left = 1024 * MIB
taken = {}
mounts = [line.split()[4].encode().decode("unicode_escape") for line in open("/proc/self/mountinfo")]
places = mounts + ["/", "/dev", "/etc", "/usr", "/run", "/var", "/home", "/workspace", "/output", "/tmp", "/dev/shm",
                   "/dev/pts", "/dev/mqueue", "/proc", "/sys"]
for place in dict.fromkeys(places):
    name = os.path.join(place, "filler") if os.path.isdir(place) else place
    if place in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"):
        continue
    fd = quietly(os.open, name, os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    if fd is None or os.fstat(fd).st_rdev == os.makedev(1, 3):
        continue  # container engines hide a file behind /dev/null
    try:
        while left > 0:
            n = os.write(fd, b"x" * MIB)
            left -= n
            taken[place] = taken.get(place, 0) + n
    except OSError:
        pass
"""
    allowed = ("/tmp", "/output", "/dev/shm")
    result = await attack(
        sandbox,
        {
            "another place": f"[place for place, n in taken.items() if n and place not in {allowed}]",
            "more than its bound": "[place for place, n in taken.items() if n > 64 * MIB]",
            "nothing was full": f"[place for place in {allowed} if not taken.get(place)]",
            "the budget": "left <= 0",
        },
        setup=setup,
        timeout=50,
    )
    assert all(artifact.size <= 64 * 2**20 for artifact in result.artifacts)
    after = os.statvfs("/tmp")
    assert before.f_bavail * before.f_frsize - after.f_bavail * after.f_frsize < 512 * 2**20
