"""What a Job and its ConfigMaps are made of."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest

from cloche.backends import shape
from cloche.backends.contract import Profile
from cloche.backends.kubernetes import manifest
from cloche.backends.kubernetes.manifest import Ground, Made
from cloche.errors import WorkspaceTooLarge
from cloche.spec import Limits, Network

GROUND = Ground("boxes", "cloche-supervisor-0", "x86_64", "runner", place="here")
MADE = Made("cloche-r1-00000000", 1234, 2000.5, 180.2)
PROFILE = Profile("r1", "o1", 2000.5, Limits(), bundle_bytes=10 * 2**20, delivery_bytes=100)


def body(profile: Profile = PROFILE, ground: Ground = GROUND) -> dict[str, Any]:
    return manifest.job(profile, ground, MADE)


def pod(profile: Profile = PROFILE, ground: Ground = GROUND) -> dict[str, Any]:
    found: dict[str, Any] = body(profile, ground)["spec"]["template"]["spec"]
    return found


def container(profile: Profile = PROFILE, ground: Ground = GROUND) -> dict[str, Any]:
    (found,) = pod(profile, ground)["containers"]
    return dict(found)


def test_hardened() -> None:
    """The pod is one that `restricted` admits: no user 0, no capability and no way to gain any, a filter, a root to read."""
    made = pod()
    assert made["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1234,
        "runAsGroup": 1234,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
    }
    assert made["automountServiceAccountToken"] is False
    assert made["enableServiceLinks"] is False
    assert not made.keys() & {
        "hostNetwork",
        "hostPID",
        "hostIPC",
        "hostAliases",
        "initContainers",
        "shareProcessNamespace",
    }
    assert not container().keys() & {"env", "envFrom", "args", "lifecycle", "ports", "tty", "stdin"}
    volumes = {volume["name"]: next(kind for kind in volume if kind != "name") for volume in made["volumes"]}
    assert set(volumes.values()) == {"projected", "emptyDir"}
    assert "hostPath" not in json.dumps(body())


def test_once() -> None:
    """The pod runs once and is never made again, ends at its expiry, and goes some time after its end."""
    spec = body()["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (1, 1, 0)
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["activeDeadlineSeconds"] == 181
    assert spec["ttlSecondsAfterFinished"] == manifest.TTL_S


@pytest.mark.parametrize("deadline_s", [-5.0, 0.0, 0.2])
def test_deadline_that_has_passed(deadline_s: float) -> None:
    """A deadline is at least a second: the API server takes no other."""
    made = manifest.job(PROFILE, GROUND, replace(MADE, deadline_s=deadline_s))
    assert made["spec"]["activeDeadlineSeconds"] == 1


def test_supervisor() -> None:
    """The container starts the supervisor, which needs Landlock, bounds processes, and finds its bundle."""
    command = container()["command"]
    assert command[:3] == [shape.SUPERVISOR, "run", "--need-landlock"]
    assert command[command.index("--nproc") + 1] == str(PROFILE.limits.pids)
    assert command[command.index("--fsize") + 1] == str(shape.file_size_limit_bytes(PROFILE.limits))
    assert command[command.index("--bundle") + 1] == "/run/cloche/bundle-00"


def test_network() -> None:
    """Without a network the supervisor allows local sockets alone, and the pod has nobody to ask for names; the label says which
    it is.
    """
    closed, opened = PROFILE, replace(PROFILE, network=Network.OPEN)
    assert container(closed)["command"][-4:-2] == ["--sockets", "unix"]
    assert "--sockets" not in container(opened)["command"]
    assert (pod(closed)["dnsPolicy"], pod(closed)["dnsConfig"]) == ("None", {"nameservers": ["127.0.0.1"]})
    assert not pod(opened).keys() & {"dnsPolicy", "dnsConfig"}
    for profile, name in ((closed, "none"), (opened, "open")):
        assert body(profile)["spec"]["template"]["metadata"]["labels"]["cloche.dev/network"] == name


@pytest.mark.parametrize(
    ("cpus", "asked", "limit", "request_"),
    [(1.0, 0.05, "1000m", "50m"), (0.01, 0.05, "10m", "10m"), (0.0001, 4.0, "1m", "1m")],
)
def test_cpus(cpus: float, asked: float, limit: str, request_: str) -> None:
    """What is requested is never more than the limit, and never nothing."""
    found = container(replace(PROFILE, limits=Limits(cpus=cpus)), replace(GROUND, cpu_request=asked))["resources"]
    assert (found["limits"]["cpu"], found["requests"]["cpu"]) == (limit, request_)


@pytest.mark.parametrize("asked", [1, 64 * 2**20, 2**40])
def test_memory(asked: int) -> None:
    """The limit has room for the script, its bundle and its guard; what is requested is never more."""
    found = container(PROFILE, replace(GROUND, memory_request=asked))["resources"]
    limit = int(found["limits"]["memory"])
    assert limit == shape.memory_limit_bytes(PROFILE) > PROFILE.limits.memory_bytes + PROFILE.bundle_bytes
    assert int(found["requests"]["memory"]) == min(asked, limit)


def test_volumes() -> None:
    """All that can be written is in memory and bounded, and mounted where it belongs; the supervisor's folder is read-only."""
    mounts = {mount["mountPath"]: mount for mount in container()["volumeMounts"]}
    assert set(mounts) == {shape.SUPERVISOR_FOLDER, shape.WORKSPACE, *shape.WRITABLES}
    assert mounts[shape.SUPERVISOR_FOLDER]["readOnly"] is True
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert len(volumes) == len(mounts)
    for path in (shape.WORKSPACE, *shape.WRITABLES):
        medium = volumes[mounts[path]["name"]]["emptyDir"]
        assert medium["medium"] == "Memory"
        size = shape.workspace_bytes(PROFILE) if path == shape.WORKSPACE else shape.writable_bytes(PROFILE.limits)
        assert medium["sizeLimit"] == str(size)


