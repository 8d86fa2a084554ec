"""What the API server says, as values: also what no API server says."""

from __future__ import annotations

from typing import Any

import pytest

from cloche.backends.kubernetes import facts
from cloche.backends.kubernetes.facts import MAX_MESSAGE, Pod, Rule, Status

JOB = "batch.kubernetes.io/job-name"
ODD: list[Any] = [None, 7, "x", [], [7], {}, {"metadata": 7}, {"metadata": {"labels": 7, "name": 7}}]


def pod(**status: Any) -> Pod:
    metadata = {"name": "p", "uid": "u", "resourceVersion": "7", "labels": {JOB: "j1"}}
    found = facts.parse_pod({"metadata": metadata, "spec": {"nodeName": "n"}, "status": status})
    assert found is not None
    return found


@pytest.mark.parametrize("body", ODD, ids=repr)
def test_no_pod_of_ours(body: object) -> None:
    """What has no name, or no Job, is no pod of a run."""
    assert facts.parse_pod(body) is None


@pytest.mark.parametrize("status", ODD, ids=repr)
def test_pod_without_a_status(status: object) -> None:
    """A status of another form is that of a pod of which nothing is known yet."""
    found = facts.parse_pod({"metadata": {"name": "p", "labels": {JOB: "j1"}}, "status": status})
    assert found == Pod("p", "", "j1", "", "")


@pytest.mark.parametrize(
    ("state", "phase", "reason", "exit_code"),
    [
        ({"waiting": {"reason": "ContainerCreating"}}, "waiting", "ContainerCreating", 0),
        ({"running": {"startedAt": "x"}}, "running", "", 0),
        ({"running": {}}, "running", "", 0),
        ({"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, "terminated", "OOMKilled", 137),
        ({"terminated": {"exitCode": True}}, "terminated", "", 0),
        ({}, "none", "", 0),
        ({"running": 7}, "none", "", 0),
    ],
    ids=repr,
)
def test_container(state: object, phase: str, reason: str, exit_code: int) -> None:
    """The container's state is the one that is told."""
    found = pod(containerStatuses=[{"name": "box", "state": state}])
    assert (found.container, found.container_reason, found.exit_code) == (phase, reason, exit_code)


def test_container_beside_another() -> None:
    """Where the cluster has put a container of its own into the pod, it is cloche's whose state counts. The kubelet sorts them
    by name.
    """
    statuses = [
        {"name": "agent", "state": {"running": {}}},
        {"name": "box", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}},
    ]
    found = pod(containerStatuses=statuses)
    assert (found.container, found.container_reason) == ("terminated", "OOMKilled")


@pytest.mark.parametrize(
    ("status", "over"),
    [
        ({}, False),
        ({"phase": "Pending"}, False),
        ({"phase": "Running", "containerStatuses": [{"name": "box", "state": {"running": {}}}]}, False),
        ({"phase": "Running", "containerStatuses": [{"name": "box", "state": {"terminated": {}}}]}, True),
        ({"phase": "Failed"}, True),
        ({"phase": "Succeeded"}, True),
        ({"phase": "Unknown"}, False),
    ],
    ids=repr,
)
def test_over(status: dict[str, Any], *, over: bool) -> None:
    """A pod is over when its container has ended, or the pod has, however it did."""
    assert pod(**status).over is over


@pytest.mark.parametrize(("value", "said"), [("True", True), ("False", False), ("Unknown", False), (True, False)])
def test_conditions(value: object, *, said: bool) -> None:
    """A condition holds when its status is the word True."""
    found = pod(
        conditions=[
            {"type": "PodReadyToStartContainers", "status": value},
            {"type": "DisruptionTarget", "status": value, "reason": "r", "message": "m"},
        ]
    )
    assert found.sandbox_ready is said
    assert found.disruption == ("r: m" if said else "")


def test_unschedulable() -> None:
    """The scheduler's word is kept while there is no node, its reason where it has no message."""
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    assert pod(conditions=[{**condition, "message": "no node"}]).unschedulable == "no node"
    assert pod(conditions=[condition]).unschedulable == "Unschedulable"
    assert pod(conditions=[{**condition, "status": "True"}]).unschedulable == ""


def test_deleting() -> None:
    """A pod that is being deleted says when that began."""
    body = {"metadata": {"name": "p", "labels": {JOB: "j1"}, "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    found = facts.parse_pod(body)
    assert found is not None
    assert found.deleting
    assert not found.over


LONG = "long\n words " * 10_000


@pytest.mark.parametrize("where", ["message", "container", "placing", "disruption"])
def test_messages_are_bounded(where: str) -> None:
    """A message of any length is one line of at most 1,000 characters."""
    state = {"waiting": {"message": LONG}}
    conditions = [
        {"type": "PodScheduled", "status": "False", "message": LONG},
        {"type": "DisruptionTarget", "status": "True", "message": LONG},
    ]
    found = pod(message=LONG, conditions=conditions, containerStatuses=[{"name": "box", "state": state}])
    said = {
        "message": found.message,
        "container": found.container_message,
        "placing": found.unschedulable,
        "disruption": found.disruption,
    }[where]
    assert len(said) == MAX_MESSAGE
    assert "\n" not in said
    assert said.endswith("…")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"code": 409, "reason": "AlreadyExists", "message": "x"}, Status(409, "AlreadyExists", "x")),
        ({"message": "a\n  b"}, Status(500, "", "a b")),
        ({"code": "409", "reason": 7, "message": []}, Status(500)),
        ({"code": True}, Status(500)),
        ({"details": {"retryAfterSeconds": 3}}, Status(500, retry_after_s=3.0)),
        ({"details": {"retryAfterSeconds": -3}}, Status(500)),
        ({"details": {"retryAfterSeconds": "3"}}, Status(500)),
        ({"details": [3]}, Status(500)),
        *[(body, Status(500)) for body in ODD],
    ],
    ids=repr,
)
def test_status(body: object, expected: Status) -> None:
    """A refusal is read from its body as far as that has the right form, else from HTTP's number."""
    assert facts.parse_status(500, body) == expected


