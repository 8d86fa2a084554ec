"""Profile → the Job and its ConfigMaps. Pure.

Nothing of the script stands in the Job: whoever may list Jobs sees limits, labels and the supervisor's options. The script, its
arguments, environment and stdin are the bundle, which travels in ConfigMaps as bytes, so that nothing of it passes a shell or
Kubernetes' own expansion of ``$(VAR)``.

The pod is admitted under the ``restricted`` Pod Security Standard (kubernetes.io, "Pod Security Standards"). So the supervisor
has no capability and the script's own uid: it is protected as PID 1, by its filter, and by not being dumpable, and it is
Landlock that keeps /workspace read-only. Without Landlock a run is refused.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloche.backends import shape
from cloche.backends.contract import Profile
from cloche.backends.kubernetes import names
from cloche.errors import WorkspaceTooLarge
from cloche.spec import Network

CHUNK_BYTES = 1_000_000
"""Of the bundle, in one ConfigMap; the API server takes 1 MiB (core/v1, MaxSecretSize)."""
MAX_CONFIG_MAP_BYTES = 2**20
MAX_CHUNKS = 60
"""The supervisor takes 64 names."""
TTL_S = 120
"""For so long a Job that has ended is kept when its client is dead: enough for one that only lost its connection to come back
and read the log."""
TERMINATION_GRACE_S = 1
"""The supervisor needs its own grace (0.3 s). With the default of 30 s a cancelled run lives on for so long; with 0 the API
server forgets the pod before the node has ended it."""
_BUNDLE_KEY = "bundle"
_SUPERVISOR_KEY = "supervisor"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Ground:
    """What of the settings and the cluster goes into every Job."""

    namespace: str
    supervisor: str
    """The name of the ConfigMap that holds it."""
    machine: str
    """The architecture of that supervisor: x86_64 or aarch64."""
    service_account: str
    place: str | None = None
    pull_policy: str = "IfNotPresent"
    cpu_request: float = 0.05
    memory_request: int = 64 * 2**20
    host_users: bool = True
    runtime_class: str | None = None
    priority_class: str | None = None
    node_selector: Mapping[str, str] | None = None
    tolerations: Sequence[Mapping[str, Any]] = ()
    image_pull_secrets: Sequence[str] = ()
    labels: Mapping[str, str] | None = None
    annotations: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """A Job that is about to be made, with the names that go with it. ``deadline_s`` is from its creation to its expiry;
    ``expires_at`` is by the API server's clock.
    """

    name: str
    run_as: int
    """The script's user and group."""
    expires_at: float
    deadline_s: float


def chunks(bundle_bytes: int) -> int:
    """How many ConfigMaps a bundle of so many bytes takes.

    Raises:
        WorkspaceTooLarge: more than there may be.
    """
    number = max(1, math.ceil(bundle_bytes / CHUNK_BYTES))
    if number > MAX_CHUNKS:
        raise WorkspaceTooLarge(
            f"The run would deliver {bundle_bytes} bytes, and a cluster takes {MAX_CHUNKS * CHUNK_BYTES} of a run, names of"
            " files and arguments included.",
            hint="Deliver less: only what the script reads.",
        )
    return number


def chunk_name(job: str, index: int) -> str:
    """The name of the ConfigMap with that part of the bundle."""
    return f"{job}-{index:02d}"


def labels(profile: Profile, ground: Ground) -> dict[str, str]:
    """Of everything that is made for a run. What the settings add does not replace cloche's own."""
    return {
        **(ground.labels or {}),
        **names.COMMON_LABELS,
        names.LABEL_RUN: profile.run_id,
        names.LABEL_OWNER: profile.owner,
    }


def notes(ground: Ground, expires_at: float) -> dict[str, str]:
    """The annotations of the same."""
    found = {**(ground.annotations or {}), names.EXPIRES: str(int(expires_at))}
    return found if ground.place is None else {**found, names.PLACE: ground.place}


def job(profile: Profile, ground: Ground, made: Made) -> dict[str, Any]:
    """The body of ``POST …/jobs``."""
    theirs = labels(profile, ground)
    metadata = {"annotations": notes(ground, made.expires_at)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": made.name, "labels": theirs, **metadata},
        "spec": {
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": 0,
            "activeDeadlineSeconds": max(1, math.ceil(made.deadline_s)),
            "ttlSecondsAfterFinished": TTL_S,
            "template": {
                "metadata": {"labels": {**theirs, names.LABEL_NETWORK: str(profile.network)}, **metadata},
                "spec": _pod(profile, ground, made),
            },
        },
    }


