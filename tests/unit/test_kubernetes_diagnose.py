"""What the cluster says → how a run ended, or why it could not begin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cloche._kit.http import ConnectionLost
from cloche.backends.contract import Fate, FateKind
from cloche.backends.kubernetes import diagnose
from cloche.backends.kubernetes.client import Refused
from cloche.backends.kubernetes.facts import Pod, Status

POD = Pod("p", "u", "j1", "o", "7", phase="Running", scheduled=True, sandbox_ready=True, container="running")
WAITING = replace(POD, phase="Pending", container="waiting")


def ended(why: str, exit_code: int = 137, **more: Any) -> Pod:
    return replace(POD, phase="Failed", container="terminated", container_reason=why, exit_code=exit_code, **more)


@pytest.mark.parametrize(
    ("pod", "kind", "said"),
    [
        (ended("OOMKilled"), FateKind.OOM_KILLED, "out of memory"),
        (ended("Error"), FateKind.EXITED, "Error: its container ended with 137"),
        (ended("Completed", 0), FateKind.EXITED, "ended with 0"),
        (ended("", 1), FateKind.EXITED, "ended with 1"),
        (ended("StartError", 128, container_message="no such file"), FateKind.NOT_STARTED, "no such file"),
        (ended("ContainerCannotRun", 127), FateKind.NOT_STARTED, "ContainerCannotRun"),
        (ended("Error", reason="Evicted", message="low on memory"), FateKind.EVICTED, "Evicted: low on memory"),
        (ended("OOMKilled", disruption="EvictionByEvictionAPI: drain"), FateKind.EVICTED, "drain"),
        (replace(POD, reason="NodeLost", message="n1"), FateKind.EVICTED, "NodeLost: n1"),
        (replace(POD, deleting=True), FateKind.DELETED, "was deleted"),
        (replace(POD, deleted=True), FateKind.DELETED, "was deleted"),
        (replace(POD, deleted=True, disruption="DeletionByTaintManager: x"), FateKind.EVICTED, "TaintManager"),
        (replace(POD, phase="Failed", container="none", reason="Shutdown"), FateKind.EVICTED, "Shutdown"),
        (replace(POD, phase="Failed", container="none"), FateKind.EVICTED, "failed"),
        (replace(POD, phase="Failed", container="none", reason="OutOfcpu"), FateKind.UNSCHEDULABLE, "OutOfcpu"),
        (replace(POD, phase="Failed", container="none", reason="NodeAffinity"), FateKind.UNSCHEDULABLE, "NodeAffinity"),
        (POD, FateKind.RUNNING, "still runs"),
        (replace(WAITING, container_reason="ErrImagePull"), FateKind.IMAGE, "ErrImagePull"),
        (
            replace(WAITING, container_reason="ImagePullBackOff", container_message="x"),
            FateKind.IMAGE,
            "ImagePullBackOff: x",
        ),
        (replace(WAITING, container_reason="InvalidImageName"), FateKind.IMAGE, "InvalidImageName"),
        (replace(WAITING, container_reason="CreateContainerError"), FateKind.NOT_STARTED, "CreateContainerError"),
        (replace(WAITING, container_reason="ContainerCreating"), FateKind.LOST, "ContainerCreating"),
        (replace(WAITING, container="none"), FateKind.LOST, "Pending"),
        (Pod("p", "u", "j1", "o", "7", unschedulable="0/3 nodes"), FateKind.UNSCHEDULABLE, "0/3 nodes"),
        (Pod("p", "u", "j1", "o", "7"), FateKind.LOST, "Pending"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fate(pod: Pod, kind: FateKind, said: str) -> None:
    """Each state of a pod has one kind of end, with the cluster's own words."""
    fate = diagnose.pod_fate(pod)
    assert fate.kind is kind
    assert said in fate.message


@pytest.mark.parametrize(
    "pod",
    [POD, WAITING, replace(WAITING, container_reason="PodInitializing"), ended("Error"), ended("OOMKilled"),
     Pod("p", "u", "j1", "o", "7", unschedulable="0/3 nodes"), replace(POD, deleted=True)],
)  # fmt: skip
def test_no_trouble(pod: Pod) -> None:
    """What may still start, or has started, is no trouble: the log tells, or time does."""
    assert diagnose.pod_trouble(pod) is None


