"""The system call filter, instruction by instruction, for both architectures: evaluated here, not installed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.supervisor import builds

pytestmark = pytest.mark.timeout(600)  # zig builds its C library on first use
ARCHS = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_… of linux/audit.h."""
I386, ARM = 0x40000003, 0x40000028
HIGH = 0x1_0000_0000
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
"""SECCOMP_RET_… of linux/seccomp.h."""
CLONE_THREAD_GLIBC = 0x3D0F00
"""CLONE_{VM,FS,FILES,SIGHAND,THREAD,SYSVSEM,SETTLS,PARENT_SETTID,CHILD_CLEARTID} (glibc, nptl/pthread_create.c)."""
CLONE_THREAD_MUSL = 0x7D0F00
"""The same with CLONE_DETACHED (musl, src/thread/pthread_create.c)."""
CLONE_FORK = 0x1200011
CLONE_VFORK = 0x4111


@dataclass(frozen=True)
class Filter:
    """A classic BPF program and the system calls of its architecture, by name."""

    arch: int
    calls: dict[str, int]
    program: list[list[int]]

    def verdict(self, nr: int, *args: int, arch: int | None = None) -> str:
        """What the kernel would do with a call."""
        arch = self.arch if arch is None else arch
        data = nr.to_bytes(4, "little") + arch.to_bytes(4, "little") + (0).to_bytes(8, "little")
        for i in range(6):
            data += ((args[i] if i < len(args) else 0xDEAD_BEEF_0000_0003) % 2**64).to_bytes(8, "little")
        result = interpret(self.program, data)
        if result == ALLOW:
            return "allowed"
        assert result & 0xFFFF0000 == ERRNO, hex(result)
        return errno.errorcode[result & 0xFFFF]

    def call(self, name: str, *args: int) -> str:
        """The same by name."""
        return self.verdict(self.calls[name], *args)


def interpret(program: Sequence[Sequence[int]], data: bytes) -> int:
    """Run classic BPF (linux/filter.h), as far as seccomp knows it. Every jump must stay inside and go forward."""
    accumulator = 0
    at = 0
    while True:
        code, jt, jf, k = program[at]
        at += 1
        match code:
            case 0x20:  # ld [k]
                assert k % 4 == 0
                accumulator = int.from_bytes(data[k : k + 4], "little")
            case 0x54:  # and #k
                accumulator &= k
            case 0x15:  # jeq #k
                at += jt if accumulator == k else jf
            case 0x35:  # jge #k
                at += jt if accumulator >= k else jf
            case 0x45:  # jset #k
                at += jt if accumulator & k else jf
            case 0x06:  # ret #k
                return k
            case _:
                raise AssertionError(f"instruction {at - 1} has an unknown code {code:#x}")


def dumped(
    folder: Path, arch: str, supervisor: int = 1, *, unix_only: bool = False, no_hidden_memory: bool = False
) -> Filter:
    place = folder / "filters"
    place.mkdir(exist_ok=True)
    program = place / f"filter-dump-{arch}"
    if program.exists():
        command = [str(program)] if arch == os.uname().machine else [builds.qemu(), str(program)]
    else:
        command = builds.filter_dump(place, arch)
    flags = [str(supervisor), str(int(unix_only)), str(int(no_hidden_memory))]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
    return Filter(**json.loads(done.stdout))


