"""Whose kernel it is, and what of the host the box shares. Pure."""

from __future__ import annotations

from cloche.isolation import Guarantee, State
from cloche.runtime.prove.case import Case, broken, held, listed, unclear

INITIAL = {
    "time": 4026531834,
    "cgroup": 4026531835,
    "pid": 4026531836,
    "user": 4026531837,
    "uts": 4026531838,
    "ipc": 4026531839,
    "net": 4026531833,
    "mnt": 4026531832,
}
"""The numbers of a machine's first namespaces (Linux, include/uapi/linux/nsfs.h of 6.18; net and mnt have fixed ones only since
then, the others always had them)."""
WANTED = ("pid", "mnt", "net", "ipc", "uts")
GVISOR_VERSION = "#1 SMP Sun Jan 10 15:06:54 PST 2016"
"""What gVisor says of itself, of whatever day it is (gvisor.dev, pkg/sentry/syscalls/linux/linux64.go)."""
FEW_PROCESSES = 16
KERNEL_THREADS = ("kthreadd", "kworker/", "ksoftirqd/", "migration/", "rcu_")
"""Only a machine's first process namespace has them."""


def guest_kernel(case: Case) -> Guarantee:
    """Positive evidence of a kernel that is not the host's. Another version alone is evidence only where it is known which one
    the engine's own host has.
    """
    name, seen = "own-kernel", case.look.kernel
    if seen is None:
        return unclear(name, "the prober did not come to it", needed=False)
    host = case.host
    words = f"{seen.release} {seen.version} {seen.banner}"
    if "gvisor" in words.lower() or GVISOR_VERSION in words:
        return held(name, f"the kernel that the script sees is gVisor's ({seen.release})", needed=False)
    if any(mount.type == "virtiofs" or mount.source.startswith("kataShared") for mount in case.look.mounts):
        return held(
            name,
            f"the box is a virtual machine: its files come through virtiofs; its kernel is {seen.release}",
            needed=False,
        )
    if host.here and host.boot_id and seen.boot_id:
        if host.boot_id == seen.boot_id:
            return _shared(name, f"the box runs on the host's own kernel, {seen.release}: the boot id is the same")
        return held(name, f"the kernel {seen.release} has another boot id than this machine's", needed=False)
    if host.release and seen.release:
        if host.release == seen.release:
            return _shared(name, f"the box sees the kernel of the engine's host, {seen.release}")
        return held(
            name, f"the box sees the kernel {seen.release}, and the engine's host has {host.release}", needed=False
        )
    return unclear(
        name,
        f"the box sees the kernel {seen.release}, and it is not known which one the engine's host has",
        needed=False,
    )


def _shared(name: str, evidence: str) -> Guarantee:
    return broken(
        name,
        evidence,
        "For a kernel of its own: docker with CLOCHE_DOCKER_RUNTIME=runsc, kubernetes with CLOCHE_KUBE_RUNTIME_CLASS.",
        needed=False,
    )


def namespaces(case: Case) -> Guarantee:
    """Processes, mounts, network, IPC and host name are the box's own."""
    name, seen = "namespaces", case.look.namespaces
    if guest_kernel(case).state is State.IN_FORCE:
        return held(name, "a kernel of its own has namespaces of its own")
    shared = [kind for kind in WANTED if kind in seen and seen[kind] in {INITIAL[kind], case.host.namespaces.get(kind)}]
    if shared:
        return broken(name, f"the box shares the host's {listed([_WORDS[kind] for kind in shared])}")
    missing = [kind for kind in WANTED if kind not in seen]
    if missing:
        return unclear(name, f"the kernel does not say to which namespaces the script belongs ({listed(missing)})")
    also = [
        kind
        for kind in ("user", "cgroup")
        if kind in seen and seen[kind] not in {INITIAL[kind], case.host.namespaces.get(kind)}
    ]
    compared = "compared with this machine's" if case.host.here else "none is a machine's first one"
    return held(name, f"its own: {listed([_WORDS[kind] for kind in (*WANTED, *also)], 9)} ({compared})")


_WORDS = {
    "pid": "processes",
    "mnt": "mounts",
    "net": "network",
    "ipc": "IPC",
    "uts": "host name",
    "user": "users",
    "cgroup": "cgroups",
}


def process_visibility(case: Case) -> Guarantee:
    """The script sees its box's processes and no others."""
    name, seen = "process-visibility", case.look
    if seen.process_count is None:
        return unclear(name, "the prober did not come to it")
    names = [f"{process.name} ({process.pid})" for process in seen.processes]
    pid = seen.namespaces.get("pid")
    is_hosts = pid is not None and pid in {INITIAL["pid"], case.host.namespaces.get("pid")}
    if is_hosts or any(process.name.startswith(KERNEL_THREADS) for process in seen.processes):
        return broken(name, f"the script sees the host's processes, {seen.process_count} of them: {listed(names)}")
    if seen.process_count > FEW_PROCESSES:
        return unclear(name, f"the script sees {seen.process_count} processes: {listed(names)}")
    return held(name, f"the script sees itself and {listed(names) or 'nothing else'}")
