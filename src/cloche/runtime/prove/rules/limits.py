"""Bounds, proved by reaching them; and what is left when a box is gone. Pure."""

from __future__ import annotations

from errno import EAGAIN, ENOMEM

from cloche.events import Outcome
from cloche.isolation import Guarantee
from cloche.runtime.prove.case import Case, broken, error_name, held, listed, unclear

MIB = 2**20
SLACK_PROCESSES = 4
"""Engines count one or the other process more or less."""
CPU_SLACK, CPU_SLACK_MS = 1.6, 60
"""A quota is kept over some periods of 100 ms, not at each moment."""
UNLIMITED = frozenset({"max", "-1"})
"""In cpu.max of a cgroup of version 2, in cpu.cfs_quota_us of version 1."""
FEWEST_STALLS = 2
"""Pauses of 50 ms and more, by which a quota is told from a machine that is merely busy."""


def memory_limit(case: Case) -> Guarantee:
    """A script that takes more than it may have is ended, and others do not notice."""
    name, run = "memory-limit", case.memory
    if run is None:
        return unclear(name, "no box told how a script ends that takes too much memory")
    reach = run.seen.reached.get("memory")
    asked, limit = run.asked_bytes // MIB, run.limit_bytes // MIB
    got = (run.seen.touched_bytes or 0) // MIB
    if reach is not None and reach.got >= reach.asked:
        return broken(
            name,
            f"with a limit of {limit} MiB a script had {got} MiB, all that it asked for",
            "Give the engine the memory controller of its cgroups.",
        )
    if run.outcome is Outcome.OUT_OF_MEMORY:
        return held(
            name, f"with a limit of {limit} MiB, a script that wanted {asked} MiB was ended at {got} MiB: out of memory"
        )
    if reach is not None and reach.errno == ENOMEM:
        return held(name, f"with a limit of {limit} MiB, a script was refused more than {got} MiB")
    if run.outcome is Outcome.SIGNALED and run.signal == "SIGKILL":
        return held(name, f"with a limit of {limit} MiB, a script that wanted {asked} MiB was killed at {got} MiB")
    return unclear(name, f"a script that wanted {asked} MiB with a limit of {limit} MiB ended otherwise: {run.outcome}")


def process_limit(case: Case) -> Guarantee:
    """As many as the limit says, and then no more."""
    name, reach = "process-limit", case.look.reached.get("processes")
    if reach is None:
        return unclear(name, "the prober did not come to it")
    limit = case.limits.pids
    if reach.got >= reach.asked or reach.got > limit + SLACK_PROCESSES:
        return broken(
            name,
            f"with a limit of {limit} processes a script had {reach.got} of {reach.asked}",
            "Give the engine the pids controller of its cgroups.",
        )
    if reach.errno != EAGAIN:
        return unclear(name, f"a script had {reach.got} processes, and then another error: {error_name(reach.errno)}")
    return held(
        name, f"with a limit of {limit}, a script could start {reach.got} more and was refused the next (EAGAIN)"
    )


def cpu_limit(case: Case) -> Guarantee:
    """Processes that want all of it get no more than their share."""
    name, cpu = "cpu-limit", case.look.cpu
    if cpu is None or cpu.processes == 0:
        return unclear(name, "the prober did not come to it")
    limit = case.limits.cpus
    allowed = limit * cpu.ms
    # A guest's kernel takes time in which it did not run itself for CPU time.
    had = min(cpu.cpu_ms, cpu.ran_ms)
    shown = f"with a limit of {limit:g} CPUs, {cpu.processes} processes had {had} ms of CPU time in {cpu.ms} ms"
    if had > allowed * CPU_SLACK + CPU_SLACK_MS:
        return broken(name, shown, "Give the engine the cpu controller of its cgroups.")
    if (cpu.throttled or 0) > 0 or cpu.stalls >= FEWEST_STALLS:
        return held(name, f"{shown}, and were made to wait")
    quota = case.look.cgroup.get("cpu", "").split()
    if quota and quota[0] in UNLIMITED:
        return broken(
            name,
            f"the box's own cgroup has no quota ({quota[0]})",
            "Give the engine the cpu controller of its cgroups.",
        )
    return unclear(name, f"{shown}, but the machine may only have been busy", "Look again when it has less to do.")


def no_leftovers(case: Case) -> Guarantee:
    """What was made for a run is gone with it."""
    name = "no-leftovers"
    if case.remains is None:
        return unclear(name, "the engine does not tell what is left of a box", needed=False)
    if case.remains:
        return broken(name, f"of the probes' boxes there is still {listed(list(case.remains))}", "Run cloche sweep.")
    return held(name, "after the probes nothing that bears their names is left on the engine")
