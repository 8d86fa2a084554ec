"""A healthy box is found healthy; one that lacks something is found to lack exactly that, and gets the level that is left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.probes import (
    CLAIMS,
    HOST,
    MIB,
    Change,
    added,
    case,
    changed,
    declared,
    healthy,
    memory,
    printed,
    states,
    verdict,
)

from cloche.events import Outcome
from cloche.isolation import Guarantee, Isolation, State
from cloche.runtime.prove.case import Host
from cloche.runtime.prove.judge import RULES
from cloche.runtime.prove.observe import Seen, observe

NO_SOCKETS = changed("socket", {"errno": 0}, errno=1)
ETH0 = changed("interfaces", names=["lo", "eth0"])
GVISOR = changed("kernel", release="4.19.0-gvisor", boot_id="")


def test_healthy() -> None:
    """Everything that a run counts on is in force, and the level is the container's."""
    posture = verdict()
    assert posture.proved
    assert posture.missing == ()
    assert posture.isolation is Isolation.CONTAINER
    assert posture.reason == ""
    weak = {name for name, state in states(posture).items() if state is not State.IN_FORCE}
    assert weak == {"own-kernel"}
    assert all(guarantee.evidence for guarantee in posture.guarantees)


WEAKENED: list[tuple[str, Change, Isolation]] = [
    ("identity", changed("identity", Uid="0\t0\t0\t0"), Isolation.NONE),
    ("identity", changed("identity", Groups="0"), Isolation.NONE),
    ("identity", changed("call", {"name": "setuid-0"}, errno=0), Isolation.NONE),
    ("no-capabilities", changed("identity", CapBnd="00000000a80425fb"), Isolation.NONE),
    ("no-new-privileges", changed("identity", NoNewPrivs="0"), Isolation.NONE),
    ("system-call-filter", changed("identity", Seccomp="0"), Isolation.PROCESS),
    ("system-call-filter", changed("call", {"name": "unshare-user"}, errno=0), Isolation.PROCESS),
    ("system-call-filter", changed("call", {"name": "i386"}, errno=0), Isolation.PROCESS),
    ("system-call-filter", changed("call", {"name": "mount"}, errno=19), Isolation.PROCESS),
    ("engine-call-filter", changed("identity", Seccomp_filters="1"), Isolation.NAMESPACE),
    ("process-tree", changed("call", {"group": "guard", "name": "kill"}, errno=0), Isolation.PROCESS),
    ("network", changed("connect", {"name": "host-network"}, errno=0), Isolation.PROCESS),
    ("network", ETH0, Isolation.PROCESS),
    ("network", added(see="connect", name="resolver", to="10.0.0.2:53", by="udp", errno=0), Isolation.PROCESS),
    ("socket-families", changed("socket", {"kind": "packet"}, errno=0), Isolation.PROCESS),
    ("namespaces", changed("namespaces", ipc=14), Isolation.PROCESS),
    ("namespaces", changed("namespaces", net=4026531833), Isolation.PROCESS),
    ("process-visibility", added(see="process", pid=2, name="kthreadd", environ=13, memory=13), Isolation.PROCESS),
    ("no-credentials", added(see="credential", path="/t", kind="file", errno=0, size=9), Isolation.PROCESS),
    ("no-credentials", changed("environment", names=["PATH", "DB_PASSWORD"]), Isolation.PROCESS),
    ("no-credentials", changed("process", environ=0), Isolation.PROCESS),
    ("read-only-root", changed("create", {"path": "/etc"}, errno=0, bytes=1, files=1), Isolation.PROCESS),
    ("read-only-root", changed("mount", {"path": "/usr"}, options="rw"), Isolation.NAMESPACE),
    ("read-only-root", changed("mount", {"path": "/"}, options="rw"), Isolation.NAMESPACE),
    ("workspace-read-only", changed("create", {"path": "/workspace"}, errno=0, bytes=1, files=1), Isolation.CONTAINER),
    ("writable-places", added(see="create", path="/mnt/x", errno=0, bytes=1, files=1), Isolation.PROCESS),
    ("writable-places", changed("open", {"path": "/dev/termination-log"}, errno=0), Isolation.PROCESS),
    ("disk-limit", changed("create", {"path": "/tmp"}, bytes=900 * MIB), Isolation.CONTAINER),
    ("disk-limit", changed("reach-size", got=80 * MIB, errno=0), Isolation.CONTAINER),
    ("kernel-files", changed("open", {"path": "/proc/sysrq-trigger"}, errno=0), Isolation.NAMESPACE),
    ("kernel-files", added(see="mount", path="/sys", type="sysfs", source="sysfs", options="rw"), Isolation.NAMESPACE),
    (
        "devices",
        added(see="device", path="/dev/vda", kind="block", major=8, minor=0, read=13, write=13),
        Isolation.NAMESPACE,
    ),
    ("process-limit", changed("reach-processes", got=128, errno=0), Isolation.CONTAINER),
    ("cpu-limit", changed("reach-cpu", cpu_ms=900, ran_ms=900, stalls=0), Isolation.CONTAINER),
    (
        "cpu-limit",
        lambda rows: [*changed("reach-cpu", stalls=0)(rows), {"see": "cgroup", "cpu": "max 100000"}],
        Isolation.CONTAINER,
    ),
]


