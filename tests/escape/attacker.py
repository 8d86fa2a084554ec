"""What every attack has at hand. This text is delivered into the box in front of the attack; it runs there, not here.

An attempt is an expression. It has failed, as it should, when it raises OSError; any value that is not None, False or
empty is what the attacker gained. Each attempt runs in a child of its own, so that one that kills its process is seen.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import signal
import socket
import stat
import struct
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
SUPERVISOR = int(os.environ.get("ATTACKED_PID", os.getppid()))
"""Whom to attack: who started the script, which is PID 1 on most engines. Where the attacks are tried out on the bare host, it is
a stand-in."""
BARE = "ATTACKED_PID" in os.environ
MIB = 2**20

# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h, Linux 6.12. None: not there.
SYSCALLS = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clone": (56, 220),
    "clone3": (435, 435),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "get_robust_list": (274, 100),
    "getpid": (39, 172),
    "init_module": (175, 105),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "memfd_create": (319, 279),
    "migrate_pages": (256, 238),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "settimeofday": (164, 170),
    "setxattrat": (463, 463),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
MACHINE = platform.machine()


def call(name, *args):
    """A system call by its name, past the C library's own checks. Raises OSError."""
    number = SYSCALLS[name][{"x86_64": 0, "aarch64": 1}[MACHINE]]
    if number is None:
        raise OSError(errno.ENOSYS, "not on this architecture")
    return numbered(number, *args)


def numbered(number, *args):
    """A system call by its number. Integers go in with all their 64 bits."""

    def word(value):
        if value is None:
            return ctypes.c_void_p(None)
        if isinstance(value, int):
            return ctypes.c_ulong(value & (2**64 - 1))
        return ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.cast(value, ctypes.c_void_p)

    ctypes.set_errno(0)
    result = LIBC.syscall(ctypes.c_ulong(number), *[word(a) for a in args], *[ctypes.c_ulong(0)] * (6 - len(args)))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def attempt(name, act, alone=True):
    """Try, and print in one line how it went. ``alone`` gives the attempt a process of its own."""
    if not alone:
        return _try(name, act)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            _try(name, act)
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        verdict(name, broken="killed by signal %d" % os.WTERMSIG(status))


def _try(name, act):
    try:
        gained = act()
    except OSError as exc:
        verdict(name, refused=errno.errorcode.get(exc.errno, type(exc).__name__))
    except BaseException as exc:
        verdict(name, broken=repr(exc))
    else:
        nothing = gained is None or gained is False or (not isinstance(gained, int) and not gained)
        verdict(name, **({"refused": "nothing gained"} if nothing else {"gained": repr(gained)[:500]}))


def verdict(name, **how):
    data = ("VERDICT %s\n" % json.dumps({"attempt": name, **how})).encode()
    assert os.write(1, data) == len(data)


def read(path, size=64):
    """The beginning of a file, or a remark that it is empty: being allowed to open it is a gain."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, size) or b"(empty)"
    finally:
        os.close(fd)


def openable(path, flags=os.O_WRONLY):
    """Whether a file can be opened; nothing is written."""
    os.close(os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY))
    return path


def quietly(act, *args):
    """What an act gives, None when it is refused."""
    try:
        return act(*args)
    except OSError:
        return None


def forked(act):
    """Run in a child; gives its exit status, or minus its signal."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except OSError as exc:
            os._exit(exc.errno % 256)
        finally:
            os._exit(254)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sleeper():
    """A child that waits; the caller kills it."""
    pid = os.fork()
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    return pid


def everywhere(skip=("/proc", "/sys")):
    """Every file and folder that can be seen, as (path, folders, files), without what is virtual."""
    for folder, folders, files in os.walk("/"):
        folders[:] = [f for f in folders if os.path.join(folder, f) not in skip]
        yield folder, folders, files
