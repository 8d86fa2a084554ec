"""deploy/kubernetes on a real cluster: what cloche's credentials cannot do there, and what the policies refuse to all."""

from __future__ import annotations

import copy
import ipaddress
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tests.kubernetes import deployment
from tests.kubernetes.deployment import (
    APPLICATION,
    DELETION_POLICY,
    IMAGES,
    NAMESPACE,
    POLICY,
    RUNNER,
    Answer,
    Api,
    Run,
    core,
    jobs,
    run,
)

from cloche.backends.kubernetes import manifest
from cloche.spec import Network
from cloche.testing.conformance import absent

PATTERNS = ("cloche-test/below/*", "cloche-test/tags:*", "cloche-test/digests@sha256:*", "cloche-test/slim*")
"""Entries of the list of images. The last one is none of the forms that stand for more than themselves."""
DRY = "?dryRun=All"
STARTED_S = 60.0
DIGEST = "sha256:" + 64 * "0"


@pytest.fixture(scope="module")
def administrator() -> Path:
    try:
        return deployment.admin()
    except deployment.AbsentError as exc:
        absent("kubernetes", str(exc))
        raise


@pytest.fixture(scope="module")
def credentials(administrator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return deployment.deploy(administrator, tmp_path_factory.mktemp("kubernetes"), [*IMAGES, *PATTERNS])
    except deployment.AbsentError as exc:
        absent("kubernetes", str(exc))
        raise


@pytest.fixture(scope="module")
def app(credentials: Path) -> Iterator[Api]:
    """The API server with what the manifests give to cloche."""
    with Api(credentials) as api:
        yield api


@pytest.fixture(scope="module")
def admin(administrator: Path, credentials: Path) -> Iterator[Api]:
    """The API server with all rights, after the manifests have been applied."""
    with Api(administrator) as api:
        yield api


@pytest.fixture(scope="module")
def pod(app: Api) -> Iterator[dict[str, Any]]:
    """A pod that runs, of a Job that the credentials made."""
    made = _named("sleep 60")
    _start(app, made)
    try:
        yield _wait(app, made, "Running")
    finally:
        _remove(app, made)


def _named(does: str, **changes: Any) -> tuple[Run, str]:
    return run(f"test-{secrets.token_hex(6)}", **changes), does


def _start(api: Api, made: tuple[Run, str], job: Mapping[str, Any] | None = None) -> None:
    """What cloche does for a run, except that its supervisor is a shell script."""
    wanted, does = made
    profile, ground, name = wanted
    answer = api.ask("POST", jobs(ground.namespace), wanted.job if job is None else job)
    assert answer.status == 201, answer.body
    maps = [manifest.supervisor_map(ground.supervisor, f"#!/bin/sh\n{does}\n".encode())]
    maps += manifest.bundle_maps(profile, ground, name, answer.body["metadata"]["uid"], b"delivered")
    for each in maps:
        answer = api.ask("POST", core("configmaps", ground.namespace), each)
        assert answer.status == 201, answer.body


def _wait(api: Api, made: tuple[Run, str], phase: str) -> dict[str, Any]:
    """The pod, once it has come so far."""
    wanted, _ = made
    path = f"{core('pods', wanted.ground.namespace)}?labelSelector=cloche.dev/run={wanted.profile.run_id}"
    end = time.monotonic() + STARTED_S
    while True:
        found: list[dict[str, Any]] = api.ask("GET", path).body["items"]
        if found and found[0].get("status", {}).get("phase") == phase:
            return found[0]
        assert time.monotonic() < end, found
        time.sleep(0.1)


def _remove(api: Api, made: tuple[Run, str]) -> None:
    wanted, _ = made
    name = wanted.made.name
    job = f"{jobs(wanted.ground.namespace)}/{name}?propagationPolicy=Background"
    assert api.ask("DELETE", job).status == 200
    path = core("configmaps", wanted.ground.namespace)
    assert api.ask("DELETE", f"{path}/{wanted.ground.supervisor}").status == 200


# --- the Role ---------------------------------------------------------------------------------------------------------


def test_rights_are_those_of_the_role(app: Api) -> None:
    """In the sandbox's namespace the credentials may do what cloche does, and in others what every account may."""
    assert _rules(app, NAMESPACE) - _rules(app, "default") == {
        *(("jobs", verb) for verb in ("create", "delete", "get", "list")),
        *(("configmaps", verb) for verb in ("create", "delete", "get", "list")),
        *(("pods", verb) for verb in ("get", "list", "watch")),
        ("pods/log", "get"),
        ("events", "list"),
    }
    everybody = {"selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews", "clustertrustbundles"}
    for namespace in ("default", APPLICATION):
        assert {resource for resource, _ in _rules(app, namespace)} <= everybody


def _rules(api: Api, namespace: str) -> set[tuple[str, str]]:
    path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    rules = api.ask("POST", path, review).body["status"]["resourceRules"]
    assert not any(rule.get("resourceNames") for rule in rules)
    return {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}


POD = f"{core('pods')}/any"
RBAC = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}"
REGISTRATION = "/apis/admissionregistration.k8s.io/v1"
FORBIDDEN = {
    "read a Secret": ("GET", f"{core('secrets')}/any"),
    "list Secrets": ("GET", core("secrets")),
    "watch Secrets": ("GET", f"{core('secrets')}?watch=true"),
    "make a Secret": ("POST", core("secrets")),
    "list the application's Secrets": ("GET", core("secrets", APPLICATION)),
    "list Secrets everywhere": ("GET", "/api/v1/secrets"),
    "list Jobs everywhere": ("GET", "/apis/batch/v1/jobs"),
    "list pods everywhere": ("GET", "/api/v1/pods"),
    "list another namespace's pods": ("GET", core("pods", "kube-system")),
    "read another namespace's log": ("GET", f"{core('pods', 'kube-system')}/any/log"),
    "list another namespace's ConfigMaps": ("GET", core("configmaps", "kube-system")),
    "list its own namespace's ConfigMaps": ("GET", core("configmaps", APPLICATION)),
    "make a Job in another namespace": ("POST", jobs("default")),
    "make a Job in its own namespace": ("POST", jobs(APPLICATION)),
    "list namespaces": ("GET", "/api/v1/namespaces"),
    "read its namespace": ("GET", f"/api/v1/namespaces/{NAMESPACE}"),
    "make a namespace": ("POST", "/api/v1/namespaces"),
    "take the labels off its namespace": ("PATCH", f"/api/v1/namespaces/{NAMESPACE}"),
    "list nodes": ("GET", "/api/v1/nodes"),
    "read a node": ("GET", "/api/v1/nodes/any"),
    "ask a node": ("GET", "/api/v1/nodes/any/proxy/pods"),
    "exec": ("POST", f"{POD}/exec?command=id&stdout=true"),
    "exec over a websocket": ("GET", f"{POD}/exec?command=id&stdout=true"),
    "attach": ("POST", f"{POD}/attach?stdout=true"),
    "attach over a websocket": ("GET", f"{POD}/attach?stdout=true"),
    "forward a port": ("POST", f"{POD}/portforward"),
    "forward a port over a websocket": ("GET", f"{POD}/portforward?ports=80"),
    "ask a pod": ("GET", f"{POD}/proxy/"),
    "add an ephemeral container": ("PATCH", f"{POD}/ephemeralcontainers"),
    "resize a pod": ("PATCH", f"{POD}/resize"),
    "make a pod": ("POST", core("pods")),
    "change a pod": ("PATCH", POD),
    "replace a pod": ("PUT", POD),
    "remove a pod": ("DELETE", POD),
    "remove all pods": ("DELETE", core("pods")),
    "evict a pod": ("POST", f"{POD}/eviction"),
    "bind a pod to a node": ("POST", f"{POD}/binding"),
    "say how a pod is": ("PATCH", f"{POD}/status"),
    "change a Job": ("PATCH", f"{jobs()}/any"),
    "replace a Job": ("PUT", f"{jobs()}/any"),
    "say how a Job is": ("PATCH", f"{jobs()}/any/status"),
    "remove all Jobs": ("DELETE", jobs()),
    "watch Jobs": ("GET", f"{jobs()}?watch=true"),
    "change a ConfigMap": ("PATCH", f"{core('configmaps')}/any"),
    "replace a ConfigMap": ("PUT", f"{core('configmaps')}/any"),
    "remove all ConfigMaps": ("DELETE", core("configmaps")),
    "watch ConfigMaps": ("GET", f"{core('configmaps')}?watch=true"),
    "watch Events": ("GET", f"{core('events')}?watch=true"),
    "make an Event": ("POST", core("events")),
    "make a token for the runner": ("POST", f"{core('serviceaccounts')}/{RUNNER}/token"),
    "make a token for itself": ("POST", f"{core('serviceaccounts', APPLICATION)}/{APPLICATION}/token"),
    "list service accounts": ("GET", core("serviceaccounts")),
    "make a service account": ("POST", core("serviceaccounts")),
    "make a CronJob": ("POST", jobs().replace("/jobs", "/cronjobs")),
    "make a Deployment": ("POST", f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"),
    "make a Service": ("POST", core("services")),
    "make a disk": ("POST", core("persistentvolumeclaims")),
    "read its Role": ("GET", f"{RBAC}/roles/cloche"),
    "change its Role": ("PATCH", f"{RBAC}/roles/cloche"),
    "bind another Role": ("POST", f"{RBAC}/rolebindings"),
    "make a ClusterRole": ("POST", "/apis/rbac.authorization.k8s.io/v1/clusterroles"),
    "raise the quota": ("PATCH", f"{core('resourcequotas')}/cloche-sandbox"),
    "remove the LimitRange": ("DELETE", f"{core('limitranges')}/cloche-sandbox"),
    "open the network": (
        "DELETE",
        f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies/cloche-sandbox-deny-all",
    ),
    "remove the policy": ("DELETE", f"{REGISTRATION}/validatingadmissionpolicies/{POLICY}"),
    "change the policy": ("PATCH", f"{REGISTRATION}/validatingadmissionpolicies/{POLICY}"),
    "remove its binding": ("DELETE", f"{REGISTRATION}/validatingadmissionpolicybindings/{POLICY}"),
    "remove the other policy": ("DELETE", f"{REGISTRATION}/validatingadmissionpolicies/{DELETION_POLICY}"),
    "change the other binding": ("PATCH", f"{REGISTRATION}/validatingadmissionpolicybindings/{DELETION_POLICY}"),
    "ask for a certificate": ("POST", "/apis/certificates.k8s.io/v1/certificatesigningrequests"),
}


@pytest.mark.parametrize(("method", "path"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_the_role_forbids(app: Api, method: str, path: str) -> None:
    """Each of these is refused to the credentials for want of a right, before anything else of the request is looked at."""
    answer = app.ask(method, path, {} if method in {"POST", "PATCH", "PUT"} else None)
    assert (answer.status, answer.body.get("reason")) == (403, "Forbidden"), answer.body
    assert f'User "system:serviceaccount:{APPLICATION}:{APPLICATION}" cannot' in answer.message


def test_nobody_can_be_impersonated(app: Api) -> None:
    """The credentials cannot speak for another user."""
    answer = app.ask("GET", core("secrets"), **{"Impersonate-User": "system:admin"})
    assert answer.status == 403
    assert "cannot impersonate" in answer.message


# --- what the policy admits -------------------------------------------------------------------------------------------

TOLERATION = {"key": "sandbox", "operator": "Exists", "effect": "NoSchedule"}
ADMITTED: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "an open network": {"network": Network.OPEN},
    "another image of the list": {"image": IMAGES[1]},
    "an image by its beginning": {"image": "cloche-test/below/some/thing:3"},
    "an image by its repository": {"image": "cloche-test/tags:3"},
    "an image by any digest": {"image": f"cloche-test/digests@{DIGEST}"},
    "users of its own": {"host_users": False},
    "a runtime class": {"runtime_class": "gvisor"},
    "a priority class": {"priority_class": "batch"},
    "a selector of nodes": {"node_selector": {"pool": "sandbox"}},
    "tolerations": {"tolerations": [TOLERATION]},
    "pull secrets": {"image_pull_secrets": ["registry"]},
    "labels": {"labels": {"team": "search"}},
    "an annotation of the list": {"annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}},
    "a lock's folder": {"place": "0123456789abcdef"},
}


@pytest.mark.parametrize("changes", ADMITTED.values(), ids=ADMITTED)
def test_admitted(app: Api, changes: dict[str, Any]) -> None:
    """Whatever cloche can be told to make is admitted, and as it was made: no default of the cluster's is put into its box."""
    body = run(**changes).job
    answer = app.ask("POST", jobs() + DRY, body)
    assert answer.status == 201, answer.body
    (made,), (found,) = (_pod_of(job)["spec"]["containers"] for job in (body, answer.body))
    assert {name: found[name] for name in made if name != "resources"} == {
        name: made[name] for name in made if name != "resources"
    }


def test_runs(app: Api) -> None:
    """A Job of cloche's shape runs under Role, policy, quota and Pod Security, and the cluster leaves its bounds alone."""
    made = _named("exec 2>&1; id -u; cat /run/cloche/bundle-00; echo; touch /output/x && touch /etc/x")
    _start(app, made)
    try:
        found = _wait(app, made, "Failed")
        said = app.log(NAMESPACE, found["metadata"]["name"]).splitlines()
    finally:
        _remove(app, made)
    assert said[:2] == ["1234567890", "delivered"]
    assert "/etc/x" in said[2]
    (box,) = found["spec"]["containers"]
    resources = _pod_of(made[0].job)["spec"]["containers"][0]["resources"]
    assert {kind: sorted(box["resources"][kind]) for kind in resources} == {
        "limits": ["cpu", "memory"],
        "requests": ["cpu", "memory"],
    }
    assert int(box["resources"]["limits"]["memory"]) == int(resources["limits"]["memory"])
    assert "kubernetes.io/limit-ranger" not in found["metadata"]["annotations"]


# --- what it refuses --------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A Job that is cloche's but for one thing."""

    says: str
    """Words of the one validation that is to refuse it."""
    changes: dict[str, Any]
    """By their path in the Job, where ``pod`` and ``box`` stand for what they are; None removes, ``+`` appends."""
    job_only: bool = False
    """Whether the pod that such a Job would make is harmless by itself."""


def _volume(kind: str, source: object) -> dict[str, Any]:
    return {"pod.spec.volumes.+": {"name": "another", kind: source}}


def _source(kind: str, source: object) -> dict[str, Any]:
    return {"pod.spec.volumes.0.projected.sources.+": {kind: source}}


def _mount(path: str, **more: Any) -> dict[str, Any]:
    return {"box.volumeMounts.+": {"name": "tmp", "mountPath": path, **more}}


def _inner(user: int, group: int) -> dict[str, Any]:
    return {
        "pod.spec.hostUsers": False,
        "pod.spec.securityContext.runAsUser": user,
        "pod.spec.securityContext.runAsGroup": group,
    }


ONE_RUN = "is one run of one pod"
ENDS = "ends and goes by itself"
LABELS = "lacks cloche's labels"
NOBODY = "is not nobody to the API server"
KIND = "mounts a volume of the kind "
SOURCE = "has a source of the kind "
DISK = "lies on the node's disk, or has no bound"
MOUNT = "is mounted in a way that cloche does not"
IMAGE = "is not on the list of the policy ("
ROOT = "may run as root"
RANGE = "runs as somebody outside the range of the policy"
ALONE = "would not end without its Job"
SCHEDULER = "asks for another scheduler"
FINALIZER = "has a finalizer"
TRACKING = ["batch.kubernetes.io/job-tracking"]
PLACES = "has the runtime make folders or files where it says"
POD_SETS = "The pod sets "
BOX_SETS = "The container sets "
POD_SECURITY = "The securityContext of the pod sets "
BOX_SECURITY = "The securityContext of the container sets "
BOUND = "has no bound, or takes what is none of a script's"
PRIVILEGED = "is privileged, or can become so"
CAPABILITIES = "has capabilities"
ANNOTATION = "has the annotation "
DOWNWARD = [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]
CLAIM = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
SHELL = {"exec": {"command": ["id"]}}
PRIVILEGES = {"privileged": True, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
REFUSED = {
    # The Job.
    "two pods at a time": Case(ONE_RUN, {"spec.parallelism": 2}, job_only=True),
    "two pods in turn": Case(ONE_RUN, {"spec.completions": 2}, job_only=True),
    "as many pods as it likes": Case(ONE_RUN, {"spec.completions": None}, job_only=True),
    "another try": Case(ONE_RUN, {"spec.backoffLimit": 1}, job_only=True),
    "indexed": Case(ONE_RUN, {"spec.completionMode": "Indexed"}, job_only=True),
    "a selector of its own": Case(
        ONE_RUN,
        {"spec.manualSelector": True, "spec.selector": {"matchLabels": {"cloche.dev/run": "run-attempt"}}},
        job_only=True,
    ),
    "no deadline": Case(ENDS, {"spec.activeDeadlineSeconds": None}, job_only=True),
    "a late deadline": Case(ENDS, {"spec.activeDeadlineSeconds": 172_801}, job_only=True),
    "kept": Case(ENDS, {"spec.ttlSecondsAfterFinished": None}, job_only=True),
    "kept for long": Case(ENDS, {"spec.ttlSecondsAfterFinished": 86_400}, job_only=True),
    "another controller": Case("The Job sets managedBy", {"spec.managedBy": "example.com/other"}, job_only=True),
    "not counted failures": Case(
        "The Job sets podFailurePolicy",
        {
            "spec.podFailurePolicy": {
                "rules": [{"action": "Ignore", "onExitCodes": {"operator": "In", "values": [1]}}],
            }
        },
        job_only=True,
    ),
    "no name": Case(LABELS, {"pod.metadata.labels.app\\.kubernetes\\.io/name": None}),
    "another manager": Case(LABELS, {"pod.metadata.labels.app\\.kubernetes\\.io/managed-by": "Helm"}),
    "no run": Case(LABELS, {"pod.metadata.labels.cloche\\.dev/run": None}),
    "no owner": Case(LABELS, {"pod.metadata.labels.cloche\\.dev/owner": None}),
    "no network": Case(LABELS, {"pod.metadata.labels.cloche\\.dev/network": None}),
    "any network": Case(LABELS, {"pod.metadata.labels.cloche\\.dev/network": "all"}),
    "other labels on the Job": Case(LABELS, {"metadata.labels": {"team": "search"}}, job_only=True),
    "another owner on the Job": Case(LABELS, {"metadata.labels.cloche\\.dev/owner": "somebody"}, job_only=True),
    "a finalizer": Case(FINALIZER, {"metadata.finalizers": ["example.com/keep"]}, job_only=True),
    "a finalizer of Kubernetes'": Case(FINALIZER, {"metadata.finalizers": ["foregroundDeletion"]}, job_only=True),
    "the pod's finalizer on the Job": Case(FINALIZER, {"metadata.finalizers": TRACKING}, job_only=True),
    "the pod's finalizer from the Job": Case(FINALIZER, {"pod.metadata.finalizers": TRACKING}, job_only=True),
    "a finalizer of the pod": Case(FINALIZER, {"pod.metadata.finalizers": ["example.com/keep"]}),
    "a finalizer beside the pod's": Case(FINALIZER, {"pod.metadata.finalizers": [*TRACKING, "example.com/keep"]}),
    "another network": Case(ANNOTATION, {"pod.metadata.annotations.k8s\\.v1\\.cni\\.cncf\\.io/networks": "other"}),
    "another hypervisor": Case(ANNOTATION, {"pod.metadata.annotations.io\\.katacontainers\\.config\\.x": "/bin/sh"}),
    "an annotation much like another": Case(ANNOTATION, {"pod.metadata.annotations.cloche\\.dev\\.example/x": "y"}),
    # The pod.
    "the host's network": Case(f"{POD_SETS}hostNetwork", {"pod.spec.hostNetwork": True}),
    "the host's processes": Case(f"{POD_SETS}hostPID", {"pod.spec.hostPID": True}),
    "the host's memory": Case(f"{POD_SETS}hostIPC", {"pod.spec.hostIPC": True}),
    "processes in common": Case(f"{POD_SETS}shareProcessNamespace", {"pod.spec.shareProcessNamespace": True}),
    "a node": Case(f"{POD_SETS}nodeName", {"pod.spec.nodeName": "node1"}),
    "names of hosts": Case(
        f"{POD_SETS}hostAliases", {"pod.spec.hostAliases": [{"ip": "10.0.0.1", "hostnames": ["x"]}]}
    ),
    "an init container": Case(
        f"{POD_SETS}initContainers", {"pod.spec.initContainers": [{"name": "first", "image": IMAGES[0]}]}
    ),
    "a device": Case(
        f"{POD_SETS}resourceClaims", {"pod.spec.resourceClaims": [{"name": "gpu", "resourceClaimName": "gpu"}]}
    ),
    "a subdomain": Case(f"{POD_SETS}subdomain", {"pod.spec.subdomain": "api"}),
    "affinity": Case(
        f"{POD_SETS}affinity",
        {
            "pod.spec.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "kubernetes.io/hostname", "namespaceSelector": {}, "labelSelector": {}}
            ]
        },
    ),
    "another service account": Case(NOBODY, {"pod.spec.serviceAccountName": "default"}),
    "no service account": Case(NOBODY, {"pod.spec.serviceAccountName": None}),
    "a token": Case(NOBODY, {"pod.spec.automountServiceAccountToken": True}),
    "a token by default": Case(NOBODY, {"pod.spec.automountServiceAccountToken": None}),
    "addresses of Services": Case("would be told of the namespace's Services", {"pod.spec.enableServiceLinks": None}),
    "begins again": Case("would live on", {"pod.spec.restartPolicy": "OnFailure"}),
    "ends late": Case("would live on", {"pod.spec.terminationGracePeriodSeconds": 3600}),
    "no deadline of the pod's": Case(ALONE, {"pod.spec.activeDeadlineSeconds": None}),
    "a late deadline of the pod's": Case(ALONE, {"pod.spec.activeDeadlineSeconds": 172_801}),
    "another scheduler": Case(SCHEDULER, {"pod.spec.schedulerName": "another"}),
    "before all others": Case(
        "asks for a priority class of the cluster's own", {"pod.spec.priorityClassName": "system-node-critical"}
    ),
    "the node's name servers": Case(
        "the node's own name servers", {"pod.spec.dnsPolicy": "Default", "pod.spec.dnsConfig": None}
    ),
    "root, perhaps": Case(ROOT, {"pod.spec.securityContext.runAsNonRoot": None}),
    "root": Case(ROOT, {"pod.spec.securityContext.runAsUser": 0}),
    "the image's user": Case(ROOT, {"pod.spec.securityContext.runAsUser": None}),
    "root's group": Case(ROOT, {"pod.spec.securityContext.runAsGroup": 0}),
    "the image's group": Case(ROOT, {"pod.spec.securityContext.runAsGroup": None}),
    "a user of the node's": Case(RANGE, {"pod.spec.securityContext.runAsUser": 999_999_999}),
    "a group of the node's": Case(RANGE, {"pod.spec.securityContext.runAsGroup": 999_999_999}),
    "a user above the range": Case(RANGE, {"pod.spec.securityContext.runAsUser": 2_000_000_000}),
    "a group above the range": Case(RANGE, {"pod.spec.securityContext.runAsGroup": 2_000_000_000}),
    "a user that an own namespace has not": Case(
        f"{RANGE}: its runAsUser and runAsGroup have to be within 1000 to 65535", _inner(65_536, 12_345)
    ),
    "a group that an own namespace has not": Case(RANGE, _inner(12_345, 65_536)),
    "a user of the image's in an own namespace": Case(RANGE, _inner(999, 12_345)),
    "a group of the image's in an own namespace": Case(RANGE, _inner(12_345, 999)),
    "a user that needs an own namespace": Case(RANGE, {**_inner(12_345, 12_345), "pod.spec.hostUsers": True}),
    "no seccomp": Case("filter of system calls", {"pod.spec.securityContext.seccompProfile": None}),
    "seccomp off": Case("filter of system calls", {"pod.spec.securityContext.seccompProfile.type": "Unconfined"}),
    "a seccomp of the node's": Case(
        "filter of system calls",
        {"pod.spec.securityContext.seccompProfile": {"type": "Localhost", "localhostProfile": "x.json"}},
    ),
    "AppArmor off": Case(
        f"{POD_SECURITY}appArmorProfile", {"pod.spec.securityContext.appArmorProfile": {"type": "Unconfined"}}
    ),
    "groups": Case(f"{POD_SECURITY}supplementalGroups", {"pod.spec.securityContext.supplementalGroups": [0]}),
    "a group of files": Case(f"{POD_SECURITY}fsGroup", {"pod.spec.securityContext.fsGroup": 0}),
    "SELinux": Case(f"{POD_SECURITY}seLinuxOptions", {"pod.spec.securityContext.seLinuxOptions": {"type": "spc_t"}}),
    "a kernel setting": Case(
        f"{POD_SECURITY}sysctls",
        {"pod.spec.securityContext.sysctls": [{"name": "kernel.shm_rmid_forced", "value": "1"}]},
    ),
    "Windows": Case(
        f"{POD_SECURITY}windowsOptions", {"pod.spec.securityContext.windowsOptions": {"runAsUserName": "admin"}}
    ),
    # Its volumes.
    "a Secret": Case(f"{KIND}secret", _volume("secret", {"secretName": "any"})),
    "a Secret that may be missing": Case(f"{KIND}secret", _volume("secret", {"secretName": "any", "optional": True})),
    "a path of the host": Case(f"{KIND}hostPath", _volume("hostPath", {"path": "/"})),
    "a disk": Case(f"{KIND}persistentVolumeClaim", _volume("persistentVolumeClaim", {"claimName": "any"})),
    "a disk as a device": Case(
        f"{KIND}persistentVolumeClaim",
        {
            **_volume("persistentVolumeClaim", {"claimName": "any"}),
            "box.volumeDevices": [{"name": "another", "devicePath": "/dev/x"}],
        },
    ),
    "a disk of its own": Case(f"{KIND}ephemeral", _volume("ephemeral", {"volumeClaimTemplate": {"spec": CLAIM}})),
    "a driver": Case(f"{KIND}csi", _volume("csi", {"driver": "secrets-store.csi.k8s.io", "readOnly": True})),
    "what the cluster says": Case(f"{KIND}downwardAPI", _volume("downwardAPI", {"items": DOWNWARD})),
    "an image": Case(f"{KIND}image", _volume("image", {"reference": "registry.example/any:1"})),
    "NFS": Case(f"{KIND}nfs", _volume("nfs", {"server": "10.0.0.1", "path": "/"})),
    "iSCSI": Case(
        f"{KIND}iscsi",
        _volume("iscsi", {"targetPortal": "10.0.0.1", "iqn": "iqn.2001-04.com.example:storage", "lun": 0}),
    ),
    "a ConfigMap by itself": Case(f"{KIND}configMap", _volume("configMap", {"name": "any"})),
    "a projected Secret": Case(f"{SOURCE}secret", _source("secret", {"name": "any"})),
    "a projected Secret that may be missing": Case(
        f"{SOURCE}secret", _source("secret", {"name": "any", "optional": True})
    ),
    "a projected token": Case(f"{SOURCE}serviceAccountToken", _source("serviceAccountToken", {"path": "token"})),
    "what the cluster says, projected": Case(f"{SOURCE}downwardAPI", _source("downwardAPI", {"items": DOWNWARD})),
    "a projected certificate": Case(
        f"{SOURCE}podCertificate",
        _source(
            "podCertificate",
            {
                "signerName": "example.com/x",
                "keyType": "ED25519",
                "credentialBundlePath": "x",
                "maxExpirationSeconds": 3600,
            },
        ),
    ),
    "a second projected volume": Case(
        f"{SOURCE}secret", _volume("projected", {"sources": [{"secret": {"name": "any"}}]})
    ),
    "the node's disk": Case(DISK, {"pod.spec.volumes.1.emptyDir.medium": None}),
    "huge pages": Case(DISK, {"pod.spec.volumes.1.emptyDir.medium": "HugePages"}),
    "memory without a bound": Case(DISK, {"pod.spec.volumes.1.emptyDir.sizeLimit": None}),
    "a volume elsewhere": Case(MOUNT, _mount("/etc")),
    "a part of a volume": Case(MOUNT, {"box.volumeMounts.2.subPath": "x"}),
    "a part by a variable": Case(MOUNT, {"box.volumeMounts.2.subPathExpr": "$(HOSTNAME)"}),
    "a volume that passes mounts on": Case(MOUNT, {"box.volumeMounts.2.mountPropagation": "HostToContainer"}),
    "a supervisor that can be changed": Case(MOUNT, {"box.volumeMounts.0.readOnly": None}),
    # Its container.
    "another name": Case("by the name of box", {"box.name": "main"}),
    "a second container": Case("by the name of box", {"pod.spec.containers.+": {"name": "other", "image": IMAGES[0]}}),
    "an image that is not listed": Case(IMAGE, {"box.image": "registry.example/any:1"}),
    "an image of the same beginning": Case(IMAGE, {"box.image": f"{IMAGES[0]}.example/any:1"}),
    "an image of the same end": Case(IMAGE, {"box.image": f"registry.example/{IMAGES[0]}"}),
    "an image in full": Case(IMAGE, {"box.image": f"docker.io/{IMAGES[0]}"}),
    "an image by digest": Case(IMAGE, {"box.image": f"{IMAGES[0]}@{DIGEST}"}),
    "a registry by the name of a repository": Case(IMAGE, {"box.image": "cloche-test/tags:5000/any:1"}),
    "another digest": Case(IMAGE, {"box.image": f"cloche-test/digests@sha512:{128 * '0'}"}),
    "a star that means nothing": Case(IMAGE, {"box.image": "cloche-test/slimmer"}),
    "a variable": Case(f"{BOX_SETS}env", {"box.env": [{"name": "A", "value": "b"}]}),
    "a variable from a Secret": Case(
        f"{BOX_SETS}env",
        {"box.env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "any", "key": "any", "optional": True}}}]},
    ),
    "variables from a Secret": Case(f"{BOX_SETS}envFrom", {"box.envFrom": [{"secretRef": {"name": "any"}}]}),
    "a port": Case(f"{BOX_SETS}ports", {"box.ports": [{"containerPort": 80}]}),
    "a port of the host": Case(f"{BOX_SETS}ports", {"box.ports": [{"containerPort": 80, "hostPort": 80}]}),
    "a hook": Case(f"{BOX_SETS}lifecycle", {"box.lifecycle": {"postStart": SHELL}}),
    "a hook at its end": Case(f"{BOX_SETS}lifecycle", {"box.lifecycle": {"preStop": SHELL}}),
    "a probe": Case(f"{BOX_SETS}livenessProbe", {"box.livenessProbe": SHELL}),
    "a probe from the node": Case(
        f"{BOX_SETS}readinessProbe", {"box.readinessProbe": {"httpGet": {"host": "169.254.169.254", "port": 80}}}
    ),
    "a terminal": Case(f"{BOX_SETS}tty", {"box.tty": True}),
    "stdin": Case(f"{BOX_SETS}stdin", {"box.stdin": True}),
    "arguments": Case(f"{BOX_SETS}args", {"box.args": ["more"]}),
    "begins again by itself": Case(f"{BOX_SETS}restartPolicy", {"box.restartPolicy": "Never"}),
    "another program": Case("does not begin with cloche's supervisor", {"box.command": ["sh", "run"]}),
    "the image's program": Case("does not begin with cloche's supervisor", {"box.command": None}),
    "the image's folder": Case(PLACES, {"box.workingDir": None}),
    "a folder that the runtime makes": Case(PLACES, {"box.workingDir": "/workspace/made"}),
    "a file that the node makes": Case(PLACES, {"box.terminationMessagePath": "/etc/passwd"}),
    "a file that is filled from its log": Case(PLACES, {"box.terminationMessagePolicy": "FallbackToLogsOnError"}),
    # The LimitRange would give them to the pod.
    "no limits": Case(BOUND, {"box.resources.limits": None}, job_only=True),
    "no limit for memory": Case(BOUND, {"box.resources.limits.memory": None}, job_only=True),
    "no limit for the processor": Case(BOUND, {"box.resources.limits.cpu": None}, job_only=True),
    "a limit that is none": Case(BOUND, {"box.resources.limits.memory": "0", "box.resources.requests.memory": "0"}),
    "something that is scarce": Case(
        BOUND, {"box.resources.limits.example\\.com/gpu": "1", "box.resources.requests.example\\.com/gpu": "1"}
    ),
    "privileges": Case(PRIVILEGED, {"box.securityContext": PRIVILEGES}),
    "privileges to gain": Case(PRIVILEGED, {"box.securityContext.allowPrivilegeEscalation": True}),
    "privileges to gain by default": Case(PRIVILEGED, {"box.securityContext.allowPrivilegeEscalation": None}),
    "a capability": Case(CAPABILITIES, {"box.securityContext.capabilities.add": ["NET_ADMIN"]}),
    "the runtime's capabilities": Case(CAPABILITIES, {"box.securityContext.capabilities": None}),
    "some capabilities": Case(CAPABILITIES, {"box.securityContext.capabilities.drop": ["NET_RAW"]}),
    "an image that can be written to": Case(
        "can write to its image's files", {"box.securityContext.readOnlyRootFilesystem": None}
    ),
    "root in the container": Case(f"{BOX_SECURITY}runAsUser", {"box.securityContext.runAsUser": 0}),
    "seccomp off in the container": Case(
        f"{BOX_SECURITY}seccompProfile", {"box.securityContext.seccompProfile": {"type": "Unconfined"}}
    ),
    "AppArmor off in the container": Case(
        f"{BOX_SECURITY}appArmorProfile", {"box.securityContext.appArmorProfile": {"type": "Unconfined"}}
    ),
    "SELinux in the container": Case(
        f"{BOX_SECURITY}seLinuxOptions", {"box.securityContext.seLinuxOptions": {"type": "spc_t"}}
    ),
    "all of /proc": Case(
        f"{BOX_SECURITY}procMount", {"box.securityContext.procMount": "Unmasked", **_inner(12_345, 12_345)}
    ),
}


def _changed(case: Case, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """cloche's Job, with the changes."""
    job = copy.deepcopy(run().job if body is None else body)
    for path, value in case.changes.items():
        _change(job, path, copy.deepcopy(value))
    return job


def _change(job: dict[str, Any], path: str, value: object) -> None:
    path = re.sub(r"^pod\.", "spec.template.", path)
    path = re.sub(r"^box\.", "spec.template.spec.containers.0.", path)
    *way, last = (step.replace("\\.", ".") for step in re.split(r"(?<!\\)\.", path))
    where: Any = job
    for step in way:
        key = int(step) if step.isdigit() else step
        try:
            where = where[key]
        except KeyError:
            where[key] = {}
            where = where[key]
    if last == "+":
        where.append(value)
    elif value is None:
        del where[last]
    else:
        where[last] = value


def _pod_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """The pod that the Job's controller would make of it."""
    template = job["spec"]["template"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "any", "uid": "any", "controller": True}
    metadata = {**template["metadata"], "name": "attempt", "ownerReferences": [owner]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _assert_policy_says(answer: Answer, words: str, policy: str = POLICY) -> None:
    assert answer.status == 422, answer.body
    if "privileged: Forbidden: disallowed by cluster policy" in answer.message:
        pytest.skip("the API server itself admits no privileged container (--allow-privileged)")
    assert f"ValidatingAdmissionPolicy '{policy}'" in answer.message
    assert words in answer.message


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(app: Api, case: Case) -> None:
    """A Job that differs from cloche's in this is refused when it is made, with the reason in words."""
    _assert_policy_says(app.ask("POST", jobs() + DRY, _changed(case)), case.says)


PODS = {name: case for name, case in REFUSED.items() if not case.job_only}


@pytest.mark.parametrize("case", PODS.values(), ids=PODS)
def test_refused_as_a_pod(admin: Api, case: Case) -> None:
    """So is the pod itself, whoever makes it: an administrator who says that it is a Job's, too."""
    answer = admin.ask("POST", core("pods") + DRY, _pod_of(_changed(case)))
    if "violates PodSecurity" in answer.message:  # it is asked before the policy
        assert answer.status == 403
    else:
        _assert_policy_says(answer, case.says)


def test_a_pod_alone(admin: Api) -> None:
    """A pod of cloche's shape is admitted as a Job's, with the finalizer of the Job's controller, and refused by itself."""
    body = _pod_of(run().job)
    assert admin.ask("POST", core("pods") + DRY, body).status == 201
    body["metadata"]["finalizers"] = TRACKING
    assert admin.ask("POST", core("pods") + DRY, body).status == 201
    del body["metadata"]["ownerReferences"]
    _assert_policy_says(admin.ask("POST", core("pods") + DRY, body), "is made by its Job")


SECURITY = run().job["spec"]["template"]["spec"]["containers"][0]["securityContext"]
LATER = {
    "an ephemeral container": (
        "/ephemeralcontainers",
        "spec.ephemeralContainers",
        [{"name": "look", "image": IMAGES[0], "securityContext": SECURITY}],
    ),
    "more of the processor": ("/resize", "spec.containers.0.resources.limits.cpu", "2"),
    "another image": ("", "spec.containers.0.image", IMAGES[1]),
    "another deadline": ("", "spec.activeDeadlineSeconds", 100),
    "more nodes": ("", "spec.tolerations.+", {"operator": "Exists"}),
    "another network": ("", "metadata.labels.cloche\\.dev/network", "open"),
}


@pytest.mark.parametrize(("below", "where", "value"), LATER.values(), ids=LATER)
def test_not_changed_later(admin: Api, pod: dict[str, Any], below: str, where: str, value: object) -> None:
    """A pod of the sandbox stays as it was made, also for an administrator."""
    body: dict[str, Any] = copy.deepcopy({"apiVersion": "v1", "kind": "Pod", **pod})
    del body["metadata"]["resourceVersion"]
    _change(body, where, value)
    answer = admin.ask("PUT", f"{core('pods')}/{pod['metadata']['name']}{below}{DRY}", body)
    _assert_policy_says(answer, "is not changed once it is made")


def test_no_other_job_later(admin: Api, pod: dict[str, Any]) -> None:
    """A Job that is there can be changed, as a queue does whose turn it is, but not into one of another shape."""
    name = pod["metadata"]["ownerReferences"][0]["name"]
    assert admin.ask("PATCH", f"{jobs()}/{name}{DRY}", {"spec": {"activeDeadlineSeconds": 100}}).status == 200
    answer = admin.ask("PATCH", f"{jobs()}/{name}{DRY}", {"spec": {"activeDeadlineSeconds": 200_000}})
    _assert_policy_says(answer, "ends and goes by itself")


def test_queued(app: Api, admin: Api) -> None:
    """A Job that a queue holds back is admitted, runs when the queue lets it go, on the nodes that the queue chooses, and not
    with what the policy forbids.
    """
    path = f"{jobs()}/{_hold(app)}"
    try:
        change = {"spec": {"suspend": False, "template": {"spec": {"nodeSelector": {"kubernetes.io/os": "linux"}}}}}
        assert admin.ask("PATCH", f"{path}{DRY}", change).status == 200
        change["spec"]["template"]["metadata"] = {"annotations": {"example.com/hypervisor": "none"}}  # type: ignore[index]
        _assert_policy_says(admin.ask("PATCH", f"{path}{DRY}", change), "annotation")
    finally:
        app.ask("DELETE", f"{path}?propagationPolicy=Background")


def _hold(api: Api, namespace: str = NAMESPACE) -> str:
    """Make a Job that a queue holds back: it has no pod."""
    wanted, _ = _named("", namespace=namespace)
    answer = api.ask("POST", jobs(namespace), _changed(Case("", {"spec.suspend": True}), wanted.job))
    assert answer.status == 201, answer.body
    return wanted.made.name


def test_controllers_can_finish(admin: Api, pod: dict[str, Any]) -> None:
    """What is said about a pod or a Job can be changed: else its finalizers would stay, and it with them."""
    change = {"metadata": {"finalizers": None, "annotations": {"example.com/seen": "yes"}, "labels": {"seen": "yes"}}}
    name = pod["metadata"]["name"]
    assert admin.ask("PATCH", f"{core('pods')}/{name}{DRY}", change).status == 200
    name = pod["metadata"]["ownerReferences"][0]["name"]
    assert admin.ask("PATCH", f"{jobs()}/{name}{DRY}", change).status == 200


# --- what may be removed, and how -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held(app: Api) -> Iterator[str]:
    """The path of a Job that has no pod."""
    path = f"{jobs()}/{_hold(app)}"
    yield path
    assert app.ask("DELETE", f"{path}?propagationPolicy=Background").status == 200


def _options(**more: object) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "DeleteOptions", **more}


LEAVING: dict[str, tuple[str, dict[str, Any] | None]] = {
    "no option": ("", None),
    "no option in the body": ("", _options()),
    "Orphan": ("?propagationPolicy=Orphan", None),
    "Orphan in the body": ("", _options(propagationPolicy="Orphan")),
    "Orphan in the body, which is what counts": ("?propagationPolicy=Background", _options(propagationPolicy="Orphan")),
    "the old option": ("?orphanDependents=true", None),
    "the old option in the body": ("", _options(orphanDependents=True)),
}
LEFT_BEHIND = "takes its pod and its ConfigMaps with it"


@pytest.mark.parametrize(("query", "body"), LEAVING.values(), ids=LEAVING)
def test_no_pod_is_left_behind(app: Api, admin: Api, held: str, query: str, body: dict[str, Any] | None) -> None:
    """A deletion that would leave a Job's pod behind is refused, also to an administrator, and says how to do it."""
    for api in (app, admin):
        answer = api.ask("DELETE", held + query, body)
        _assert_policy_says(answer, LEFT_BEHIND, DELETION_POLICY)
        assert "propagationPolicy Background or Foreground" in answer.message
    assert app.ask("GET", held).body["metadata"].get("deletionTimestamp") is None


@pytest.mark.parametrize("how", ["Background", "Foreground"])
def test_all_of_a_job_goes(app: Api, how: str) -> None:
    """The credentials delete a Job as cloche does, and the cluster removes its pod and its ConfigMaps."""
    made = _named("sleep 60")
    _start(app, made)
    try:
        _wait(app, made, "Running")
        assert [len(things) for things in _parts(app, made)] == [1, 1, 1]
        path = f"{jobs()}/{made[0].made.name}"
        assert app.ask("DELETE", path, _options(propagationPolicy=how)).status == 200
        _wait_gone(app, made)
    finally:
        app.ask("DELETE", f"{core('configmaps')}/{made[0].ground.supervisor}")


def test_an_ended_job_goes_by_itself(app: Api) -> None:
    """The cluster removes a Job whose time is over after its end, with all that belongs to it."""
    made = _named("exit 0")
    _start(app, made, _changed(Case("", {"spec.ttlSecondsAfterFinished": 0}), made[0].job))
    try:
        _wait_gone(app, made)
    finally:
        app.ask("DELETE", f"{core('configmaps')}/{made[0].ground.supervisor}")


def _parts(api: Api, made: tuple[Run, str]) -> list[list[dict[str, Any]]]:
    """The run's Jobs, pods and ConfigMaps."""
    query = f"?labelSelector=cloche.dev/run={made[0].profile.run_id}"
    return [api.ask("GET", path + query).body["items"] for path in (jobs(), core("pods"), core("configmaps"))]


def _wait_gone(api: Api, made: tuple[Run, str]) -> None:
    end = time.monotonic() + STARTED_S
    while any(found := _parts(api, made)):
        assert time.monotonic() < end, found
        time.sleep(0.1)


CONTROLLERS = {
    "system:serviceaccount:kube-system:generic-garbage-collector": True,
    "system:serviceaccount:kube-system:ttl-after-finished-controller": True,
    "system:serviceaccount:kube-system:namespace-controller": True,
    "system:kube-controller-manager": True,
    "system:serviceaccount:kube-systems:generic-garbage-collector": False,
    "system:serviceaccount:default:system:serviceaccount:kube-system:any": False,
    "system:kube-controller-managers": False,
    "system:kube-scheduler": False,
}


@pytest.mark.parametrize(("user", "free"), CONTROLLERS.items())
def test_only_controllers_are_free(admin: Api, held: str, user: str, free: bool) -> None:
    """The cluster's own controllers may remove what they want and how, and nobody whose name is much like theirs."""
    answer = _ask_as(admin, user, "DELETE", held + DRY, **{"Impersonate-Group": "system:masters"})
    if free:
        assert answer.status == 200, answer.body
    else:
        _assert_policy_says(answer, LEFT_BEHIND, DELETION_POLICY)


def _ask_as(admin: Api, user: str, method: str, path: str, **headers: str) -> Answer:
    return admin.ask(method, path, **{"Impersonate-User": user, **headers})


def test_a_pod_left_behind_ends(app: Api, admin: Api) -> None:
    """A pod that has lost its Job all the same, by a controller of the cluster's, ends at its own deadline."""
    made = _named("sleep 60")
    _start(app, made, _changed(Case("", {"pod.spec.activeDeadlineSeconds": 3}), made[0].job))
    try:
        _wait(app, made, "Running")
        path = f"{jobs()}/{made[0].made.name}?propagationPolicy=Orphan"
        masters = {"Impersonate-Group": "system:masters"}
        assert _ask_as(admin, "system:kube-controller-manager", "DELETE", path, **masters).status == 200
        found = _wait(app, made, "Failed")
        assert "ownerReferences" not in found["metadata"]
        assert found["status"]["reason"] == "DeadlineExceeded"
    finally:
        app.ask("DELETE", f"{jobs()}/{made[0].made.name}?propagationPolicy=Background")
        for kind in ("pods", "configmaps"):
            admin.ask("DELETE", f"{core(kind)}?labelSelector=cloche.dev/run={made[0].profile.run_id}")
        app.ask("DELETE", f"{core('configmaps')}/{made[0].ground.supervisor}")


SUPERVISOR_STAYS = "A supervisor is removed by those only who may change ConfigMaps"


def test_a_supervisor_stays(app: Api, admin: Api) -> None:
    """Who could not change a supervisor cannot delete it and put another into its place: neither the credentials, nor who may
    delete all ConfigMaps at once.
    """
    key = secrets.token_hex(6)
    name, other = (f"cloche-supervisor-{key}-{number}" for number in range(2))
    user = f"cloche-test-{key}"
    path, query = core("configmaps"), f"?labelSelector=cloche-test={key}"
    rules = [
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["delete", "deletecollection", "list"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["update"], "resourceNames": [other]},
    ]
    try:
        for each in (name, other):
            body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": each, "labels": {"cloche-test": key}}}
            assert app.ask("POST", path, body).status == 201
            _assert_policy_says(app.ask("DELETE", f"{path}/{each}"), SUPERVISOR_STAYS, DELETION_POLICY)
        for document in _rights(user, rules):
            _create(admin, document)
        end = time.monotonic() + STARTED_S
        while _ask_as(admin, user, "DELETE", f"{path}/{other}").status == 403:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert admin.ask("GET", f"{path}/{other}").status == 404
        for where in (f"{path}/{name}", path + query):
            _assert_policy_says(_ask_as(admin, user, "DELETE", where), SUPERVISOR_STAYS, DELETION_POLICY)
        assert admin.ask("GET", f"{path}/{name}").status == 200
        assert admin.ask("DELETE", path + query).status == 200
        assert admin.ask("GET", f"{path}/{name}").status == 404
    finally:
        admin.ask("DELETE", path + query)
        for kind in ("RoleBinding", "Role"):
            admin.ask("DELETE", f"{PATHS[kind].format(NAMESPACE)}/{user}")


def _rights(user: str, rules: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A Role of the sandbox's namespace, and its binding to somebody, both by the user's name."""
    group = "rbac.authorization.k8s.io"
    common = {"apiVersion": f"{group}/v1", "metadata": {"name": user, "namespace": NAMESPACE}}
    yield {**common, "kind": "Role", "rules": rules}
    yield {
        **common,
        "kind": "RoleBinding",
        "roleRef": {"apiGroup": group, "kind": "Role", "name": user},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    }


KEPT: dict[str, tuple[dict[str, Any], bool]] = {
    "cloche's by its label": ({"name": "attempt", "labels": {"app.kubernetes.io/managed-by": "cloche"}}, False),
    "cloche's by its name": ({"name": "cloche-attempt"}, False),
    "cloche's by a name to be": ({"generateName": "cloche-"}, False),
    "another": ({"name": "attempt"}, True),
}
STUCK = "The ConfigMap has a finalizer"


@pytest.mark.parametrize(("metadata", "anothers"), KEPT.values(), ids=KEPT)
def test_no_config_map_is_kept(app: Api, admin: Api, metadata: dict[str, Any], anothers: bool) -> None:
    """No ConfigMap of cloche's is made with a finalizer, and none at all by the credentials, which could not take it off."""
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
    path = core("configmaps") + DRY
    assert app.ask("POST", path, body).status == 201
    body["metadata"] = {**metadata, "finalizers": ["example.com/keep"]}
    _assert_policy_says(app.ask("POST", path, body), STUCK, DELETION_POLICY)
    answer = admin.ask("POST", path, body)
    if anothers:
        assert answer.status == 201, answer.body
    else:
        _assert_policy_says(answer, STUCK, DELETION_POLICY)


def test_a_namespace_can_be_deleted(admin: Api) -> None:
    """A namespace under both policies goes when it is deleted, with a Job and a supervisor that are in it."""
    namespace = f"cloche-test-guarded-{secrets.token_hex(4)}"
    bindings = f"{REGISTRATION}/validatingadmissionpolicybindings"
    try:
        for document in _unguarded(namespace):
            _create(admin, document)
        job = f"{jobs(namespace)}/{_hold(admin, namespace)}"
        body = manifest.supervisor_map("cloche-supervisor-0", b"any")
        assert admin.ask("POST", core("configmaps", namespace), body).status == 201
        for policy in (POLICY, DELETION_POLICY):
            binding = _policy(policy, "ValidatingAdmissionPolicyBinding")
            binding["metadata"]["name"] = f"{policy}-{namespace}"
            labels = binding["spec"]["matchResources"]["namespaceSelector"]["matchLabels"]
            labels["kubernetes.io/metadata.name"] = namespace
            assert admin.ask("POST", bindings, binding).status == 201
        end = time.monotonic() + STARTED_S
        while (answer := admin.ask("DELETE", job + DRY)).status == 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        _assert_policy_says(answer, LEFT_BEHIND, DELETION_POLICY)
        assert admin.ask("DELETE", f"/api/v1/namespaces/{namespace}").status == 200
        while admin.ask("GET", f"/api/v1/namespaces/{namespace}").status != 404:
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        for policy in (POLICY, DELETION_POLICY):
            admin.ask("DELETE", f"{bindings}/{policy}-{namespace}")
        admin.ask("DELETE", f"/api/v1/namespaces/{namespace}")


# --- that it is the policies, and all of them -------------------------------------------------------------------------


def test_without_the_policy_a_secret_is_printed(app: Api, admin: Api) -> None:
    """With the same Role in a namespace without the policy, a Job mounts a Secret and prints it: nothing else refuses it."""
    namespace = f"cloche-test-unguarded-{secrets.token_hex(4)}"
    made = _named("cat /run/cloche/password", namespace=namespace)
    job = _changed(Case("", _source("secret", {"name": "database"})), made[0].job)
    try:
        for document in _unguarded(namespace):
            _create(admin, document)
        _create(
            admin,
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "database", "namespace": namespace},
                "stringData": {"password": "hunter2"},
            },
        )
        _wait_for_role(app, namespace)
        assert app.ask("GET", f"{core('secrets', namespace)}/database").status == 403
        _start(app, made, job)
        found = _wait(app, made, "Succeeded")
        assert app.log(namespace, found["metadata"]["name"]) == "hunter2"
    finally:
        admin.ask("DELETE", f"/api/v1/namespaces/{namespace}")
    _assert_policy_says(app.ask("POST", jobs(), job | {"metadata": {"name": "attempt"}}), "")


PATHS = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
}


def _unguarded(namespace: str) -> Iterator[dict[str, Any]]:
    """The manifests' namespace, runner and Role, under another name."""
    for file in ("namespace.yaml", "service-account.yaml", "role.yaml"):
        for document in yaml.safe_load_all((deployment.MANIFESTS / file).read_text()):
            key = "name" if document["kind"] == "Namespace" else "namespace"
            document["metadata"][key] = namespace
            yield document


def _create(admin: Api, document: dict[str, Any]) -> None:
    answer = admin.ask("POST", PATHS[document["kind"]].format(document["metadata"].get("namespace")), document)
    assert answer.status == 201, answer.body


def _wait_for_role(app: Api, namespace: str) -> None:
    end = time.monotonic() + STARTED_S
    while app.ask("GET", jobs(namespace)).status != 200:
        assert time.monotonic() < end
        time.sleep(0.05)


FILES = {POLICY: "admission-policy.yaml", DELETION_POLICY: "deletion-policy.yaml"}


def _policy(name: str, kind: str = "ValidatingAdmissionPolicy") -> dict[str, Any]:
    documents = yaml.safe_load_all((deployment.MANIFESTS / FILES[name]).read_text())
    found: dict[str, Any] = next(document for document in documents if document["kind"] == kind)
    return found


def test_every_validation_is_attempted() -> None:
    """There is an attempt in this file for every validation of the policies, and it asks for that one's words."""
    words = {case.says for case in REFUSED.values()} | {"is made by its Job", "is not changed once it is made"}
    words |= {LEFT_BEHIND, SUPERVISOR_STAYS, STUCK}
    missing: list[str] = []
    for validation in [each for name in FILES for each in _policy(name)["spec"]["validations"]]:
        said = f"{validation['message']} {validation.get('messageExpression', '')}".replace("\\'", "'")
        if not any(said.count(_literal(word)) for word in words):
            missing.append(validation["message"])
    assert not missing


def _literal(words: str) -> str:
    """Without the name of a field, which the policy adds."""
    for start in (POD_SETS, BOX_SETS, POD_SECURITY, BOX_SECURITY, KIND, SOURCE, RANGE, "The Job sets "):
        if words.startswith(start):
            return start
    return words


@pytest.mark.parametrize("policy", FILES)
def test_the_cluster_understands_the_policy(admin: Api, policy: str) -> None:
    """The cluster finds no fault in any expression of the policy."""
    path = f"{REGISTRATION}/validatingadmissionpolicies/{policy}"
    end = time.monotonic() + STARTED_S
    while True:  # a controller looks at it, by and by
        found = admin.ask("GET", path).body
        if found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]:
            break
        assert time.monotonic() < end
        time.sleep(0.1)
    assert found["status"]["typeChecking"] == {}


# --- the network ------------------------------------------------------------------------------------------------------

PRIVATE = (
    "10.96.0.1 100.100.100.200 127.0.0.1 168.63.129.16 169.254.169.254 172.31.0.2 192.168.0.1 fd00:ec2::254 fe80::1 ::1"
    " 64:ff9b::a9fe:a9fe"
)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_an_open_network_leaves_out(admin: Api, address: str) -> None:
    """The rules for an open network leave out what is the cluster's, the cloud's and the node's."""
    assert not _reached(admin, address)


def test_an_open_network_reaches_the_internet_only(admin: Api) -> None:
    """They let through public addresses, and not those of this cluster's own API server and nodes."""
    assert all(_reached(admin, address) for address in ("1.1.1.1", "93.184.215.14", "2606:4700:4700::1111"))
    path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes"
    own = {address for endpoint in admin.ask("GET", path).body["endpoints"] for address in endpoint["addresses"]}
    nodes = admin.ask("GET", "/api/v1/nodes").body["items"]
    own |= {each["address"] for node in nodes for each in node["status"]["addresses"] if each["type"] == "InternalIP"}
    assert own
    # The manifest says what to add for one that is public.
    assert {address for address in own if _reached(admin, address)} <= {
        address for address in own if ipaddress.ip_address(address).is_global
    }


def _reached(admin: Api, address: str) -> bool:
    """Whether some rule of the network policies lets a pod with an open network send there, by its address."""
    path = f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies"
    rules = [rule for policy in admin.ask("GET", path).body["items"] for rule in policy["spec"].get("egress", [])]
    blocks = [peer["ipBlock"] for rule in rules for peer in rule["to"] if "ipBlock" in peer]
    return any(
        _within(address, block["cidr"]) and not any(_within(address, each) for each in block["except"])
        for block in blocks
    )


def _within(address: str, network: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(network)


def test_no_network_for_anybody(admin: Api) -> None:
    """One network policy chooses every pod of the namespace, and lets nothing in or out; none lets anything in."""
    path = f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies"
    specs = [policy["spec"] for policy in admin.ask("GET", path).body["items"]]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in specs
    assert not any(spec.get("ingress") for spec in specs)
    selectors = [spec["podSelector"] for spec in specs if spec.get("egress")]
    assert selectors == [{"matchLabels": {"cloche.dev/network": "open"}}]