@pytest.mark.parametrize(("name", "change", "level"), WEAKENED)
def test_weakened(name: str, change: Change, level: Isolation) -> None:
    """One thing is not as it should be: that guarantee is broken, with what was seen; and the level is what is left."""
    posture = verdict(change)
    broken = {guarantee.name: guarantee for guarantee in posture.missing}
    assert name in broken
    assert broken[name].evidence
    # Who can write to /etc can write where nobody should, too.
    assert broken.keys() - ({"writable-places"} if name == "read-only-root" else set()) == {name}
    assert posture.isolation is level
    if level < Isolation.CONTAINER:
        assert name in posture.reason


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "memory-limit",
            {
                "memory": memory(
                    outcome=Outcome.EXITED, rows=[{"see": "reach-memory", "asked": 9, "got": 9, "errno": 0}]
                )
            },
        ),
        ("no-leftovers", {"remains": ["the container x"]}),
    ],
)
def test_weakened_beside_the_look(name: str, values: dict[str, Any]) -> None:
    """The same for what other boxes, or the engine, told."""
    posture = verdict(**values)
    assert [guarantee.name for guarantee in posture.missing] == [name]
    assert posture.isolation is Isolation.CONTAINER


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("network", lambda rows: [row for row in rows if row["see"] != "interfaces"]),
        ("cpu-limit", changed("reach-cpu", stalls=0)),
        ("process-limit", changed("reach-processes", got=3, errno=12)),
        ("process-visibility", changed("processes", count=60)),
    ],
)
def test_what_proves_nothing_is_unknown(name: str, change: Change) -> None:
    """Silence, a busy machine, another error: neither in force nor broken."""
    assert states(verdict(change))[name] is State.UNKNOWN


def test_unknown_does_not_support_a_level() -> None:
    """Processes of which nothing is known are no wall."""
    assert verdict(changed("processes", count=60)).isolation is Isolation.PROCESS


def test_nothing_seen() -> None:
    """A prober that said nothing proves nothing."""
    posture = verdict(lambda _: [], memory=None, remains=None)
    assert posture.isolation is Isolation.NONE
    assert State.NOT_IN_FORCE not in states(posture).values()


def test_which_wall_holds() -> None:
    """The socket filter holds where the box has interfaces, the namespace where it may make sockets."""
    by_filter = states(verdict(NO_SOCKETS, ETH0))
    assert by_filter["network"] is by_filter["socket-filter"] is State.IN_FORCE
    assert "network-namespace" not in by_filter
    by_namespace = states(verdict())
    assert by_namespace["network-namespace"] is State.IN_FORCE
    assert "socket-filter" not in by_namespace
    neither = states(verdict(ETH0))
    assert neither["socket-filter"] is neither["network-namespace"] is State.NOT_IN_FORCE