def test_settings() -> None:
    """What the settings ask for stands in the pod, and only what they ask for."""
    plain = pod()
    assert not plain.keys() & {"hostUsers", "runtimeClassName", "priorityClassName", "tolerations", "imagePullSecrets"}
    ground = replace(
        GROUND,
        host_users=False,
        runtime_class="gvisor",
        priority_class="low",
        tolerations=[{"key": "a", "operator": "Exists"}],
        image_pull_secrets=["s1", "s2"],
        node_selector={"pool": "boxes", "kubernetes.io/arch": "riscv"},
        pull_policy="Always",
    )
    made = pod(ground=ground)
    assert (made["hostUsers"], made["runtimeClassName"], made["priorityClassName"]) == (False, "gvisor", "low")
    assert made["tolerations"] == [{"key": "a", "operator": "Exists"}]
    assert made["imagePullSecrets"] == [{"name": "s1"}, {"name": "s2"}]
    assert made["nodeSelector"] == {"pool": "boxes", "kubernetes.io/arch": "amd64"}
    assert container(ground=ground)["imagePullPolicy"] == "Always"
    assert made["serviceAccountName"] == "runner"


def test_labels() -> None:
    """cloche's own labels and annotations are on all that is made for a run, and nobody else's replaces them."""
    ground = replace(
        GROUND, labels={"cloche.dev/run": "x", "team": "a"}, annotations={"cloche.dev/expires": "9", "b": "c"}
    )
    (part,) = manifest.bundle_maps(PROFILE, ground, MADE, "uid", b"x")
    made = body(ground=ground)
    for thing in (made, made["spec"]["template"], part):
        assert (
            thing["metadata"]["labels"].items()
            >= {"cloche.dev/run": "r1", "cloche.dev/owner": "o1", "team": "a"}.items()
        )
        assert thing["metadata"]["annotations"] == {"cloche.dev/expires": "2000", "cloche.dev/place": "here", "b": "c"}
    without = body(ground=replace(GROUND, place=None))["metadata"]["annotations"]
    assert without == {"cloche.dev/expires": "2000"}


@pytest.mark.parametrize(
    ("size", "number"), [(0, 1), (1, 1), (10**6, 1), (10**6 + 1, 2), (2 * 10**6, 2), (60 * 10**6, 60)]
)
def test_parts(size: int, number: int) -> None:
    """A bundle has as many parts as its size needs, and one when it is empty; Job and ConfigMaps agree on their names."""
    profile = replace(PROFILE, delivery_bytes=size)
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    parts = list(manifest.bundle_maps(profile, GROUND, MADE, "uid", data))
    assert len(parts) == manifest.chunks(size) == number
    assert b"".join(base64.b64decode(part["binaryData"]["bundle"]) for part in parts) == data
    sources = pod(profile)["volumes"][0]["projected"]["sources"]
    assert [source["configMap"]["name"] for source in sources[1:]] == [part["metadata"]["name"] for part in parts]
    assert container(profile)["command"].count("--bundle") == number
    for part in parts:
        assert part["immutable"] is True
        assert len(base64.b64decode(part["binaryData"]["bundle"])) <= manifest.MAX_CONFIG_MAP_BYTES
        assert part["metadata"]["ownerReferences"] == [
            {"apiVersion": "batch/v1", "kind": "Job", "name": MADE.name, "uid": "uid"}
        ]


def test_too_many_parts() -> None:
    """What does not fit into the ConfigMaps that a supervisor reads is refused before anything is made."""
    profile = replace(PROFILE, delivery_bytes=60 * 10**6 + 1)
    with pytest.raises(WorkspaceTooLarge):
        body(profile)


def test_fewer_bytes_than_said() -> None:
    """A bundle that is smaller than was said has all its parts, of which the last are empty: the pod waits for every one."""
    profile = replace(PROFILE, delivery_bytes=3 * 10**6)
    parts = list(manifest.bundle_maps(profile, GROUND, MADE, "uid", b"abc"))
    assert [base64.b64decode(part["binaryData"]["bundle"]) for part in parts] == [b"abc", b"", b""]


def test_names_fit() -> None:
    """The longest run id that there may be makes names and labels that Kubernetes takes."""
    name = f"cloche-{'r' * 32}-01234567"
    assert len(manifest.chunk_name(name, 59)) <= 63
    assert len(name) + len("-abcde") <= 63, "the controller's pod has five more letters"


def test_supervisor_map() -> None:
    """The supervisor's ConfigMap is no run's: it has no owner, no time and a label that says what it is."""
    made = manifest.supervisor_map("cloche-supervisor-0", b"\x7fELF")
    assert made["immutable"] is True
    assert made["metadata"] == {
        "name": "cloche-supervisor-0",
        "labels": {
            "app.kubernetes.io/name": "cloche",
            "app.kubernetes.io/managed-by": "cloche",
            "cloche.dev/supervisor": "true",
        },
    }
    assert base64.b64decode(made["binaryData"]["supervisor"]) == b"\x7fELF"
    (item,) = pod()["volumes"][0]["projected"]["sources"][0]["configMap"]["items"]
    assert (item["key"], item["path"], item["mode"]) == ("supervisor", "supervisor", 0o555)
