"""The doctor before a real cluster: healthy, with pods that somebody weakens as they are made, and with and without a wall
between pods.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests import clusters
from tests.doctor.admission import Patch, changing, namespace
from tests.doctor.ask import broken, doctor, states
from tests.kubernetes import deployment
from tests.kubernetes.deployment import Api
from tests.modes import ready

from cloche.testing.conformance import Target, absent

BOX, POD = "/spec/containers/0", "/spec"
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
WEAK: Mapping[str, tuple[Sequence[Patch], set[str], str]] = {
    "privileged": (
        [
            ("replace", f"{BOX}/securityContext/privileged", True),
            ("replace", f"{BOX}/securityContext/allowPrivilegeEscalation", True),
        ],
        # The supervisor has no right of its own there, so what the engine gives stays in the bounding set.
        {"engine-call-filter", "kernel-files", "devices", "no-capabilities"},
        "none",
    ),
    "no seccomp": (
        [("replace", f"{POD}/securityContext/seccompProfile", {"type": "Unconfined"})],
        {"engine-call-filter"},
        "namespace",
    ),
    "writable root": (
        [("replace", f"{BOX}/securityContext/readOnlyRootFilesystem", False)],
        {"read-only-root"},
        "namespace",
    ),
    "token": (
        [
            (
                "add",
                f"{POD}/volumes/-",
                {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
            ),
            ("add", f"{BOX}/volumeMounts/-", {"name": "token", "mountPath": TOKEN}),
        ],
        {"no-credentials"},
        "process",
    ),
    "no limits": ([("remove", f"{BOX}/resources/limits", None)], {"memory-limit", "cpu-limit"}, "container"),
    "no bound of processes": ([("replace", f"{BOX}/command/4", "100000")], {"process-limit"}, "container"),
}
"""What is changed behind cloche's back, what the doctor then finds broken, and the level that is left."""
LISTENER = ("-p", "IPv4", "--ip-proto", "tcp", "--ip-dport", "38127", "-j", "DROP")
"""What a network plugin that enforces the policies would do to the connection from box to box."""


@pytest.fixture(scope="module")
def healthy() -> Target:
    return ready("kubernetes")


@pytest.fixture(scope="module")
def admin(healthy: Target) -> Api:
    return clusters.administrator(os.environ[deployment.KUBECONFIG])


@pytest.fixture(scope="module")
def place(healthy: Target, admin: Api) -> Iterator[Mapping[str, str]]:
    """Settings for a namespace in which no policy refuses pods that are weakened, as the cluster's administrator."""
    with namespace(admin) as name:
        yield {
            **healthy.environ,
            "CLOCHE_KUBE_CONFIG": os.environ[deployment.KUBECONFIG],
            "CLOCHE_KUBE_NAMESPACE": name,
            "CLOCHE_KUBE_SERVICE_ACCOUNT": "default",
        }


@contextmanager
def wall() -> Iterator[None]:
    """A rule on the bridge of the cluster's one node."""
    folder = os.environ.get("CLOCHE_TEST_KUBERNETES_FOLDER", "")
    if not folder:
        absent(
            "kubernetes", "CLOCHE_TEST_KUBERNETES_FOLDER is not set: nothing can be changed on this cluster's network"
        )
    pid = Path(folder, "init.pid").read_text().split()[0]
    bridge = ["nsenter", f"--net=/proc/{pid}/ns/net", "ebtables"]
    subprocess.run([*bridge, "-A", "FORWARD", *LISTENER], check=True)
    try:
        yield
    finally:
        subprocess.run([*bridge, "-D", "FORWARD", *LISTENER], check=True)


def test_healthy(healthy: Target) -> None:
    """Under the Role and the policies of deploy/kubernetes everything is in force, and no right is there that is not used."""
    status, report = doctor("kubernetes", settings=healthy.environ)
    assert broken(report) == set()
    assert (status, report["ok"], report["level"]) == (0, True, "container")
    assert [check["name"] for check in report["checks"] if check["verdict"] != "ok"] == []
    assert states(report)["socket-filter"] == "in-force"
    assert states(report)["own-kernel"] == "unknown"


def test_policies_that_nobody_enforces(healthy: Target) -> None:
    """The network plugin of this cluster knows no policies: the doctor says so, and which wall it is that holds."""
    status, report = doctor("kubernetes", settings=healthy.environ)
    found = states(report)
    assert (found["network"], found["socket-filter"], found["network-policy"]) == (
        "in-force",
        "in-force",
        "not-in-force",
    )
    assert status == 0


def test_policies_that_are_enforced(healthy: Target) -> None:
    """With a wall between the pods there are two."""
    with wall():
        _, report = doctor("kubernetes", settings=healthy.environ)
    found = states(report)
    assert (found["network"], found["socket-filter"], found["network-policy"]) == ("in-force", "in-force", "in-force")


def test_too_many_rights(place: Mapping[str, str]) -> None:
    """Who may everything is told so, with the Role that would do; a run does not fail over it."""
    status, report = doctor("kubernetes", settings=place)
    assert (status, broken(report)) == (0, set())
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["rights"]["verdict"] == "ok"
    assert checks["excess-rights"]["verdict"] == "not-ok"
    assert "everything" in checks["excess-rights"]["evidence"]
    assert "role.yaml" in checks["excess-rights"]["advice"]


@pytest.mark.parametrize("name", WEAK)
def test_weakened(place: Mapping[str, str], admin: Api, name: str) -> None:
    """One thing is changed: that is found, and nothing else."""
    patches, expected, level = WEAK[name]
    with changing(admin, place["CLOCHE_KUBE_NAMESPACE"], patches):
        status, report = doctor("kubernetes", settings=place)
    assert report["error"] is None, report["error"]
    found = broken(report)
    assert found == expected, [g for g in report["guarantees"] if g["name"] in found ^ expected]
    assert (status, report["ok"], report["level"]) == (1, False, level)


def test_root_is_refused(place: Mapping[str, str], admin: Api) -> None:
    """A script that would be root is not started, so there is nothing to look at: the doctor says why."""
    patches: list[Patch] = [
        ("replace", f"{POD}/securityContext/runAsUser", 0),
        ("replace", f"{POD}/securityContext/runAsNonRoot", False),
    ]
    with changing(admin, place["CLOCHE_KUBE_NAMESPACE"], patches):
        status, report = doctor("kubernetes", settings=place)
    assert (status, report["ok"]) == (125, False)
    assert "uid 0" in report["error"]["message"]


def test_no_cluster(tmp_path: Path) -> None:
    """What cannot be reached is told with the reason."""
    status, report = doctor("kubernetes", settings={"CLOCHE_KUBE_CONFIG": str(tmp_path / "nothing")})
    assert (status, report["ok"], report["level"]) == (125, False, None)
    assert any(check["verdict"] == "not-ok" for check in report["checks"])
