"""Interfaces of the kernel that a script has no use for: each must be refused before its arguments are looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.escape.attack import attack, script, verdicts

import cloche

SETUP = r"""
CLONE = {"user": 0x10000000, "mnt": 0x20000, "net": 0x40000000, "pid": 0x20000000, "ipc": 0x8000000, "uts": 0x4000000,
         "cgroup": 0x2000000, "time": 0x80}
HIGH = 1 << 32

def cloned(flags):
    pid = call("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid

def cloned3(flags):
    args = struct.pack("QQQQQQQQ", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    pid = call("clone3", ctypes.create_string_buffer(args, 64), 64)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid

def perf(kind):
    # perf_event_attr: type software, size, config cpu-clock, exclude_kernel and exclude_hv: what anybody may have
    attr = struct.pack("IIQQQQQ", kind, 112, 0, 0, 0, 0, 1 | 1 << 5 | 1 << 6)
    return call("perf_event_open", ctypes.create_string_buffer(attr, 112), 0, -1, -1, 0)

def bpf_map():
    attr = struct.pack("IIII", 2, 4, 8, 1)
    return call("bpf", 0, ctypes.create_string_buffer(attr, 128), 128)

def handle_of():
    # a file handle of type FILEID_INO32_GEN for inode 2, the root of many file systems
    handle = struct.pack("IiII", 8, 1, 2, 0)
    fd = os.open("/workspace", os.O_RDONLY)
    return call("open_by_handle_at", fd, ctypes.create_string_buffer(handle, 64), os.O_RDONLY)

def node(kind, device):
    path = "/tmp/node-%d" % time.monotonic_ns()
    os.mknod(path, kind | 0o666, device)
    return path
"""

NAMESPACES = {
    **{
        f"unshare {name}": f"call('unshare', CLONE['{name}'])"
        for name in "user mnt net pid ipc uts cgroup time".split()
    },
    "unshare user and mnt": "call('unshare', CLONE['user'] | CLONE['mnt'])",
    "unshare user, high bits": "call('unshare', CLONE['user'] | HIGH)",
    **{f"clone {name}": f"cloned(CLONE['{name}'])" for name in "user mnt net pid ipc uts cgroup".split()},
    "clone user and net": "cloned(CLONE['user'] | CLONE['net'])",
    "clone3": "cloned3(0)",
    "clone3 user": "cloned3(CLONE['user'])",
    "clone3 time": "cloned3(CLONE['time'] | CLONE['user'])",
    **{
        f"setns {name}": f"call('setns', os.open('/proc/self/ns/{name}', os.O_RDONLY), 0)"
        for name in "user mnt net pid ipc uts cgroup".split()
    },
    "setns by pidfd": "call('setns', call('pidfd_open', os.getpid(), 0), CLONE['net'] | CLONE['uts'])",
}
"""Guard: the filter (clone3 answers ENOSYS); capabilities and bubblewrap's own measures stand behind it."""

MOUNTS = {
    "mount tmpfs": "call('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
    "mount proc": "call('mount', b'none', b'/tmp', b'proc', 0, None)",
    "remount writable": "call('mount', None, b'/workspace', None, 32 | 4096, None)",
    "bind": "call('mount', b'/usr', b'/tmp', None, 4096, None)",
    "make shared": "call('mount', None, b'/', None, 1 << 20, None)",
    "fsopen": "call('fsopen', b'tmpfs', 0)",
    "fspick": "call('fspick', -100, b'/tmp', 0)",
    "fsconfig": "call('fsconfig', -1, 0, None, None, 0)",
    "fsmount": "call('fsmount', -1, 0, 0)",
    "open_tree": "call('open_tree', -100, b'/tmp', 1)",
    "move_mount": "call('move_mount', -100, b'/tmp', -100, b'/output', 0)",
    "mount_setattr": "call('mount_setattr', -100, b'/workspace', 0, struct.pack('QQQQ', 0, 1, 0, 0), 32)",
    "umount2": "call('umount2', b'/workspace', 2)",
    "umount2 of /proc": "call('umount2', b'/proc', 2)",
    "pivot_root": "call('pivot_root', b'/tmp', b'/tmp')",
    "chroot": "call('chroot', b'/tmp')",
    "block device": "node(stat.S_IFBLK, os.makedev(8, 0))",
    "memory device": "node(stat.S_IFCHR, os.makedev(1, 1))",
    "kmsg device": "node(stat.S_IFCHR, os.makedev(1, 11))",
    "disk of this kind": "node(stat.S_IFBLK, os.makedev(254, 0))",
    "open_by_handle_at": "handle_of()",
    "swapon": "call('swapon', b'/tmp/none', 0)",
    "swapoff": "call('swapoff', b'/tmp/none')",
}
"""Guard: the filter's mount family; no capabilities; nodev on every writable mount."""

INTERFACES = {
    "bpf": "bpf_map()",
    "perf_event_open": "perf(1)",
    "io_uring_setup": "call('io_uring_setup', 4, ctypes.create_string_buffer(120))",
    "userfaultfd": "call('userfaultfd', 0)",
    "userfaultfd for user mode": "call('userfaultfd', 1)",
    "keyctl": "call('keyctl', 0, -3, 1)",
    "keyctl join": "call('keyctl', 1, b'stolen')",
    "add_key": "call('add_key', b'user', b'left', b'x', 1, -2)",
    "request_key": "call('request_key', b'user', b'left', None, -2)",
    "init_module": "call('init_module', b'', 0, b'')",
    "finit_module": "call('finit_module', 0, b'', 0)",
    "delete_module": "call('delete_module', b'no_such_module', 0)",
    "kexec_load": "call('kexec_load', 0, 0, None, 0)",
    # The right magic numbers, but no such command.
    "reboot": "call('reboot', 0xfee1dead, 672274793, 0x12345678, None)",
    "acct": "call('acct', b'/tmp/acct')",
    "settimeofday": "call('settimeofday', None, struct.pack('ii', 0, 0))",
    "sethostname": "call('sethostname', b'x', 1)",
    "setdomainname": "call('setdomainname', b'x', 1)",
    "syslog": "call('syslog', 3, ctypes.create_string_buffer(64), 64)",
    "syslog clear": "call('syslog', 5, None, 0)",
    "ioperm": "call('ioperm', 0x80, 1, 1)",
    "iopl": "call('iopl', 3)",
    "fanotify_init": "call('fanotify_init', 4, 0)",
    "vhangup": "call('vhangup')",
}
"""Guard: the filter; for some, no capabilities as well."""

TABLES = {"namespaces": NAMESPACES, "mounts": MOUNTS, "interfaces": INTERFACES}


@pytest.mark.parametrize("table", TABLES)
async def test_refused(sandbox: cloche.Sandbox, table: str) -> None:
    """No namespace, no mount, no interface to the kernel's insides can be had. Guards: see each table."""
    await attack(sandbox, TABLES[table], setup=SETUP)


HARMLESS = (
    "unshare",
    "clone",
    "setns",
    "perf_event_open",
    "io_uring",
    "userfaultfd",
    "keyctl",
    "add_key",
    "open_tree",
    "fsopen",
)
# ENOSYS, EINVAL: this kernel has no such thing. EPERM, EACCES: this host refuses it to everybody.
HOSTS_OWN_ANSWER = {"EPERM", "EACCES", "ENOSYS"}


def test_the_attacks_are_real() -> None:
    """On the bare host the harmless ones of these attempts are well-formed: they succeed, or the host's own rules refuse them.

    Some must succeed, or this says nothing.
    """
    attempts = {name: code for table in TABLES.values() for name, code in table.items() if name.startswith(HARMLESS)}
    attempts = {
        name: code for name, code in attempts.items() if "setns" not in name or name in ("setns net", "setns uts")
    }
    # The high bits are cut off by the kernel only where its call takes an int; unshare does not.
    done = subprocess.run(
        [sys.executable, "-c", script(attempts, SETUP)],
        env={**os.environ, "ATTACKED_PID": "-1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = verdicts(done.stdout)
    malformed = {
        name: how for name, how in said.items() if "gained" not in how and how.get("refused") not in HOSTS_OWN_ANSWER
    }
    malformed.pop("unshare user, high bits", None)
    assert not malformed, malformed
    gained = [name for name, how in said.items() if "gained" in how]
    assert "clone3" in gained
    if os.geteuid() == 0 and not Path("/.dockerenv").exists():
        assert len(gained) >= len(attempts) // 2, said


FOREIGN = r"""
def int80(number, *args):
    # push rbx; mov eax, edi; mov ebx, esi; mov ecx, edx; int 0x80; movsxd rax, eax; pop rbx; ret
    code = bytes.fromhex("53 89f8 89f3 89d1 cd80 4863c0 5b c3".replace(" ", ""))
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int)(
        ctypes.addressof(ctypes.c_char.from_buffer(page)))
    result = function(number, *args)
    if -4096 < result < 0:
        raise OSError(-result, os.strerror(-result))
    return result

X32 = 0x40000000
"""
FOREIGN_CALLS = {
    # getpid is harmless and always there: only a filter, or a kernel without the other interface, refuses it.
    "getpid of i386": "int80(20, 0, 0)",
    "kill of i386": "int80(37, SUPERVISOR, 15)",
    "unshare of i386": "int80(310, 0x10000000, 0)",
    "getpid of x32": "numbered(X32 | 39)",
    "kill of x32": "numbered(X32 | 62, SUPERVISOR, 15)",
    "ptrace of x32": "numbered(X32 | 521, 16, SUPERVISOR, 0, 0)",
    "getpid of x32, high bits": "numbered(1 << 32 | X32 | 39)",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86_64 has other system call interfaces")
async def test_other_interfaces(sandbox: cloche.Sandbox) -> None:
    """The 32-bit and x32 system call interfaces are closed. Guard: the filter checks the architecture and bit 30."""
    await attack(sandbox, FOREIGN_CALLS, setup=FOREIGN)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86_64 has other system call interfaces")
def test_the_other_interface_is_real() -> None:
    """On the bare host the attacker's int 0x80 reaches the kernel, where the kernel has that interface at all."""
    done = subprocess.run(
        [sys.executable, "-c", script({"getpid of i386": FOREIGN_CALLS["getpid of i386"]}, FOREIGN)],
        env={**os.environ, "ATTACKED_PID": "-1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    how = verdicts(done.stdout)["getpid of i386"]
    if how == {"broken": "killed by signal 11"}:
        pytest.skip("this kernel was built without the 32-bit interface")
    assert "gained" in how, how
