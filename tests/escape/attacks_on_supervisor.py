"""Attacks on the box's first process, as tables of attempts. ``SUPERVISOR`` is whom they name; see ``attacker.py``."""

from __future__ import annotations

SETUP = r"""
T = SUPERVISOR
HIGH = 1 << 32  # the kernel takes a pid as an int and never sees this bit; a filter that compares 64 bits does

def siginfo(sig):
    # si_code SI_QUEUE (-1): what an unprivileged sender may claim
    return ctypes.create_string_buffer(struct.pack("iiiiii", sig, 0, -1, 0, os.getpid(), os.getuid()), 128)

def pidfd_signal(sig):
    fd = os.open("/proc/%d" % T, os.O_RDONLY | os.O_DIRECTORY)
    return call("pidfd_send_signal", fd, sig, None, 0)

def owned_by(owner, request):
    # A pipe that tells its owner by signal when it can be read: the kernel sends it, in the name of who set the owner.
    read_end, write_end = os.pipe()
    if request == "F_SETOWN_EX":
        fcntl.fcntl(read_end, 15, struct.pack("ii", 1, owner))
    elif request == "F_SETOWN":
        fcntl.fcntl(read_end, fcntl.F_SETOWN, owner)
    else:
        read_end, write_end = (s.detach() for s in socket.socketpair())
        fcntl.ioctl(read_end, {"FIOSETOWN": 0x8901, "SIOCSPGRP": 0x8902}[request], struct.pack("i", owner))
    for sig in (signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM, signal.SIGHUP, signal.SIGUSR1, 0):
        fcntl.fcntl(read_end, 10, sig)
        fcntl.fcntl(read_end, fcntl.F_SETFL, fcntl.fcntl(read_end, fcntl.F_GETFL) | os.O_ASYNC)
        os.write(write_end, b"x")
        time.sleep(0.01)
        os.read(read_end, 1)
    # Setting an owner is no gain: whether a signal came is told by how the run ends.

def attr_of_sched(policy):
    return ctypes.create_string_buffer(struct.pack("IIQiIQQQ", 48, policy, 0, 19, 0, 0, 0, 0), 48)

def limit(soft, hard):
    return ctypes.create_string_buffer(struct.pack("QQ", soft, hard), 16)

def iovec(data):
    buffer = ctypes.create_string_buffer(data, len(data))
    return ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(buffer), len(data)), 16)

def with_child(act):
    child = sleeper()
    try:
        return act(child)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""

SIGNALS = {
    "kill": "call('kill', T, 15)",
    "kill, high bits": "call('kill', T | HIGH, 15)",
    "kill, realtime": "call('kill', T, 40)",
    "kill SIGHUP": "call('kill', T, 1)",
    "kill SIGCHLD": "call('kill', T, 17)",
    "kill SIGALRM": "call('kill', T, 14)",
    "tkill": "call('tkill', T, 15)",
    "tkill, high bits": "call('tkill', T | HIGH, 15)",
    "tgkill": "call('tgkill', T, T, 15)",
    "tgkill, high bits": "call('tgkill', T | HIGH, T | HIGH, 15)",
    "rt_sigqueueinfo": "call('rt_sigqueueinfo', T, 15, siginfo(15))",
    "rt_sigqueueinfo, high bits": "call('rt_sigqueueinfo', T | HIGH, 15, siginfo(15))",
    "rt_tgsigqueueinfo": "call('rt_tgsigqueueinfo', T, T, 15, siginfo(15))",
    "pidfd_open": "call('pidfd_open', T, 0)",
    "pidfd_open, high bits": "call('pidfd_open', T | HIGH, 0)",
    "pidfd_open and pidfd_send_signal": "call('pidfd_send_signal', call('pidfd_open', T, 0), 15, None, 0)",
    "pidfd_send_signal by a folder of /proc": "pidfd_signal(15)",
}
"""Guard: the filter's rules for calls that name the supervisor, and its uid or Landlock's signal scope."""

OWNERS = {
    "F_SETOWN": "owned_by(T, 'F_SETOWN')",
    "F_SETOWN_EX": "owned_by(T, 'F_SETOWN_EX')",
    "FIOSETOWN": "owned_by(T, 'FIOSETOWN')",
    "SIOCSPGRP": "owned_by(T, 'SIOCSPGRP')",
}
"""Guard: the filter on fcntl and ioctl, Landlock's signal scope, and that the supervisor heeds no signal from inside."""