def _pod(profile: Profile, ground: Ground, made: Made) -> dict[str, Any]:
    number = chunks(profile.delivery_bytes)
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        # The Job's deadline too: of a pod that has lost its Job there would be none.
        "activeDeadlineSeconds": max(1, math.ceil(made.deadline_s)),
        "serviceAccountName": ground.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": TERMINATION_GRACE_S,
        "hostname": shape.HOSTNAME,
        "nodeSelector": {**(ground.node_selector or {}), "kubernetes.io/arch": _ARCHITECTURES[ground.machine]},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": made.run_as,
            "runAsGroup": made.run_as,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(profile, ground, number)],
        "volumes": _volumes(profile, ground, made.name, number),
    }
    if profile.network is Network.NONE:
        # Nothing to ask, and nobody: else the node's own search domains stand in the box.
        spec |= {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["127.0.0.1"]}}
    if not ground.host_users:
        spec["hostUsers"] = False
    if ground.runtime_class is not None:
        spec["runtimeClassName"] = ground.runtime_class
    if ground.priority_class is not None:
        spec["priorityClassName"] = ground.priority_class
    if ground.tolerations:
        spec["tolerations"] = [dict(toleration) for toleration in ground.tolerations]
    if ground.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in ground.image_pull_secrets]
    return spec


def _container(profile: Profile, ground: Ground, number: int) -> dict[str, Any]:
    limits = profile.limits
    memory = shape.memory_limit_bytes(profile)
    cpu_m = max(1, round(limits.cpus * 1000))
    return {
        "name": names.CONTAINER,
        "image": profile.image,
        "imagePullPolicy": ground.pull_policy,
        "command": _supervisor(profile, number),
        "workingDir": "/",
        "resources": {
            "limits": {"cpu": f"{cpu_m}m", "memory": str(memory)},
            "requests": {
                "cpu": f"{max(1, min(cpu_m, round(ground.cpu_request * 1000)))}m",
                "memory": str(min(memory, ground.memory_request)),
            },
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            {"name": "cloche", "mountPath": shape.SUPERVISOR_FOLDER, "readOnly": True},
            *({"name": _volume_name(path), "mountPath": path} for path in (shape.WORKSPACE, *shape.WRITABLES)),
        ],
    }


def _supervisor(profile: Profile, number: int) -> list[str]:
    command = [shape.SUPERVISOR, "run", "--need-landlock"]
    # The kernel counts processes by uid, and the uid is this box's alone. The supervisor is one, and so is the process that
    # holds the pod's namespaces.
    command += ["--nproc", str(profile.limits.pids)]
    command += ["--fsize", str(shape.file_size_limit_bytes(profile.limits))]
    if profile.network is Network.NONE and not profile.sockets:
        command += ["--sockets", "unix"]  # a NetworkPolicy takes hold only after a pod has started, if at all
    for index in range(number):
        command += ["--bundle", f"{shape.SUPERVISOR_FOLDER}/{_bundle_path(index)}"]
    return command


def _bundle_path(index: int) -> str:
    return f"bundle-{index:02d}"


def _volume_name(path: str) -> str:
    return path.strip("/").replace("/", "-")


def _volumes(profile: Profile, ground: Ground, name: str, number: int) -> list[dict[str, Any]]:
    each = shape.writable_bytes(profile.limits)
    sizes = dict.fromkeys(shape.WRITABLES, each) | {shape.WORKSPACE: shape.workspace_bytes(profile)}
    program = {"key": _SUPERVISOR_KEY, "path": shape.SUPERVISOR.rpartition("/")[2], "mode": 0o555}
    sources = [{"configMap": {"name": ground.supervisor, "items": [program]}}]
    for index in range(number):
        item = {"key": _BUNDLE_KEY, "path": _bundle_path(index)}
        sources.append({"configMap": {"name": chunk_name(name, index), "items": [item]}})
    # One volume for all of them: the kubelet mounts it at one go.
    found: list[dict[str, Any]] = [{"name": "cloche", "projected": {"defaultMode": 0o444, "sources": sources}}]
    for path, size in sizes.items():
        found.append({"name": _volume_name(path), "emptyDir": {"medium": "Memory", "sizeLimit": str(size)}})
    return found


def bundle_maps(profile: Profile, ground: Ground, made: Made, job_uid: str, data: bytes) -> Iterator[dict[str, Any]]:
    """The bodies of ``POST …/configmaps`` for a bundle: as many as its Job names, whatever its size.

    They belong to the Job: with it they go, whoever is there to remove them.
    """
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": made.name, "uid": job_uid}
    for index in range(chunks(profile.delivery_bytes)):
        part = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        yield {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": chunk_name(made.name, index),
                "labels": labels(profile, ground),
                "annotations": notes(ground, made.expires_at),
                "ownerReferences": [owner],
            },
            "immutable": True,  # the kubelet then does not watch it
            "binaryData": {_BUNDLE_KEY: base64.b64encode(part).decode()},
        }


def supervisor_map(name: str, program: bytes) -> dict[str, Any]:
    """The body for the ConfigMap that holds a supervisor."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": {**names.COMMON_LABELS, names.LABEL_SUPERVISOR: "true"}},
        "immutable": True,
        "binaryData": {_SUPERVISOR_KEY: base64.b64encode(program).decode()},
    }
