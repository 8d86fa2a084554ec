"""Becoming somebody else: setuid programs, capabilities, other uids, other groups."""

from __future__ import annotations

from tests.escape.attack import attack

import cloche

SETUP = r"""
def status(pid="self"):
    with open("/proc/%s/status" % pid) as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)

def setuid_programs():
    for folder, _, files in everywhere(("/proc", "/sys", "/dev", "/tmp")):
        for name in files:
            found = quietly(os.lstat, os.path.join(folder, name))
            if found is not None and stat.S_ISREG(found.st_mode) and found.st_mode & (stat.S_ISUID | stat.S_ISGID):
                yield os.path.join(folder, name)

def identity(pid):
    found = status(pid)
    return found["Uid"], found["Gid"], found["CapPrm"], found["CapEff"], found["CapBnd"]

def changed_by(path, *args):
    # The program waits for its stdin, which stays open, so that its identity can be looked at.
    read_end, write_end = os.pipe()
    before = identity(os.getpid())
    pid = os.fork()
    if pid == 0:
        os.dup2(read_end, 0)
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            os.execv(path, [path, *args])
        finally:
            os._exit(127)
    seen = set()
    end = time.monotonic() + 0.15
    while time.monotonic() < end:
        try:
            seen.add(identity(pid))
        except (OSError, KeyError):
            break
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert seen, "never looked at"
    return seen - {before}

def make_setuid():
    path = "/tmp/setuid"
    with open(path, "wb") as file, open("/bin/sh", "rb") as source:
        file.write(source.read())
    os.chmod(path, 0o6755)
    return path

def other_uid():
    uid = os.stat("/proc/1").st_uid
    return None if uid == os.getuid() else uid

PROGRAMS = list(setuid_programs())
"""

ATTEMPTS = {
    "uid 0": "os.setuid(0)",
    "gid 0": "os.setgid(0)",
    "groups": "os.setgroups([0])",
    "all uids": "os.setresuid(0, 0, 0)",
    "all gids": "os.setresgid(0, 0, 0)",
    "another uid": "os.setuid(1)",
    "the supervisor's uid, if it has one of its own": "other_uid() is not None and os.setuid(other_uid())",
    "root's numbers": "0 in os.getresuid() or 0 in os.getresgid() or 0 in os.getgroups()",
    "capabilities": "[v for n, v in status().items() if n.startswith('Cap') and int(v, 16)]",
    "new privileges": "status()['NoNewPrivs'] != '1'",
    "no filter": "status()['Seccomp'] != '2'",
    "ambient capability": "LIBC.prctl(47, 2, 0, 0, 0) == 0 and int(status()['CapAmb'], 16)",
    "owner of a file": "(open('/tmp/f', 'w').close(), os.chown('/tmp/f', 0, 0))",
    "setuid shell of my own": "changed_by(make_setuid(), '-c', 'read x')",
    "setuid programs": "{p: found for p in PROGRAMS for found in [changed_by(p)] if found}",
    "su": "os.path.exists('/usr/bin/su') and changed_by('/usr/bin/su', '-c', 'id')",
    "passwd": "os.path.exists('/usr/bin/passwd') and changed_by('/usr/bin/passwd')",
    "mount": "os.path.exists('/usr/bin/mount') and changed_by('/usr/bin/mount', '-t', 'tmpfs', 'x', '/tmp')",
    "a personality": "LIBC.personality(0x0400000) == 0 and LIBC.personality(0xffffffff) & 0x0400000 and False",
}


async def test_nobody_else(sandbox: cloche.Sandbox) -> None:
    """The script keeps its identity and gains no right, by calls or by setuid programs, those of the host or its own.

    Guards: no_new_privs, no capabilities (bounding set too), nosuid mounts, ids that are mapped to no other.
    """
    # EINVAL: an id that the box does not even have.
    await attack(sandbox, ATTEMPTS, setup=SETUP, also_refused=("EINVAL",), timeout=40)
