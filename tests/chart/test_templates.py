"""What the chart makes of values: every mode, and what users of charts expect to be able to say."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import yaml
from tests.chart.rendering import (
    NAMESPACE,
    RELEASE,
    Document,
    Helm,
    box,
    environ,
    kinds,
    only,
    pod,
)

from cloche.settings import Settings

KUBERNETES = "app.sandbox.kubernetes"
SANDBOX = "cloche-sandbox"
SERVICE = {"Deployment", "Service", "ServiceAccount", "Secret", "Pod"}
CLUSTER = {
    "Namespace",
    "Role",
    "RoleBinding",
    "NetworkPolicy",
    "ResourceQuota",
    "LimitRange",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}
"""What there is for runs that become Jobs."""
MODES: dict[str, dict[str, Any]] = {
    "disabled": {},
    "kubernetes": {},
    "opensandbox": {"app.sandbox.opensandbox.apiURL": "https://sandbox.example"},
    "docker": {"app.sandbox.docker.host": "tcp://docker.example:2376"},
    "local": {},
    "auto": {},
}
MATRIX: dict[str, dict[str, Any]] = {
    **{f"mode {mode}": {"app.sandbox.mode": mode, **more} for mode, more in MODES.items()},
    "an OpenSandbox key": {
        **MODES["opensandbox"],
        "app.sandbox.mode": "opensandbox",
        "app.sandbox.opensandbox.apiKey": "a-key",
        "app.sandbox.opensandbox.serverProxy": True,
        "app.sandbox.opensandbox.ssrfWhitelist": ["box.example", "10.1.0.0/16"],
    },
    "a socket of Docker's": {
        "app.sandbox.mode": "docker",
        "app.sandbox.docker.socket.hostPath": "/run/docker.sock",
        "app.sandbox.docker.socket.group": 998,
    },
    "a namespace of one's own": {
        f"{KUBERNETES}.createNamespace": False,
        f"{KUBERNETES}.createServiceAccount": False,
        f"{KUBERNETES}.createRole": False,
        f"{KUBERNETES}.denyAllNetwork": False,
        f"{KUBERNETES}.openNetwork.enabled": False,
        f"{KUBERNETES}.quota.enabled": False,
        f"{KUBERNETES}.limitRange.enabled": False,
        f"{KUBERNETES}.admissionPolicy.enabled": False,
    },
    "all that a run can have": {
        "app.sandbox.timeout": "2m",
        "app.sandbox.fallback": True,
        "app.sandbox.minIsolation": "container",
        "app.sandbox.startTimeout": 300,
        "app.sandbox.queueTimeout": 0,
        f"{KUBERNETES}.namespace": "team-a-runs",
        f"{KUBERNETES}.serviceAccount": "nobody",
        f"{KUBERNETES}.podSecurity": "baseline",
        f"{KUBERNETES}.namespaceAnnotations": {"team": "a"},
        f"{KUBERNETES}.maxConcurrentSandboxes": 12,
        f"{KUBERNETES}.podResources.limits": {"memory": "1Gi", "cpu": "1500m"},
        f"{KUBERNETES}.podResources.requests": {"memory": "100M", "cpu": 0.075},
        f"{KUBERNETES}.quota.maxPods": 50,
        f"{KUBERNETES}.runAsUser": {"first": 20000, "last": 29999},
        f"{KUBERNETES}.hostUsers": False,
        f"{KUBERNETES}.runtimeClassName": "kata",
        f"{KUBERNETES}.nodeSelector": {"pool": "sandbox"},
        f"{KUBERNETES}.tolerations": [{"key": "sandbox", "operator": "Exists", "effect": "NoSchedule"}],
        f"{KUBERNETES}.priorityClassName": "batch",
        f"{KUBERNETES}.imagePullSecrets": ["registry", "other"],
        f"{KUBERNETES}.labels": {"kueue.x-k8s.io/queue-name": "skills"},
        f"{KUBERNETES}.annotations": {"team.example/owner": "a"},
        f"{KUBERNETES}.arch": "aarch64",
        f"{KUBERNETES}.openNetwork.except": ["203.0.113.7/32", "2001:db8::/32"],
        f"{KUBERNETES}.admissionPolicy.images": ["registry.example/team/*"],
        f"{KUBERNETES}.admissionPolicy.annotations": ["sidecar.example/"],
    },
    "all that a service can have": {
        "replicaCount": 3,
        "image": {"repository": "registry.example/cloche", "digest": "sha256:" + 64 * "0", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "nameOverride": "scripts",
        "commonLabels": {"team": "a"},
        "app.maxQueue": 10,
        "app.drainSeconds": 90,
        "app.sweepEvery": "5m",
        "app.keepBytes": "16Mi",
        "app.logLevel": "debug",
        "tokens.values": [
            {"name": "agent", "token": "0123456789abcdef"},
            {"name": "other", "token": "fedcba9876543210", "limit": 2},
        ],
        "serviceAccount": {"create": True, "name": "scripts", "annotations": {"a": "b"}},
        "service": {"type": "NodePort", "port": 80, "nodePort": 30080, "annotations": {"a": "b"}},
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "annotations": {"a": "b"},
            "hosts": [{"host": "cloche.example"}, {"host": "other.example", "paths": [{"path": "/cloche"}]}],
            "tls": [{"secretName": "cloche-tls", "hosts": ["cloche.example"]}],
        },
        "networkPolicy": {
            "enabled": True,
            "from": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}],
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
        },
        "resources": {"limits": {"cpu": "2", "memory": "2Gi"}},
        "podLabels": {"sidecar.example/inject": "false"},
        "podAnnotations": {"a": "b"},
        "nodeSelector": {"pool": "services"},
        "tolerations": [{"key": "services", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "topologySpreadConstraints": [
            {"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}
        ],
        "priorityClassName": "services",
        "extraEnv": [{"name": "CLOCHE_PIDS", "value": "64"}, {"name": "CLOCHE_TIMEOUT", "value": "5"}],
        "extraEnvFrom": [{"configMapRef": {"name": "more"}}],
        "extraVolumes": [{"name": "more", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    },
    "Secrets of one's own": {
        "app.sandbox.mode": "opensandbox",
        **MODES["opensandbox"],
        "app.sandbox.opensandbox.existingSecret": "my-key",
        "tokens.existingSecret": "my-tokens",
    },
    "nobody else's": {"fullnameOverride": "scripts", "serviceAccount": {"create": False, "name": "given"}},
}
EVERY = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)


@EVERY
def test_every_document_is_whole(helm: Helm, values: dict[str, Any]) -> None:
    """Each object has a kind, a name and the release's labels, is in a namespace that is meant, and there is none twice."""
    documents = helm.render(values)
    theirs = values.get(f"{KUBERNETES}.namespace", SANDBOX)
    for each in documents:
        metadata = each["metadata"]
        labels = metadata["labels"]
        assert (labels["app.kubernetes.io/instance"], labels["app.kubernetes.io/managed-by"]) == (RELEASE, "Helm")
        assert metadata["name"]
        assert metadata.get("namespace", NAMESPACE) in {NAMESPACE, theirs}
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in documents]
    assert len(set(names)) == len(names)