QUOTA = 'Error creating: pods "x" is forbidden: exceeded quota: q'


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([], None),
        ([("SuccessfulCreate", "Created pod: x")], None),
        ([("FailedCreate", QUOTA)], FateKind.QUOTA),
        ([("FailedCreate", "failed quota: q: must specify limits.cpu")], FateKind.DENIED),
        ([("FailedCreate", 'pods "x" is forbidden: violates PodSecurity')], FateKind.DENIED),
        ([("FailedCreate", "Job.batch is invalid: spec")], FateKind.DENIED),
        ([("FailedCreate", 'admission webhook "a" denied the request: no')], FateKind.DENIED),
        ([("FailedCreate", "ValidatingAdmissionPolicy 'a' denied request: no")], FateKind.DENIED),
        ([("FailedCreate", 'serviceaccount "x" not found')], FateKind.DENIED),
        ([("FailedCreate", "Internal error occurred: timeout")], None),
        ([("BackoffLimitExceeded", "is forbidden")], None),
        ([("FailedCreate", "Internal error"), ("FailedCreate", QUOTA)], FateKind.QUOTA),
    ],
)
def test_job_without_a_pod(events: list[tuple[str, str]], kind: FateKind | None) -> None:
    """Of the events about a Job those count that say why it has no pod, and that this lasts."""
    fate = diagnose.job_fate(iter(events))
    assert (fate.kind if fate is not None else None) is kind
    if fate is not None:
        assert fate.message in dict.fromkeys(message for _, message in events)


@pytest.mark.parametrize("kind", FateKind)
def test_every_fate_is_an_error(kind: FateKind) -> None:
    """Each kind of end that a box may have before its start is a typed error with the words and a hint."""
    error = diagnose.as_error(Fate(kind, "the words."))
    expected = {
        FateKind.IMAGE: "image-unavailable",
        FateKind.UNSCHEDULABLE: "unschedulable",
        FateKind.QUOTA: "quota-exceeded",
        FateKind.DENIED: "permission-denied",
    }
    assert error.code == expected.get(kind, "backend-unavailable")
    assert error.message.endswith("the words.")
    assert error.hint


@pytest.mark.parametrize(
    ("code", "message", "kind", "retryable", "hint"),
    [
        (403, QUOTA, "quota-exceeded", True, "quota"),
        (403, 'User "u" cannot create resource "jobs"', "permission-denied", False, "Role"),
        (403, 'looking up service account a/b: serviceaccount "b" not found', "permission-denied", False, "SERVICE_ACCOUNT"),
        (403, 'pod rejected: RuntimeClass "x" not found', "permission-denied", False, "RUNTIME_CLASS"),
        (403, "no PriorityClass with name x was found", "permission-denied", False, "PRIORITY_CLASS"),
        (403, 'violates PodSecurity "restricted:latest"', "permission-denied", False, "Pod Security"),
        (403, "maximum memory usage per Container is 1Gi", "permission-denied", False, "CLOCHE_MEMORY"),
        (422, "ValidatingAdmissionPolicy 'p' denied request", "permission-denied", False, "policy"),
        (422, "", "permission-denied", False, "rules"),
        (401, "Unauthorized", "permission-denied", False, "credentials"),
        (404, "not found", "backend-unavailable", False, "CLOCHE_KUBE_NAMESPACE"),
        (409, "exists", "backend-unavailable", False, "CLOCHE_LOG"),
        (429, "busy", "backend-unavailable", True, "later"),
        (500, "etcd", "backend-unavailable", True, "later"),
        (503, "", "backend-unavailable", True, "later"),
    ],
)  # fmt: skip
def test_refusal(code: int, message: str, kind: str, hint: str, *, retryable: bool) -> None:
    """Each no of an API server is a typed error with its words, and a hint that says what to do about this one."""
    error = diagnose.refusal(Refused(Status(code, message=message)), "make a Job")
    assert (error.code, error.retryable) == (kind, retryable)
    assert message in error.message
    assert hint in error.hint


def test_unreachable() -> None:
    """An API server that was lost may be tried again."""
    error = diagnose.unreachable(ConnectionLost("it broke"), "make a Job")
    assert (error.code, error.retryable) == ("backend-unavailable", True)
    assert "make a Job: it broke." in error.message