def with_sockets(errno: int, name: str = "kubernetes-api") -> Seen:
    rows = [row for row in healthy() if row["see"] != "connect"]
    rows += [{"see": "connect", "name": name, "to": "10.0.0.1:443", "by": "tcp", "errno": errno, "at": "answer"}]
    return observe(printed(ETH0(rows)))


def test_network_policy() -> None:
    """An address that answers cloche and not the box: enforced. One that answers both: not, and that breaks no promise, since
    the filter holds. One of which nobody knows: unknown.
    """
    known = frozenset({"kubernetes-api"})
    enforced = verdict(NO_SOCKETS, ETH0, sockets=with_sockets(110), answering=known)
    assert states(enforced)["network-policy"] is State.IN_FORCE
    open_ = verdict(NO_SOCKETS, ETH0, sockets=with_sockets(0), answering=known)
    assert states(open_)["network-policy"] is State.NOT_IN_FORCE
    assert open_.missing == ()
    assert open_.isolation is Isolation.CONTAINER
    assert states(verdict(NO_SOCKETS, ETH0, sockets=with_sockets(110)))["network-policy"] is State.UNKNOWN


@pytest.mark.parametrize(
    ("host", "change", "state"),
    [
        (HOST, changed("kernel"), State.NOT_IN_FORCE),
        (HOST, changed("kernel", boot_id="other"), State.IN_FORCE),
        (Host(release="6.18.0"), changed("kernel"), State.NOT_IN_FORCE),
        (Host(release="5.10.0"), changed("kernel"), State.IN_FORCE),
        (Host(), changed("kernel"), State.UNKNOWN),
        (Host(), GVISOR, State.IN_FORCE),
        (Host(), added(see="mount", path="/", type="virtiofs", source="kataShared", options="ro"), State.IN_FORCE),
    ],
)
def test_own_kernel(host: Host, change: Change, state: State) -> None:
    """Only positive evidence counts, and lifts the level."""
    posture = verdict(change, host=host)
    assert states(posture)["own-kernel"] is state
    assert (posture.isolation is Isolation.KERNEL) is (state is State.IN_FORCE)


def test_a_name_lifts_nothing() -> None:
    """A backend that claims a kernel of its own, whose box runs on the host's, has a container."""
    assert verdict(declared=declared(Isolation.KERNEL)).isolation is Isolation.CONTAINER


def test_a_kernel_of_its_own_does_not_make_up_for_a_network() -> None:
    """A virtual machine with the host's network is not isolated by its kernel alone."""
    reached = changed("connect", {"name": "host-network"}, errno=0)
    assert verdict(GVISOR, reached, host=Host()).isolation is Isolation.PROCESS


def test_what_a_kind_of_engine_cannot_give_is_no_broken_promise() -> None:
    """Declared as not in force and seen as not in force: told, and nothing is missing."""
    claims = (*declared().guarantees, Guarantee("disk-limit", State.NOT_IN_FORCE, "no quota"))
    posture = verdict(
        changed("create", {"path": "/tmp"}, bytes=900 * MIB), declared=replace(declared(), guarantees=claims)
    )
    assert states(posture)["disk-limit"] is State.NOT_IN_FORCE
    assert posture.missing == ()


def test_what_was_not_probed_says_so() -> None:
    """A claim that no probe can look at stays a claim."""
    claims = (*declared().guarantees, Guarantee("log-size", State.IN_FORCE, "it fits"))
    posture = verdict(declared=replace(declared(), guarantees=claims))
    assert posture.guarantees[-1] == Guarantee("log-size", State.IN_FORCE, "not probed: it fits")


def test_every_claim_is_looked_at() -> None:
    """Each of the names that backends use for what can be probed has a rule."""
    names = {guarantee.name for rule in RULES if (guarantee := rule(case())) is not None}
    assert names >= set(CLAIMS)
