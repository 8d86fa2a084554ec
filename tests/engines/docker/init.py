"""The first process of an engine's namespaces: prepares them, says "ready", and holds them until it is killed.

It runs as a program of its own, from ``namespaces``. With the argument ``owned`` it ends with its standard input, which
is to say with whoever holds the other end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

SYSTEM = ("fs/cgroup", "fs/bpf", "kernel/security", "kernel/debug", "kernel/tracing")
"""Mounts below /sys that an engine may ask for."""


def prepare(*, network: bool) -> None:
    """Folders that engines write to whatever they are told, so that nothing of it is seen outside, and the network."""
    for path in ("/run", "/var/run", "/opt"):
        if os.path.isdir(path) and not os.path.islink(path):
            _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", path)
    for path in ("/etc", "/var/lib", "/var/cache", "/var/log"):
        upper, work = (f"/run/layers{path}/{name}" for name in ("upper", "work"))
        os.makedirs(upper)
        os.makedirs(work)
        _mount("-t", "overlay", "-o", f"lowerdir={path},upperdir={upper},workdir={work}", "overlay", path)
    if network:
        _own_sys()
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def _own_sys() -> None:
    """A /sys that shows this network's devices, with the cgroups of the old one."""
    os.mkdir("/run/sys")
    _mount("--rbind", "/sys", "/run/sys")
    _mount("-t", "sysfs", "sysfs", "/sys")
    for name in SYSTEM:
        if os.path.ismount(f"/run/sys/{name}"):
            _mount("--rbind", f"/run/sys/{name}", f"/sys/{name}")
    subprocess.run(["umount", "--lazy", "/run/sys"], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def main() -> None:
    """Prepare, then wait."""
    prepare(network="network" in sys.argv)
    # Orphans become this process's children; so the kernel reaps them at once.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"ready\n")
    os.close(1)
    if "owned" in sys.argv:
        while os.read(0, 1):
            pass
    else:
        while True:
            signal.pause()


if __name__ == "__main__":
    main()