BARRAGE = {
    # Only in a box: on the bare host these would be the end of the session.
    "kill -1": "call('kill', -1, 9)",
    "kill -1 in 32 bits": "call('kill', 0xffffffff, 9)",
    "kill -1 with other high bits": "call('kill', 0x1ffffffff, 9)",
    "rt_sigqueueinfo -1": "call('rt_sigqueueinfo', -1, 9, siginfo(9))",
    "kill SIGKILL": "call('kill', T, 9)",
    "kill SIGSTOP": "call('kill', T, 19)",
    "tkill SIGKILL": "call('tkill', T, 9)",
    "tgkill SIGSTOP": "call('tgkill', T, T, 19)",
    "pidfd_send_signal SIGKILL": "pidfd_signal(9)",
    "setpriority of the user": "call('setpriority', 2, os.getuid(), 19)",
    "setpriority of my user": "call('setpriority', 2, 0, 19)",
    "ioprio_set of the user": "call('ioprio_set', 3, os.getuid(), 3 << 13)",
}
"""Guard: the filter refuses to signal everything at once, and to name a user."""

RESOURCES = {
    "prlimit64 cpu": "call('prlimit64', T, 0, limit(1, 1), None)",
    "prlimit64 cpu, high bits": "call('prlimit64', T | HIGH, 0, limit(1, 1), None)",
    "prlimit64 nofile": "call('prlimit64', T, 7, limit(4, 4), None)",
    "prlimit64 fsize": "call('prlimit64', T, 1, limit(0, 0), None)",
    "prlimit64 address space": "call('prlimit64', T, 9, limit(4096, 4096), None)",
    "prlimit64 reading": "call('prlimit64', T, 7, None, limit(0, 0))",
    "sched_setaffinity": "call('sched_setaffinity', T, 8, ctypes.create_string_buffer(b'\\1' + bytes(7), 8))",
    "sched_setaffinity, high bits": "call('sched_setaffinity', T | HIGH, 8, ctypes.create_string_buffer(b'\\1', 8))",
    "sched_setscheduler": "call('sched_setscheduler', T, 5, struct.pack('i', 0))",
    "sched_setparam": "call('sched_setparam', T, struct.pack('i', 0))",
    "sched_setattr": "call('sched_setattr', T, attr_of_sched(5), 0)",
    "setpriority": "call('setpriority', 0, T, 19)",
    "setpriority, high bits": "call('setpriority', HIGH, T | HIGH, 19)",
    "ioprio_set": "call('ioprio_set', 1, T, 3 << 13)",
    "ioprio_set, high bits": "call('ioprio_set', 1 | HIGH, T | HIGH, 3 << 13)",
    "oom_score_adj": "openable('/proc/%d/oom_score_adj' % T)",
    "timerslack": "os.write(os.open('/proc/%d/timerslack_ns' % T, os.O_WRONLY), b'50000')",
    "coredump_filter": "openable('/proc/%d/coredump_filter' % T)",
    "clear_refs": "openable('/proc/%d/clear_refs' % T)",
    "comm": "openable('/proc/%d/comm' % T)",
}
"""Guard: the filter's rules for prlimit64, sched_set*, setpriority and ioprio_set; not dumpable for /proc."""

