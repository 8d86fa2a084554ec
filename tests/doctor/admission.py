"""Has a cluster change the pods of one namespace as they are made: an administrator, or a webhook, that weakens them."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tests.kubernetes.deployment import Api, core

LABEL = "cloche-test/doctor"
IN_FORCE_S = 60.0
API = "/apis/admissionregistration.k8s.io/v1"
Patch = tuple[str, str, Any]
"""Operation, path and value (RFC 6902)."""


@contextlib.contextmanager
def namespace(admin: Api) -> Iterator[str]:
    """A namespace without any of the policies of deploy/kubernetes."""
    name = f"cloche-doctor-{secrets.token_hex(4)}"
    body = {"metadata": {"name": name, "labels": {LABEL: name}}}
    _expect(admin.ask("POST", "/api/v1/namespaces", body), 201)
    try:
        end = time.monotonic() + IN_FORCE_S
        while admin.ask("GET", f"{core('serviceaccounts', name)}/default").status != 200:
            assert time.monotonic() < end, "the namespace gets no service account"
            time.sleep(0.1)
        yield name
    finally:
        _expect(admin.ask("DELETE", f"/api/v1/namespaces/{name}"), 200)
        end = time.monotonic() + IN_FORCE_S
        while admin.ask("GET", f"/api/v1/namespaces/{name}").status != 404:
            assert time.monotonic() < end, "the namespace does not go"
            time.sleep(0.2)


@contextlib.contextmanager
def changing(admin: Api, namespace: str, patches: Sequence[Patch]) -> Iterator[None]:
    """While inside, each pod of the namespace that has a run of cloche's is changed like that when it is made."""
    name = f"cloche-doctor-{secrets.token_hex(4)}"
    expression = f"[{', '.join(_patch(*patch) for patch in patches)}]"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    policy = {
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {"resourceRules": [rule]},
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": expression}}],
        },
    }
    binding = {
        "metadata": {"name": name},
        "spec": {
            "policyName": name,
            "matchResources": {"namespaceSelector": {"matchLabels": {LABEL: namespace}}},
        },
    }
    kinds = {"mutatingadmissionpolicies": policy, "mutatingadmissionpolicybindings": binding}
    try:
        for kind, body in kinds.items():
            _expect(admin.ask("POST", f"{API}/{kind}", body), 201)
        _until_in_force(admin, namespace, patches)
        yield
    finally:
        for kind in kinds:
            admin.ask("DELETE", f"{API}/{kind}/{name}")


def _patch(operation: str, path: str, value: Any) -> str:
    given = f", value: {_cel(value)}" if operation != "remove" else ""
    return f'JSONPatch{{op: "{operation}", path: "{path}"{given}}}'


def _cel(value: Any) -> str:
    """In the language of policies: like JSON, but what a map or a list holds has one type."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)}: dyn({_cel(each)})' for name, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(f'dyn({_cel(each)})' for each in value)}]"
    return json.dumps(value)


def _until_in_force(admin: Api, namespace: str, patches: Sequence[Patch]) -> None:
    """A policy takes hold some seconds after it was made. What the server would make of such a pod shows it."""
    security = {"readOnlyRootFilesystem": True, "seccompProfile": {"type": "RuntimeDefault"}}
    container = {
        "name": "box",
        "image": "none",
        "command": list("abcdefgh"),
        "resources": {"limits": {"cpu": "1", "memory": "1Mi"}},
        "securityContext": {**security, "privileged": False, "allowPrivilegeEscalation": False},
        "volumeMounts": [{"name": "x", "mountPath": "/x"}],
    }
    spec = {
        "containers": [container],
        "automountServiceAccountToken": False,
        "volumes": [{"name": "x", "emptyDir": {}}],
        "securityContext": {"runAsUser": 1, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    }
    end = time.monotonic() + IN_FORCE_S
    while True:
        plain = {"metadata": {"name": "try"}, "spec": spec}
        answer = admin.ask("POST", f"{core('pods', namespace)}?dryRun=All", plain)
        _expect(answer, 201)
        if _shows(answer.body["spec"], patches):
            return
        assert time.monotonic() < end, "the policy does not take hold"
        time.sleep(0.3)


def _shows(made: Any, patches: Sequence[Patch]) -> bool:
    """Whether the first patch was applied to a pod's spec."""
    operation, path, value = patches[0]
    at = made
    for part in path.strip("/").split("/"):
        if part == "spec":
            continue
        if part == "-":
            return any(value["name"] == item["name"] for item in at)
        if isinstance(at, list):
            at = at[int(part)]
        elif part in at:
            at = at[part]
        else:
            return operation == "remove"
    return operation != "remove" and bool(at == value)


def _expect(answer: Any, status: int) -> None:
    assert answer.status == status, answer
