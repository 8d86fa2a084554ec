"""What a script reaches, and which wall it is that keeps it. Pure."""

from __future__ import annotations

from errno import EACCES, EAFNOSUPPORT, ECONNREFUSED, EPERM

from cloche.isolation import Guarantee
from cloche.runtime.prove.case import Case, broken, error_name, held, listed, unclear
from cloche.runtime.prove.observe import Connection, Seen

NO_SOCKET = frozenset({EPERM, EACCES, EAFNOSUPPORT})
INTERNET = ("inet-stream", "inet-dgram", "inet6-stream", "inet6-dgram")
LOOPBACKS = frozenset(
    {"lo", "tunl0", "sit0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6gre0"}
)
"""What a network namespace has of its own: the loopback, and tunnels to nowhere where their modules are loaded."""
_WORDS = {
    "metadata": "the cloud's metadata service",
    "resolver": "the name server",
    "gateway": "the gateway",
    "host-loopback": "this machine's loopback",
    "host-network": "this machine's own address",
    "kubernetes-api": "the Kubernetes API server",
    "another-box": "another box of the same engine",
}


def no_sockets(seen: Seen) -> bool:
    """Whether no socket of the internet's could be made."""
    return bool(seen.sockets) and all(seen.sockets.get(kind) in NO_SOCKET for kind in INTERNET)


def network(case: Case) -> Guarantee:
    """Nothing answers, and that for a reason that is seen: silence alone proves nothing."""
    name, seen = "network", case.look
    if not seen.connections or not seen.sockets:
        return unclear(name, "the prober did not come to it")
    reached = [_told(connection) for connection in seen.connections if connection.errno == 0]
    if reached:
        return broken(
            name, f"a script reaches {listed(reached)}", "Find out who gave the box a network, and take it away."
        )
    tried = f"{_told(seen.connections[0])} failed: {error_name(seen.connections[0].errno)}"
    answering = [_told(c) for c in seen.connections if c.name in case.answering]
    if answering:
        tried += f"; so did {listed(answering)}, where cloche itself gets an answer"
    if no_sockets(seen):
        return held(name, f"connecting to {tried}. The script can make no internet sockets")
    if seen.interfaces is not None and LOOPBACKS.issuperset(seen.interfaces):
        return held(name, f"connecting to {tried}. The box has no interface but a loopback of its own")
    if seen.interfaces is None:
        return unclear(name, f"connecting to {tried}, but it was not seen what keeps the script from it")
    return broken(
        name,
        f"the script can make sockets, and the box has the interfaces {listed(list(seen.interfaces))}: nothing that was tried"
        " answered, but no wall is seen that would keep it from what does",
        "Find out who gave the box a network, and take it away.",
    )


def socket_filter(case: Case) -> Guarantee | None:
    """One of the two walls; where the other one holds, nobody relies on it."""
    name, seen = "socket-filter", case.look
    if not seen.sockets:
        return None
    if no_sockets(seen):
        return held(name, "the supervisor's filter refuses sockets of the internet's, IPv4 and IPv6", needed=False)
    if _namespace_holds(seen):
        return None
    made = [kind for kind in INTERNET if seen.sockets.get(kind) == 0]
    return broken(name, f"the script can make sockets: {listed(made)}", needed=False)


def network_namespace(case: Case) -> Guarantee | None:
    """The other one."""
    name, seen = "network-namespace", case.look
    if seen.interfaces is None:
        return None
    if _namespace_holds(seen):
        return held(name, "the box has no interface but a loopback of its own", needed=False)
    if no_sockets(seen):
        return None
    return broken(name, f"the box has interfaces: {listed(list(seen.interfaces))}", needed=False)


def other_sockets(case: Case) -> Guarantee:
    """Families that reach past a network namespace, or are a large attack surface."""
    name, seen = "socket-families", case.look
    wanted = ("packet", "vsock", "alg", "inet-raw")
    if not seen.sockets:
        return unclear(name, "the prober did not come to it")
    made = [kind for kind in wanted if seen.sockets.get(kind) == 0]
    if made:
        return broken(name, f"the script can make sockets of the kinds {listed(made)}")
    return held(name, "no raw, packet, vsock or crypto sockets")


def network_policy(case: Case) -> Guarantee | None:
    """The engine's own wall, seen through a box whose supervisor left the sockets to the script."""
    name, seen = "network-policy", case.sockets
    if seen is None:
        return None
    if no_sockets(seen) or not seen.connections:
        return unclear(name, "the box for it could make no sockets", needed=False)
    reached = [_told(connection) for connection in seen.connections if connection.errno == 0]
    if reached:
        return broken(
            name,
            f"a box whose script may make sockets reaches {listed(reached)}: nothing of the engine's keeps it. The socket filter"
            " alone holds",
            "In a cluster: a network plugin that enforces NetworkPolicy, and the policies of deploy/kubernetes. Elsewhere: ask"
            " who runs the service for sandboxes without a network.",
            needed=False,
        )
    if _namespace_holds(seen):
        return held(name, "the engine gives the box no interface but a loopback", needed=False)
    # A refusal may be the answer of who is there, or of a wall: it tells neither.
    silent = [_told(c) for c in seen.connections if c.name in case.answering and c.errno != ECONNREFUSED]
    if not silent:
        return unclear(
            name,
            "nothing answered, but no address was known that would have: silence proves nothing",
            "Allow two boxes at a time (CLOCHE_MAX_CONCURRENT): then one listens for the other.",
            needed=False,
        )
    return held(
        name,
        f"a box whose script may make sockets does not reach {listed(silent)}, where somebody listens",
        needed=False,
    )


def _namespace_holds(seen: Seen) -> bool:
    return seen.interfaces is not None and LOOPBACKS.issuperset(seen.interfaces)


def _told(connection: Connection) -> str:
    known = _WORDS.get(connection.name, connection.name)
    return f"{known} ({connection.to})"
