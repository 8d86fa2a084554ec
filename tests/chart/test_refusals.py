"""Values that are wrong: the chart says which, and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from tests.chart.rendering import Helm

KUBERNETES = "app.sandbox.kubernetes"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # The schema's. Helm's words for them change with its versions, the value's name is always there.
    "an unknown value": ({"sandbox": {"mode": "local"}}, "sandbox"),
    "an unknown value below": ({f"{KUBERNETES}.quota.pods": 5}, f"{KUBERNETES}.quota"),
    "an unknown mode": ({"app.sandbox.mode": "gvisor"}, "app.sandbox.mode"),
    "a mode that is no service's": ({"app.sandbox.mode": "remote"}, "app.sandbox.mode"),
    "a time that is none": ({"app.sandbox.timeout": "soon"}, "app.sandbox.timeout"),
    "no time": ({"app.sandbox.timeout": 0}, "app.sandbox.timeout"),
    "memory that is none": ({f"{KUBERNETES}.podResources.limits.memory": "256MB"}, "podResources.limits.memory"),
    "no memory": ({f"{KUBERNETES}.podResources.limits.memory": "0Mi"}, "podResources.limits.memory"),
    "CPUs that are none": ({f"{KUBERNETES}.quota.maxCPU": "many"}, f"{KUBERNETES}.quota.maxCPU"),
    "no run at a time": ({f"{KUBERNETES}.maxConcurrentSandboxes": 0}, f"{KUBERNETES}.maxConcurrentSandboxes"),
    "half a run": ({f"{KUBERNETES}.maxConcurrentSandboxes": 1.5}, f"{KUBERNETES}.maxConcurrentSandboxes"),
    "a namespace with capitals": ({f"{KUBERNETES}.namespace": "Sandbox"}, f"{KUBERNETES}.namespace"),
    "no namespace": ({f"{KUBERNETES}.namespace": ""}, f"{KUBERNETES}.namespace"),
    "privileged pods": ({f"{KUBERNETES}.podSecurity": "privileged"}, f"{KUBERNETES}.podSecurity"),
    "root": ({f"{KUBERNETES}.runAsUser.first": 0}, f"{KUBERNETES}.runAsUser.first"),
    "a quote in an image": ({f"{KUBERNETES}.admissionPolicy.images": ["a'] + ['*"]}, "admissionPolicy.images.0"),
    "a quote in the image": ({"app.sandbox.image": "python'"}, "app.sandbox.image"),
    "a quote in an annotation": ({f"{KUBERNETES}.annotations": {"a'": "b"}}, f"{KUBERNETES}.annotations"),
    "a network that is none": ({f"{KUBERNETES}.openNetwork.except": ["api.example"]}, "openNetwork.except.0"),
    "a toleration that is none": ({f"{KUBERNETES}.tolerations": [{"effect": "Never"}]}, f"{KUBERNETES}.tolerations.0"),
    "an address with a blank": ({"app.sandbox.opensandbox.apiURL": "https://a b"}, "app.sandbox.opensandbox.apiURL"),
    "a short token": ({"tokens.values": [{"name": "a", "token": "short"}]}, "tokens.values.0.token"),
    "a token with a colon": ({"tokens.values": [{"name": "a", "token": "0123456789abcdef:"}]}, "tokens.values.0.token"),
    "a token without a name": ({"tokens.values": [{"token": "0123456789abcdef"}]}, "tokens.values.0"),
    "a number as a tag": ({"image.tag": 1.1}, "image.tag"),
    "a number as a variable": ({"extraEnv": [{"name": "A", "value": 1}]}, "extraEnv.0.value"),
    "a port that is none": ({"service.port": 70000}, "service.port"),
    "text for a switch": ({"app.sandbox.fallback": "yes"}, "app.sandbox.fallback"),
    # What takes two values to see.
    "the release's own namespace": ({f"{KUBERNETES}.namespace": "cloche"}, "is the namespace of the release"),
    "a mode without its address": ({"app.sandbox.mode": "opensandbox"}, "app.sandbox.opensandbox.apiURL: the mode"),
    "two keys": (
        {"app.sandbox.opensandbox.apiKey": "a", "app.sandbox.opensandbox.existingSecret": "b"},
        "give apiKey or existingSecret, not both",
    ),
    "no daemon": ({"app.sandbox.mode": "docker"}, "needs the address of a daemon"),
    "two daemons": (
        {"app.sandbox.docker": {"host": "tcp://a:1", "socket": {"hostPath": "/a"}}},
        "give host or socket.hostPath, not both",
    ),
    "two kinds of tokens": (
        {"tokens": {"existingSecret": "a", "values": [{"name": "a", "token": "0123456789abcdef"}]}},
        "give existingSecret or values, not both",
    ),
    "two tokens of one name": (
        {"tokens.values": [{"name": "a", "token": f"{each}123456789abcdef"} for each in "01"]},
        "two tokens have one name",
    ),
    "more memory than a run may have": (
        {f"{KUBERNETES}.podResources.limits.memory": "5Gi"},
        "limits.memory is more than limitRange.maxMemory",
    ),
    "more CPUs than a run may have": (
        {f"{KUBERNETES}.podResources.limits.cpu": 4.5},
        "limits.cpu is more than limitRange.maxCPU",
    ),
    "more memory than all may have": ({f"{KUBERNETES}.quota.maxMemory": "255Mi"}, "is more than quota.maxMemory"),
    "more CPUs than all may have": ({f"{KUBERNETES}.quota.maxCPU": "999m"}, "is more than quota.maxCPU"),
    "users from the end": ({f"{KUBERNETES}.runAsUser": {"first": 20, "last": 10}}, "comes before the last"),
}


@pytest.mark.parametrize(("values", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(helm: Helm, values: dict[str, Any], says: str) -> None:
    """A value that is wrong is refused before anything is made, and named."""
    said = helm.refusal(values)
    # One Helm writes paths with slashes, another with points.
    assert says in said or says in said.replace("/", ".")


def test_a_cluster_that_is_too_old(helm: Helm) -> None:
    """A cluster without the policies is refused with what to do; one that is older still, by the chart's own bound."""
    said = helm.refusal({}, "--kube-version", "1.29.9")
    assert "needs Kubernetes 1.30, and this is v1.29.9. Set it to false" in said
    assert "incompatible with Kubernetes v1.26.0" in helm.refusal({}, "--kube-version", "1.26.0")