def test_message_of_a_status_is_bounded() -> None:
    """A refusal's message is one line of at most 1,000 characters."""
    assert len(facts.parse_status(500, {"message": LONG}).message) == MAX_MESSAGE


def test_reason_of_a_status_is_bounded() -> None:
    """So is its reason, which is told where there is no message."""
    assert len(facts.parse_status(500, {"reason": LONG}).reason) <= MAX_MESSAGE


@pytest.mark.parametrize("body", ODD, ids=repr)
def test_odd_things(body: object) -> None:
    """A thing or an event of another form is one without names."""
    thing = facts.parse_thing("job", body)
    assert (thing.kind, thing.name, thing.labels) == ("job", "", {})
    assert (thing.uid, thing.annotations, thing.owners) == ("", {}, frozenset())
    assert facts.parse_event(body) == ("", "")


@pytest.mark.parametrize(
    ("rule", "right", "allowed"),
    [
        (("get", "", "pods"), ("get", "", "pods"), True),
        (("get", "", "pods"), ("list", "", "pods"), False),
        (("get", "", "pods"), ("get", "batch", "pods"), False),
        (("get", "", "pods"), ("get", "", "pods/log"), False),
        (("get", "", "pods/log"), ("get", "", "pods/log"), True),
        (("get", "", "pods/log"), ("get", "", "pods"), False),
        (("get", "", "*/log"), ("get", "", "pods/log"), True),
        (("get", "", "*"), ("get", "", "pods/log"), True),
        (("*", "*", "*"), ("create", "batch", "jobs"), True),
        (("*", "batch", "*"), ("create", "", "configmaps"), False),
    ],
)
def test_rules(rule: tuple[str, str, str], right: tuple[str, str, str], *, allowed: bool) -> None:
    """A rule covers verb, group and resource, each by its name or by a star; a part of a thing is a right of its own."""
    verb, group, resource = rule
    body = {"verbs": [verb], "apiGroups": [group], "resources": [resource]}
    assert facts.parse_rule(body).allows(*right) is allowed
    assert not facts.parse_rule({**body, "resourceNames": ["x"]}).allows(*right)


@pytest.mark.parametrize("body", [*ODD, {"verbs": "*", "apiGroups": "*", "resources": "*"}, {"verbs": [7]}], ids=repr)
def test_odd_rules(body: object) -> None:
    """A rule of another form allows nothing."""
    assert facts.parse_rule(body) == Rule(frozenset(), frozenset(), frozenset())