@pytest.fixture(scope="module", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(folder: Path, arch: str) -> Filter:
    """The filter of a box with an ordinary network and a cgroup, its supervisor PID 1."""
    return dumped(folder, arch)


def test_well_formed(plain: Filter, arch: str) -> None:
    """The kernel would take the program: jumps stay inside, every path ends, and all of it can be reached."""
    length = len(plain.program)
    assert plain.arch == ARCHS[arch]
    assert 100 < length < 640
    reached, todo = set(), [0]
    while todo:
        at = todo.pop()
        if at in reached:
            continue
        assert at < length
        reached.add(at)
        code, jt, jf, _ = plain.program[at]
        if code == 0x06:
            continue
        todo += [at + 1 + jt, at + 1 + jf] if code & 7 == 5 else [at + 1]
    assert reached == set(range(length))


ORDINARY = [
    "read", "write", "openat", "close", "mmap", "mprotect", "munmap", "brk", "futex", "execve", "exit_group", "wait4",
    "getrandom", "memfd_create", "sched_getaffinity", "rt_sigaction", "rt_sigprocmask", "sigaltstack", "set_robust_list",
    "epoll_pwait", "eventfd2", "pipe2", "clock_nanosleep", "getpid", "setsid", "madvise", "statx", "getcwd", "connect", "bind",
    "sendmsg", "seccomp", "capset", "getpriority", "shmget", "shmat", "close_range", "openat2", "faccessat2", "epoll_pwait2",
    "landlock_create_ruleset", "futex_waitv", "fchmodat2", "getxattr", "listxattr", "fork", "vfork", "open", "poll", "arch_prctl",
]  # fmt: skip
REFUSED = [
    "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "pidfd_send_signal", "process_madvise",
    "process_mrelease", "migrate_pages", "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree", "open_tree_attr",
    "move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "quotactl", "quotactl_fd", "swapon", "swapoff",
    "open_by_handle_at", "fanotify_init", "acct", "nfsservctl", "keyctl", "add_key", "request_key", "bpf", "perf_event_open",
    "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "memfd_secret", "kexec_load", "kexec_file_load",
    "init_module", "finit_module", "delete_module", "reboot", "syslog", "sethostname", "setdomainname", "settimeofday",
    "clock_settime", "clock_adjtime", "adjtimex", "vhangup", "lookup_dcookie", "iopl", "ioperm", "uselib", "ustat", "sysfs",
    "modify_ldt",
]  # fmt: skip
UNSUPPORTED = [
    "setxattr", "lsetxattr", "fsetxattr", "setxattrat", "removexattr", "lremovexattr", "fremovexattr", "removexattrat",
]  # fmt: skip
X86_ONLY = {
    "fork",
    "vfork",
    "open",
    "poll",
    "arch_prctl",
    "mknod",
    "iopl",
    "ioperm",
    "uselib",
    "ustat",
    "sysfs",
    "modify_ldt",
}


def test_every_call_by_its_number(plain: Filter, arch: str) -> None:
    """What is refused is refused whatever its arguments; what every program needs is allowed whatever its arguments."""
    wanted = {
        **dict.fromkeys(ORDINARY, "allowed"),
        **dict.fromkeys(REFUSED, "EPERM"),
        **dict.fromkeys(UNSUPPORTED, errno.errorcode[errno.EOPNOTSUPP]),
        "io_setup": "ENOSYS",
    }
    for name, want in wanted.items():
        if name in X86_ONLY and arch != "x86_64":
            assert name not in plain.calls
            continue
        for value in (0, 1, 2, 2**32 - 1, 2**64 - 1, HIGH, 0x7E020080):
            assert plain.call(name, *[value] * 6) == want, (name, value)


def test_nothing_else_is_refused(plain: Filter) -> None:
    """A number that stands in no list is allowed; the lists above are complete."""
    named = {number: name for name, number in plain.calls.items()}
    for number in range(plain.calls["newest"]):
        if plain.verdict(number, *[0] * 6) != "allowed":
            # With all arguments 0 these are refused rightly: signalling needs no target of 0, priorities need a kind.
            known = {*REFUSED, *UNSUPPORTED, "io_setup", "clone3", "ioprio_set", "socketpair", "socket"}
            assert named.get(number) in known, number


CASES: list[tuple[str, tuple[int, ...], str]] = [
    ("clone", (CLONE_THREAD_GLIBC,), "allowed"),
    ("clone", (CLONE_THREAD_MUSL,), "allowed"),
    ("clone", (CLONE_FORK,), "allowed"),
    ("clone", (CLONE_VFORK,), "allowed"),
    ("clone", (17,), "allowed"),
    *[
        ("clone", (flag | 17,), "EPERM")
        for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
    ],
    ("clone", (HIGH | 0x10000000,), "EPERM"),
    ("clone", (HIGH | 17,), "allowed"),
    ("clone3", (0, 88), "ENOSYS"),
    *[
        ("unshare", (flag,), "EPERM")
        for flag in (0x80, 0x20000, 0x10000000, 0x20000000, 0x40000000, 0x10000000 | 0x400)
    ],
    ("unshare", (0x400,), "allowed"),
    ("unshare", (HIGH | 0x10000000,), "EPERM"),
    ("kill", (0, 15), "allowed"),
    ("kill", (2, 9), "allowed"),
    ("kill", (12345, 0), "allowed"),
    ("kill", (-2, 15), "allowed"),
    ("kill", (-1, 9), "EPERM"),
    ("kill", (2**32 - 1, 9), "EPERM"),
    ("kill", (1, 0), "EPERM"),
    ("kill", (HIGH | 1, 15), "EPERM"),
    ("kill", (HIGH | 0xFFFFFFFF, 15), "EPERM"),
    ("kill", (HIGH | 2, 15), "allowed"),
    ("tkill", (1, 9), "EPERM"),
    ("tkill", (HIGH | 1, 9), "EPERM"),
    ("tkill", (2, 9), "allowed"),
    ("tgkill", (1, 5, 9), "EPERM"),
    ("tgkill", (5, 1, 9), "EPERM"),
    ("tgkill", (-1, 1, 9), "EPERM"),
    ("tgkill", (2, 3, 9), "allowed"),
    ("rt_sigqueueinfo", (1, 15, 0), "EPERM"),
    ("rt_sigqueueinfo", (2, 15, 0), "allowed"),
    ("rt_tgsigqueueinfo", (2, 1, 15, 0), "EPERM"),
    ("rt_tgsigqueueinfo", (1, 2, 15, 0), "EPERM"),
    ("rt_tgsigqueueinfo", (2, 3, 15, 0), "allowed"),
    ("pidfd_open", (1, 0), "EPERM"),
    ("pidfd_open", (HIGH | 1, 0), "EPERM"),
    ("pidfd_open", (7, 0), "allowed"),
    ("prlimit64", (0, 7, 0, 0), "allowed"),
    ("prlimit64", (1, 7, 0, 0), "EPERM"),
    ("prlimit64", (HIGH | 1, 7, 0, 0), "EPERM"),
    ("prlimit64", (HIGH, 7, 0, 0), "allowed"),
    *[
        (name, (pid,), "allowed" if pid % HIGH == 0 else "EPERM")
        for name in ("sched_setparam", "sched_setscheduler", "sched_setattr", "sched_setaffinity", "move_pages")
        for pid in (0, 1, 2, HIGH, HIGH | 1)
    ],
    ("setpriority", (0, 0, 5), "allowed"),
    ("setpriority", (0, 1, 5), "EPERM"),
    ("setpriority", (1, 0, 5), "EPERM"),
    ("setpriority", (2, 0, 5), "EPERM"),
    ("setpriority", (HIGH, HIGH | 1, 5), "EPERM"),
    ("ioprio_set", (1, 0, 5), "allowed"),
    ("ioprio_set", (1, 1, 5), "EPERM"),
    ("ioprio_set", (2, 0, 5), "EPERM"),
    ("ioprio_set", (3, 0, 5), "EPERM"),
    ("prctl", (62, 1, 1), "EPERM"),
    ("prctl", (HIGH | 62, 1, 1), "EPERM"),
    ("prctl", (38, 1), "allowed"),
    ("prctl", (15, 0), "allowed"),
    ("fcntl", (3, 10, 15), "EPERM"),
    ("fcntl", (3, 15, 0), "EPERM"),
    ("fcntl", (3, HIGH | 10, 15), "EPERM"),
    ("fcntl", (3, 8, 1), "EPERM"),
    ("fcntl", (3, 8, -1), "EPERM"),
    ("fcntl", (3, 8, HIGH | 1), "EPERM"),
    ("fcntl", (3, 8, 77), "allowed"),
    ("fcntl", (3, 4, 1), "allowed"),
    ("fcntl", (3, 1030, 1), "allowed"),
    ("fcntl", (3, 1033, -1), "allowed"),
    *[("ioctl", (0, request), "EPERM") for request in (0x5412, 0x541C, 0x5423, 0x8901, 0x8902, HIGH | 0x5412)],
    *[("ioctl", (0, request), "allowed") for request in (0x5401, 0x5413, 0x541B, 0x5421, 0x8903)],
    *[
        ("mknodat", (-100, 0, mode), "EPERM" if mode & 0o170000 in {0o020000, 0o060000} else "allowed")
        for mode in (0o010666, 0o140666, 0o100644, 0o644, 0o020666, 0o060666, HIGH | 0o020666)
    ],
    ("personality", (0,), "allowed"),
    ("personality", (0xFFFFFFFF,), "allowed"),
    ("personality", (HIGH | 0xFFFFFFFF,), "allowed"),
    ("personality", (0x0040000,), "EPERM"),
    ("personality", (8,), "EPERM"),
    *[("socket", (family, 1, 0), "allowed" if family in {1, 2, 10, 16} else "EPERM") for family in range(50)],
    ("socket", (HIGH | 40, 1, 0), "EPERM"),
    *[("socketpair", (family, 1, 0, 0), "allowed" if family == 1 else "EPERM") for family in (0, 1, 2, 10, 30)],
]


@pytest.mark.parametrize(("name", "args", "want"), CASES, ids=str)
def test_arguments(plain: Filter, name: str, args: tuple[int, ...], want: str) -> None:
    """Calls that are judged by their arguments, in the bits that the kernel itself looks at."""
    assert plain.call(name, *args) == want


def test_device_nodes_of_the_old_call(plain: Filter, arch: str) -> None:
    """mknod is bounded as mknodat is, where there is one."""
    if arch != "x86_64":
        assert "mknod" not in plain.calls
        return
    assert plain.call("mknod", 0, 0o010666, 0) == "allowed"
    assert plain.call("mknod", 0, 0o020666, 259) == "EPERM"
    assert plain.call("mknod", 0, 0o060666, 259) == "EPERM"


def test_foreign_architectures(plain: Filter, arch: str) -> None:
    """A call made as another architecture is refused, whatever its number."""
    for foreign in {I386, ARM, *ARCHS.values()} - {ARCHS[arch]}:
        for number in (0, 1, 3, 4, 20, 39, 57, 435, 1000, 0x40000000):
            assert plain.verdict(number, *[0] * 6, arch=foreign) == "EPERM"


def test_numbers_outside_of_the_list(plain: Filter, arch: str) -> None:
    """x32 is refused, a number that the list does not know yet does not exist."""
    newest = plain.calls["newest"]
    for number in (0x40000000, 0x40000000 + 59, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        assert plain.verdict(number, *[0] * 6) == ("EPERM" if arch == "x86_64" else "ENOSYS")
    for number in (newest, newest + 1, 500, 512, 547, 1000, 0x3FFFFFFF):
        assert plain.verdict(number, *[0] * 6) == "ENOSYS"
    assert plain.verdict(newest - 1, *[0] * 6) == "allowed"


@pytest.mark.parametrize("supervisor", [2, 77, 4_194_303])
def test_a_supervisor_of_another_number(folder: Path, arch: str, supervisor: int) -> None:
    """Where the supervisor is not PID 1, it is its own number that no signal may name."""
    its = dumped(folder, arch, supervisor)
    for name, position in itertools.chain(
        [(name, 0) for name in ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open")],
        [("tgkill", 1), ("rt_tgsigqueueinfo", 1)],
    ):
        for target in (supervisor, -supervisor, HIGH | supervisor, -1):
            args = [5, 5, 5]
            args[position] = target
            assert its.call(name, *args) == "EPERM", (name, target)
        assert its.call(name, 5, 5, 5) == "allowed"
    assert its.call("kill", 1, 15) == "allowed"
    assert its.call("fcntl", 3, 8, supervisor) == "EPERM"
    assert its.call("fcntl", 3, 8, -supervisor) == "EPERM"
    assert its.call("fcntl", 3, 8, -1) == "EPERM"


def test_sockets_unix_only(folder: Path, arch: str) -> None:
    """Where no network namespace holds, the filter leaves AF_UNIX alone."""
    its = dumped(folder, arch, unix_only=True)
    for family in range(50):
        want = "allowed" if family == 1 else "EPERM"
        assert its.call("socket", family, 1, 0) == want
        assert its.call("socket", HIGH | family, 1, 0) == want
        assert its.call("socketpair", family, 1, 0, 0) == want


def test_no_hidden_memory(folder: Path, arch: str) -> None:
    """Under the watch there is no memory that outlives its last map or hides in swap, and all else is as before."""
    its, plain = dumped(folder, arch, no_hidden_memory=True), dumped(folder, arch)
    for number in range(plain.calls["newest"] + 5):
        refused = number in {its.calls["memfd_create"], its.calls["shmget"]}
        assert its.verdict(number, *[0] * 6) == ("EPERM" if refused else plain.verdict(number, *[0] * 6))
    shared, private, fixed, anonymous, noreserve = 0x01, 0x02, 0x10, 0x20, 0x4000
    for flags in (shared | anonymous, shared | anonymous | fixed | noreserve, HIGH | shared | anonymous):
        assert its.call("mmap", 0, 4096, 3, flags, -1, 0) == "EPERM"
        assert plain.call("mmap", 0, 4096, 3, flags, -1, 0) == "allowed"
    for flags in (private | anonymous, private, shared, private | anonymous | fixed | noreserve, 0x20022, 0x100022):
        assert its.call("mmap", 0, 4096, 3, flags, -1, 0) == "allowed"
    for advice in range(-1, 120):
        assert its.call("madvise", 4096, 4096, advice) == ("EPERM" if advice == 21 else "allowed")
