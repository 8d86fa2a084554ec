"""The way to a box on this machine, step by step, for those who want to know how it is."""

from __future__ import annotations

import platform

from cloche.backends.local import probe
from cloche.backends.local.cgroup import Flavour
from cloche.isolation import Check, Posture, Verdict

LIMITED = ("memory", "pids", "cpu")


def checks(posture: Posture, flavour: Flavour | None, uid: int) -> tuple[Check, ...]:
    """Platform, program, kernel, limits. ``flavour`` is None where no box could be made. Blocks for some milliseconds."""
    if (reason := probe.platform_reason()) is not None:
        return (Check("platform", Verdict.NOT_OK, reason, posture.hint),)
    found = list(probe.candidates())
    names = ", ".join(dict.fromkeys(bubblewrap.name for bubblewrap in found))
    return (
        Check("platform", Verdict.OK, f"Linux {platform.release()}, {platform.machine()}"),
        Check("bubblewrap", Verdict.OK, f"{posture.engine} of {names}" if posture.engine else names)
        if found
        else Check("bubblewrap", Verdict.NOT_OK, "there is none on this machine", "Install the bubblewrap package."),
        Check("user-namespaces", Verdict.OK, "a trial box was made")
        if posture.available
        else Check("user-namespaces", Verdict.NOT_OK, posture.reason, posture.hint),
        _limits(flavour),
        _user(uid),
    )


def _limits(flavour: Flavour | None) -> Check:
    if flavour is None:
        return Check("cgroup", Verdict.UNKNOWN, "no box could be made")
    missing = [controller for controller in LIMITED if controller not in flavour.controllers]
    if missing:
        return Check(
            "cgroup",
            Verdict.NOT_OK,
            f"a cgroup ({flavour.kind}) bounds no {', '.join(missing)}: rlimits and the supervisor's watch do what they can",
            "Delegate a cgroup, or run as root (docs/backends/local.md).",
            needed=False,
        )
    return Check("cgroup", Verdict.OK, f"a cgroup ({flavour.kind}) bounds memory, processes and CPU time")


def _user(uid: int) -> Check:
    if uid == 0:
        return Check("user", Verdict.OK, "cloche is root, and gives each run a uid of the host's that nobody else has")
    return Check(
        "user",
        Verdict.OK,
        f"cloche is uid {uid}, and so are its boxes on the host: scripts read of /usr and the interpreter's folder what it may",
    )