MEMORY = {
    "ptrace attach": "call('ptrace', 16, T, 0, 0)",
    "ptrace seize": "call('ptrace', 0x4206, T, 0, 0)",
    "ptrace of a child": "with_child(lambda child: call('ptrace', 0x4206, child, 0, 0))",
    "ptrace traceme": "call('ptrace', 0, 0, 0, 0)",
    "process_vm_readv": "call('process_vm_readv', T, iovec(b'x'), 1, iovec(b'x'), 1, 0)",
    "process_vm_writev": "call('process_vm_writev', T, iovec(b'x'), 1, iovec(b'x'), 1, 0)",
    "process_vm_readv of a child": (
        "with_child(lambda child: call('process_vm_readv', child, iovec(b'x'), 1, iovec(b'x'), 1, 0))"
    ),
    "pidfd_getfd": "call('pidfd_getfd', call('pidfd_open', T, 0), 1, 0)",
    "pidfd_getfd of a child": "with_child(lambda child: call('pidfd_getfd', call('pidfd_open', child, 0), 1, 0))",
    "migrate_pages": "call('migrate_pages', T, 8, b'\\1' + bytes(7), b'\\1' + bytes(7))",
    "move_pages": "call('move_pages', T, 0, None, None, None, 0)",
    "kcmp": "call('kcmp', T, os.getpid(), 1, 0, 0)",
    "get_robust_list": "call('get_robust_list', T, bytes(8), bytes(8))",
    "mem": "openable('/proc/%d/mem' % T, os.O_RDWR)",
    "mem of its thread": "openable('/proc/%d/task/%d/mem' % (T, T), os.O_RDWR)",
    "environ": "read('/proc/%d/environ' % T)",
    "maps": "read('/proc/%d/maps' % T)",
    "smaps": "read('/proc/%d/smaps' % T)",
    "auxv": "read('/proc/%d/auxv' % T)",
    "pagemap": "read('/proc/%d/pagemap' % T)",
    "syscall": "read('/proc/%d/syscall' % T)",
    "stack": "read('/proc/%d/stack' % T)",
    "io": "read('/proc/%d/io' % T)",
    "folder of its fds": "os.listdir('/proc/%d/fd' % T)",
    "its stdout": "openable('/proc/%d/fd/1' % T)",
    "its stderr": "openable('/proc/%d/fd/2' % T)",
    "its stdin": "openable('/proc/%d/fd/0' % T, os.O_RDONLY)",
    "fds of its thread": "os.listdir('/proc/%d/task/%d/fd' % (T, T))",
    "fdinfo": "os.listdir('/proc/%d/fdinfo' % T)",
    "map_files": "os.listdir('/proc/%d/map_files' % T)",
    "root": "os.listdir('/proc/%d/root' % T)",
    "root by link": "os.readlink('/proc/%d/root' % T)",
    "file by its root": "read('/proc/%d/root/etc/hostname' % T)",
    "cwd": "os.listdir('/proc/%d/cwd' % T)",
    "exe": "openable('/proc/%d/exe' % T, os.O_RDONLY)",
    "mount namespace": "openable('/proc/%d/ns/mnt' % T, os.O_RDONLY)",
    "user namespace": "os.readlink('/proc/%d/ns/user' % T)",
}
"""Guard: the supervisor is not dumpable, and the filter refuses ptrace, process_vm_* and pidfd_getfd outright."""

SHOWN_BY_GVISOR = ("get_robust_list", "fdinfo", "mount namespace", "user namespace")
"""What gVisor tells everybody of any process: numbers and names, with which the filter lets nothing be done."""

FORGERY = r"""
frames = [
    b"@c 0 hello 1 1 0\n", b"@c 1 start\n", b"@c 2 o 0 Zm9yZ2Vk\n", b"@c 3 end exit 77 none 1 1 1 0 0 0 0 0 0 0\n",
    b"@c 7 end signal 9 memory 1 1 1 1 0 0 0 0 0 0\n", b"\n@c 9 fail engine-lost Zm9yZ2Vk\n", b"@c 4 file 1 0 Zm9yZ2Vk\n",
    b"@c 18446744073709551615 end exit 0 none 0 0 0 0 0 0 0 0 0 0\n", b"@c " + b"9" * 9000 + b"\n", b"\0\r\n@c 2 end\n",
]
frames += [b"@c %d end exit 77 none 1 1 1 0 0 0 0 0 0 0\n" % i for i in range(40)]

def everywhere_at_once():
    for frame in frames:
        for fd in (1, 2):
            os.write(fd, frame)
        for fd in range(3, 1024):
            quietly(os.write, fd, frame)
        for path in ["/proc/1/fd/%d" % i for i in range(12)] + ["/dev/console", "/dev/tty", "/dev/pts/0", "/dev/kmsg"]:
            fd = quietly(os.open, path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            if fd is not None:
                quietly(os.write, fd, frame)
                os.close(fd)
        for path in ("/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"):
            with open(path, "wb", buffering=0) as again:
                again.write(frame)
"""