@EVERY
def test_cloche_understands_its_settings(helm: Helm, values: dict[str, Any]) -> None:
    """Every variable that cloche's own settings know has a value that they take, and none is given twice or empty."""
    listed = [each["name"] for each in box(helm.render(values))["env"]]
    assert len(set(listed)) == len(listed)
    found = environ(helm.render(values))
    assert all(found.values())
    Settings.from_env(found)


@EVERY
def test_the_service_has_no_privilege(helm: Helm, values: dict[str, Any]) -> None:
    """Its pod, and that of the test, meet the Pod Security Standard `restricted`, but for a socket that somebody asked for."""
    documents = helm.render(values)
    for spec in (pod(documents), only(documents, "Pod")["spec"]):
        assert spec["enableServiceLinks"] is False
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
        has_socket = spec is pod(documents) and "app.sandbox.docker.socket.hostPath" in values
        assert any("hostPath" in volume for volume in spec["volumes"]) == has_socket


@EVERY
def test_the_token_is_mounted_only_where_it_is_used(helm: Helm, values: dict[str, Any]) -> None:
    """In modes that make no Job the pod has no token of the API server, and there is nothing of a namespace for runs."""
    documents = helm.render(values)
    in_cluster = values.get("app.sandbox.mode", "kubernetes") in {"kubernetes", "auto"}
    assert pod(documents)["automountServiceAccountToken"] is in_cluster
    assert only(documents, "Pod")["spec"]["automountServiceAccountToken"] is False
    for account in (each for each in documents if each["kind"] == "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    if not in_cluster:
        assert not (kinds(documents) - {"Ingress", "PodDisruptionBudget"}) & CLUSTER
        assert not any(name.startswith("CLOCHE_KUBE_") for name in environ(documents))


@pytest.mark.parametrize("mode", MODES)
def test_modes(helm: Helm, mode: str) -> None:
    """Each mode gets what it needs, and not what another one needs."""
    documents = helm.render({"app.sandbox.mode": mode, **MODES[mode]})
    expected = SERVICE | (CLUSTER if mode in {"kubernetes", "auto"} else set())
    assert kinds(documents) == expected
    assert environ(documents)["CLOCHE_MODE"] == mode


def test_a_mode_is_not_told_of_another_ones_engine(helm: Helm) -> None:
    """Addresses and keys that are in the values are used in their own mode, and in auto."""
    both = {
        **MODES["opensandbox"],
        **MODES["docker"],
        "app.sandbox.opensandbox.apiKey": "a-key",
    }
    for mode in ("disabled", "kubernetes", "local"):
        documents = helm.render({"app.sandbox.mode": mode, **both})
        listed = {each["name"] for each in box(documents)["env"]}
        assert not {name for name in listed if "OPENSANDBOX" in name or "DOCKER" in name}
        assert RELEASE + "-opensandbox" not in {each["metadata"]["name"] for each in documents}
    documents = helm.render({"app.sandbox.mode": "auto", **both})
    assert {"CLOCHE_OPENSANDBOX_API_URL", "CLOCHE_OPENSANDBOX_API_KEY", "CLOCHE_DOCKER_HOST"} <= {
        each["name"] for each in box(documents)["env"]
    }


def test_a_namespace_of_ones_own(helm: Helm) -> None:
    """Everything for runs can be left out, piece by piece, and cloche is told of the namespace all the same."""
    values = MATRIX["a namespace of one's own"]
    documents = helm.render(values)
    assert kinds(documents) == SERVICE
    assert environ(documents)["CLOCHE_KUBE_NAMESPACE"] == SANDBOX
    for name in (name for name in values if not name.endswith("createNamespace")):
        assert "Namespace" in kinds(helm.render({name: False}))
    assert kinds(helm.render({f"{KUBERNETES}.createNamespace": False})) == SERVICE | CLUSTER - {"Namespace"}


def test_settings_of_runs(helm: Helm) -> None:
    """What is said of runs reaches cloche in its own words."""
    settings = Settings.from_env(environ(helm.render(MATRIX["all that a run can have"])))
    assert (settings.timeout, settings.start_timeout, settings.queue_timeout) == (120, 300, 0)
    assert settings.fallback
    assert str(settings.min_isolation) == "container"
    assert (settings.kube_namespace, settings.kube_service_account) == ("team-a-runs", "nobody")
    assert (settings.memory, settings.cpus) == (2**30, 1.5)
    assert (settings.kube_memory_request, settings.kube_cpu_request) == (100_000_000, 0.075)
    assert settings.max_concurrent == 12
    assert settings.kube_run_as_user == (20000, 29999)
    assert not settings.kube_host_users
    assert (settings.kube_runtime_class, settings.kube_priority_class) == ("kata", "batch")
    assert settings.kube_node_selector == {"pool": "sandbox"}
    assert [each.key for each in settings.kube_tolerations] == ["sandbox"]
    assert settings.kube_image_pull_secrets == ("registry", "other")
    assert settings.kube_labels == {"kueue.x-k8s.io/queue-name": "skills"}
    assert settings.kube_annotations == {"team.example/owner": "a"}
    assert settings.kube_arch == "aarch64"


def test_objects_of_runs(helm: Helm) -> None:
    """What is said of runs reaches the objects that bound them, too."""
    documents = helm.render(MATRIX["all that a run can have"])
    labels = only(documents, "Namespace", "team-a-runs")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "baseline"
    hard = only(documents, "ResourceQuota")["spec"]["hard"]
    assert hard == {
        "pods": "50",
        "limits.memory": "8Gi",
        "limits.cpu": "20",
        "requests.memory": "5000000000",
        "requests.cpu": "3750m",
        "count/jobs.batch": "100",
        "count/configmaps": "500",
    }
    four, six, _ = only(documents, "NetworkPolicy", "team-a-runs-open")["spec"]["egress"]
    assert "203.0.113.7/32" in four["to"][0]["ipBlock"]["except"]
    assert "2001:db8::/32" in six["to"][0]["ipBlock"]["except"]
    policy = only(documents, "ValidatingAdmissionPolicy", "team-a-runs")["spec"]
    variables = {each["name"]: each["expression"] for each in policy["variables"]}
    assert "'python:3.12-slim',\n  'registry.example/team/*'" in variables["images"]
    assert "'sidecar.example/'" in variables["annotations"]
    assert "'team.example/owner'" in variables["annotations"]
    assert variables["users"] == variables["innerUsers"] == "[20000, 29999]"
    assert "nobody" in json.dumps(policy["validations"])
    for binding in (each for each in documents if each["kind"] == "ValidatingAdmissionPolicyBinding"):
        assert binding["spec"]["policyName"] == binding["metadata"]["name"]
        selector = binding["spec"]["matchResources"]["namespaceSelector"]
        assert selector == {"matchLabels": {"kubernetes.io/metadata.name": "team-a-runs"}}


def test_two_releases_share_no_object_of_the_cluster(helm: Helm) -> None:
    """Objects that are in no namespace have other names where runs have another namespace."""

    def of_the_cluster(sandbox: str) -> set[tuple[str, str]]:
        documents = helm.render({f"{KUBERNETES}.namespace": sandbox})
        return {(each["kind"], each["metadata"]["name"]) for each in documents if "namespace" not in each["metadata"]}

    assert len(of_the_cluster("one")) == 5
    assert not of_the_cluster("one") & of_the_cluster("two")


def test_the_quotas_own_numbers(helm: Helm) -> None:
    """Each number of the quota can be given, and stands as it was given."""
    quota = {
        "maxPods": 1,
        "maxMemory": "512Mi",
        "maxCPU": 1,
        "requestsMemory": "1Gi",
        "requestsCPU": "2",
        "maxJobs": 7,
        "maxConfigMaps": 9,
    }
    hard = only(helm.render({f"{KUBERNETES}.quota": quota}), "ResourceQuota")["spec"]["hard"]
    assert hard == {
        "pods": "1",
        "limits.memory": "512Mi",
        "limits.cpu": "1",
        "requests.memory": "1Gi",
        "requests.cpu": "2",
        "count/jobs.batch": "7",
        "count/configmaps": "9",
    }


def test_the_least_limit_range_is_none_that_the_cluster_refuses(helm: Helm) -> None:
    """The defaults for other pods are never above the most that there may be."""
    small = {"maxMemory": "256Mi", "maxCPU": "500m"}
    values = {f"{KUBERNETES}.limitRange": small, f"{KUBERNETES}.podResources.limits.cpu": "500m"}
    (limits,) = only(helm.render(values), "LimitRange")["spec"]["limits"]
    assert limits["default"] == limits["max"] == {"cpu": "500m", "memory": "256Mi"}


def test_settings_of_the_service(helm: Helm) -> None:
    """What is said of the service stands where Kubernetes, and the service, look for it."""
    documents = helm.render(MATRIX["all that a service can have"])
    name = "cloche-scripts"
    deployment = only(documents, "Deployment", name)["spec"]
    assert deployment["replicas"] == 3
    spec, container, found = pod(documents), box(documents), environ(documents)
    assert container["image"] == "registry.example/cloche@sha256:" + 64 * "0"
    assert container["args"] == ["serve"]
    assert spec["terminationGracePeriodSeconds"] > 90 + 25
    assert found["CLOCHE_SERVE_DRAIN"] == "90"
    assert (found["CLOCHE_SERVE_MAX_QUEUE"], found["CLOCHE_SERVE_KEEP_BYTES"]) == ("10", "16Mi")
    assert (found["CLOCHE_SWEEP_EVERY"], found["CLOCHE_LOG"]) == ("5m", "debug")
    assert (found["CLOCHE_PIDS"], found["CLOCHE_TIMEOUT"]) == ("64", "5")
    assert spec["serviceAccountName"] == "scripts"
    assert only(documents, "RoleBinding")["subjects"] == [
        {"kind": "ServiceAccount", "name": "scripts", "namespace": NAMESPACE}
    ]
    (port,) = only(documents, "Service", name)["spec"]["ports"]
    assert (port["port"], port["nodePort"], port["targetPort"]) == (80, 30080, "http")
    first, second = only(documents, "Ingress")["spec"]["rules"]
    assert first["http"]["paths"][0]["backend"] == {"service": {"name": name, "port": {"name": "http"}}}
    assert second["http"]["paths"][0]["path"] == "/cloche"
    guard = only(documents, "NetworkPolicy", name)["spec"]
    assert guard["policyTypes"] == ["Ingress", "Egress"]
    test = only(documents, "Pod")
    assert test["metadata"]["labels"].items() >= guard["ingress"][0]["from"][1]["podSelector"]["matchLabels"].items()
    assert only(documents, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert {"name": "more", "mountPath": "/more"} in container["volumeMounts"]
    (spread,) = spec["topologySpreadConstraints"]
    assert spread["topologyKey"] == "topology.kubernetes.io/zone"
    assert spread["labelSelector"] == deployment["selector"]
    assert {each["metadata"]["labels"]["team"] for each in documents} == {"a"}


def test_who_is_selected(helm: Helm) -> None:
    """The Service, the Deployment and the budget choose the service's pods, and never that of the test."""
    documents = helm.render({"replicaCount": 2, "networkPolicy.enabled": True})
    selectors = [
        only(documents, "Service")["spec"]["selector"],
        only(documents, "Deployment")["spec"]["selector"]["matchLabels"],
        only(documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        only(documents, "NetworkPolicy", RELEASE)["spec"]["podSelector"]["matchLabels"],
    ]
    labels = only(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= only(documents, "Pod")["metadata"]["labels"].items()


def test_probes(helm: Helm) -> None:
    """The service is alive while it answers, and gets requests while its engine does."""
    container = box(helm.render({"probes.readiness.failureThreshold": 9}))
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["startupProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["readinessProbe"]["failureThreshold"] == 9


def test_old_clusters(helm: Helm) -> None:
    """What a cluster does not have yet is left out."""
    values = {f"{KUBERNETES}.admissionPolicy.enabled": False}
    assert "lifecycle" not in box(helm.render(values, "--kube-version", "1.28.3"))
    assert "lifecycle" in box(helm.render({}, "--kube-version", "1.30.0-gke.1"))


def test_service_monitor(helm: Helm) -> None:
    """Prometheus Operator is told of the metrics where somebody asks for it, and where not, nothing needs it."""
    assert "ServiceMonitor" not in kinds(helm.render())
    found = only(
        helm.render({"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}), "ServiceMonitor"
    )
    assert found["metadata"]["labels"]["release"] == "prometheus"
    assert found["spec"]["endpoints"][0]["path"] == "/metrics"


# --- secrets ----------------------------------------------------------------------------------------------------------


def _tokens(documents: list[Document]) -> str:
    data = only(documents, "Secret", f"{RELEASE}-tokens")["data"]["tokens"]
    return base64.b64decode(data).decode()


def test_a_token_is_made_up(helm: Helm) -> None:
    """Without tokens of one's own there is one, long, and another for each installation."""
    first, second = _tokens(helm.render()), _tokens(helm.render())
    name, _, token = first.partition(":")
    assert name == "default"
    assert len(token) == 48
    assert first != second


def test_tokens_of_the_values(helm: Helm) -> None:
    """Tokens stand in the file as the service reads it."""
    values = {"tokens.values": MATRIX["all that a service can have"]["tokens.values"]}
    assert _tokens(helm.render(values)) == "agent:0123456789abcdef\nother:fedcba9876543210:2"


def test_secrets_of_ones_own(helm: Helm) -> None:
    """Where Secrets are named the chart makes none, and the pods, that of the test too, take what is named."""
    documents = helm.render(MATRIX["Secrets of one's own"])
    assert "Secret" not in kinds(documents)
    (key,) = (each for each in box(documents)["env"] if each["name"] == "CLOCHE_OPENSANDBOX_API_KEY")
    assert key["valueFrom"] == {"secretKeyRef": {"name": "my-key", "key": "apiKey"}}
    for spec in (pod(documents), only(documents, "Pod")["spec"]):
        (volume,) = (each for each in spec["volumes"] if each["name"] == "tokens")
        assert volume["secret"]["secretName"] == "my-tokens"


@EVERY
def test_no_secret_stands_in_a_pod(helm: Helm, values: dict[str, Any]) -> None:
    """Keys and tokens are in Secrets only, and the service reads its tokens from a file."""
    documents = helm.render(values)
    text = yaml.safe_dump_all(each for each in documents if each["kind"] != "Secret")
    assert not [secret for secret in ("a-key", "0123456789abcdef", "fedcba9876543210") if secret in text]
    mounts = {each["name"]: each["mountPath"] for each in box(documents)["volumeMounts"]}
    assert environ(documents)["CLOCHE_SERVE_TOKENS_FILE"] == f"{mounts['tokens']}/tokens"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"tokens.values": [{"name": "agent", "token": "0123456789abcdef"}]}),
        ({}, {"tokens.existingSecret": "mine"}),
        (MATRIX["an OpenSandbox key"], {**MATRIX["an OpenSandbox key"], "app.sandbox.opensandbox.apiKey": "another"}),
        ({}, {"app.sandbox.timeout": 61}),
    ],
    ids=["tokens", "another Secret", "a key", "a setting"],
)
def test_a_change_replaces_the_pods(helm: Helm, before: dict[str, Any], after: dict[str, Any]) -> None:
    """The service reads settings and Secrets once. So a change of one is a change of its pods; and no change is none."""

    def template(values: dict[str, Any]) -> Any:
        return only(helm.render(values), "Deployment")["spec"]["template"]

    assert template(before) == template(before)
    assert template(before) != template(after)
