"""The way to a pod, step by step, for those who want to know how it is."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

import anyio

from cloche._kit.http import HttpFailure
from cloche.backends.kubernetes import names
from cloche.backends.kubernetes.client import KubernetesClient, Refused
from cloche.backends.kubernetes.facts import Rule
from cloche.backends.kubernetes.kubeconfig import Access
from cloche.backends.kubernetes.probe import NEEDED
from cloche.errors import ClocheError
from cloche.isolation import Check, Verdict

GONE_S, GONE_PAUSE_S = 20.0, 0.3
"""The cluster removes a Job's pod and ConfigMaps by itself, some seconds after the Job."""
SELF = frozenset({"authorization.k8s.io", "authentication.k8s.io"})
"""Everybody may ask what he may do."""
EVERYBODYS = tuple((verb, "certificates.k8s.io", "clustertrustbundles") for verb in ("get", "list", "watch"))
"""What Kubernetes gives each service account (since 1.33)."""
MOST_TOLD = 6
ROLE = "Apply deploy/kubernetes/role.yaml: it has exactly the rights that cloche uses, and says why."


def excess(rules: Iterable[Rule]) -> list[str]:
    """Rights beyond those that are used, in words. Pure."""
    found: dict[str, None] = {}
    for rule in rules:
        for group in sorted(rule.groups - SELF):
            for resource in sorted(rule.resources):
                verbs = sorted(v for v in rule.verbs if (v, group, resource) not in (*NEEDED, *EVERYBODYS))
                if verbs:
                    kind = f"{resource}.{group}" if group else resource
                    found[f"{'/'.join(verbs)} {'everything' if resource == '*' else kind}"] = None
    return list(found)


async def rights(client: KubernetesClient, namespace: str) -> tuple[Check, ...]:
    """Those that are needed, and those that are there beside them."""
    try:
        rules, complete = await client.rules()
        missing = [right for right in NEEDED if not any(rule.allows(*right) for rule in rules)]
        if not complete:
            missing = [right for right in missing if not await client.may(*right)]
    except (Refused, HttpFailure, ClocheError) as exc:
        return (Check("rights", Verdict.UNKNOWN, f"the API server does not tell what cloche may do: {exc}", ROLE),)
    if missing:
        lacking = ", ".join(f"{verb} {resource}" for verb, _, resource in missing)
        return (Check("rights", Verdict.NOT_OK, f"in the namespace {namespace} cloche may not {lacking}", ROLE),)
    has = Check(
        "rights", Verdict.OK, f"all {len(NEEDED)} rights that a run needs are there, in the namespace {namespace}"
    )
    more = excess(rules)
    if not more:
        return (has, Check("excess-rights", Verdict.OK, "no right is there that cloche does not use", needed=False))
    told = "; ".join(more[:MOST_TOLD]) + (f"; and {len(more) - MOST_TOLD} more" if len(more) > MOST_TOLD else "")
    return (
        has,
        Check("excess-rights", Verdict.NOT_OK, f"cloche may also {told}, and does not need it", ROLE, needed=False),
    )


def addresses(access: Access) -> dict[str, str]:
    """Where the API server answers, if that is an address which means the same in a pod. Pure."""
    parts = urlsplit(access.base)
    try:
        address = ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        return {}
    if address.is_loopback or address.is_unspecified:
        return {}
    host = f"[{address}]" if address.version == 6 else str(address)
    return {"kubernetes-api": f"{host}:{parts.port or 443}"}


async def remains(client: KubernetesClient, run_ids: Collection[str]) -> list[str]:
    """Jobs, pods and ConfigMaps of these runs, once the cluster had time to remove them.

    Raises:
        Refused, HttpFailure, ClocheError.
    """
    left: list[str] = []
    with anyio.move_on_after(GONE_S):
        while left := await _there(client, run_ids):  # noqa: ASYNC110 - who removes it tells nobody
            await anyio.sleep(GONE_PAUSE_S)
    return left


async def _there(client: KubernetesClient, run_ids: Collection[str]) -> list[str]:
    things = [*await client.jobs(), *await client.config_maps()]
    left = [f"the {thing.kind} {thing.name}" for thing in things if thing.labels.get(names.LABEL_RUN) in run_ids]
    for run_id in run_ids:
        pods, _ = await client.pods(f"{names.LABEL_RUN}={run_id}")
        left += [f"the pod {pod.name}" for pod in pods]
    return left
