"""Observations → guarantees and the level that they support. Pure.

What a backend declares decides what is *needed*: a bound that its kind of engine cannot give is told, and breaks no promise.
Whether something is in force is decided by what was seen alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

from cloche.isolation import Guarantee, Isolation, Posture, State
from cloche.runtime.prove.case import Case, listed
from cloche.runtime.prove.rules import identity, kernel, limits, network, places

Rule: TypeAlias = Callable[[Case], Guarantee | None]

RULES: tuple[Rule, ...] = (
    network.network,
    network.network_namespace,
    network.socket_filter,
    network.network_policy,
    network.other_sockets,
    places.no_credentials,
    identity.identity,
    identity.no_capabilities,
    identity.no_new_privileges,
    identity.system_call_filter,
    identity.engine_call_filter,
    identity.process_tree,
    kernel.process_visibility,
    kernel.namespaces,
    identity.user_namespace,
    kernel.guest_kernel,
    places.read_only_root,
    places.workspace_read_only,
    places.writable_places,
    places.disk_limit,
    places.file_count_limit,
    places.landlock,
    places.kernel_files,
    places.devices,
    limits.memory_limit,
    limits.process_limit,
    limits.cpu_limit,
    limits.no_leftovers,
)
"""In the order in which they are told."""

PROCESS = ("identity", "no-capabilities", "no-new-privileges")
NAMESPACE = ("namespaces", "process-visibility", "network")
"""For each of these levels, what must have been seen to be in force."""
NAMESPACE_UNLESS = ("no-credentials", "writable-places", "process-tree", "system-call-filter", "socket-families")
CONTAINER_UNLESS = ("read-only-root", "devices", "kernel-files", "engine-call-filter")
"""And what must not have been seen to be broken."""


def judge(case: Case) -> Posture:
    """The posture that the evidence supports."""
    found: dict[str, Guarantee] = {}
    for rule in RULES:
        guarantee = rule(case)
        if guarantee is not None:
            found[guarantee.name] = replace(guarantee, needed=_is_needed(case, guarantee))
    for claim in case.declared.guarantees:
        if claim.name not in found:
            found[claim.name] = replace(
                claim, evidence=f"not probed: {claim.evidence}", needed=claim.state is State.IN_FORCE
            )
    level = supported(found, case.declared.isolation)
    posture = replace(case.declared, isolation=level, guarantees=tuple(found.values()), proved=True)
    if level >= case.declared.isolation:
        return replace(posture, reason="", hint="")
    return replace(posture, reason=_reason(found), hint=_hint(found))


def supported(found: Mapping[str, Guarantee], declared: Isolation) -> Isolation:
    """The level that the guarantees support. Only a kernel of its own lifts it above what the backend's kind gives."""

    def held(names: tuple[str, ...]) -> bool:
        return all(name in found and found[name].state is State.IN_FORCE for name in names)

    def whole(names: tuple[str, ...]) -> bool:
        return not any(
            name in found and found[name].state is State.NOT_IN_FORCE and found[name].needed for name in names
        )

    if not held(PROCESS):
        return Isolation.NONE
    if not (held(NAMESPACE) and whole(NAMESPACE_UNLESS)):
        return Isolation.PROCESS
    if held(("own-kernel",)):
        return Isolation.KERNEL
    if not whole(CONTAINER_UNLESS):
        return Isolation.NAMESPACE
    return min(declared, Isolation.CONTAINER)


def _is_needed(case: Case, guarantee: Guarantee) -> bool:
    claim = case.claims(guarantee.name)
    return guarantee.needed if claim is None else claim.state is State.IN_FORCE


def _weak(found: Mapping[str, Guarantee]) -> list[Guarantee]:
    """What speaks against the level, the worst first."""
    names = (*PROCESS, *NAMESPACE, *NAMESPACE_UNLESS, *CONTAINER_UNLESS)
    weak = [found[name] for name in names if name in found and found[name].state is not State.IN_FORCE]
    return sorted(weak, key=lambda guarantee: guarantee.state is State.UNKNOWN)


def _reason(found: Mapping[str, Guarantee]) -> str:
    told = [f"{guarantee.name} ({guarantee.evidence})" for guarantee in _weak(found)]
    return f"a probe inside of a box did not find in force: {listed(told, 3)}" if told else ""


def _hint(found: Mapping[str, Guarantee]) -> str:
    return next((guarantee.advice for guarantee in _weak(found) if guarantee.advice), "")
