"""What the API server says of pods, Jobs and refusals, as values. Pure.

The objects are those of core/v1 and batch/v1 (kubernetes.io, "Kubernetes API reference"; checked with 1.37).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cloche._kit.fields import field, texts
from cloche.backends.kubernetes import names

MAX_MESSAGE = 1000
"""Characters kept of a message of the cluster's."""


def shortened(text: str) -> str:
    """A message of the cluster's, on one line, cut to 1,000 characters."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


@dataclass(frozen=True, slots=True)
class Status:
    """A ``Status`` body: why a request was refused."""

    code: int
    reason: str = ""
    message: str = ""
    retry_after_s: float | None = None


def parse_status(http_status: int, body: object) -> Status:
    """The body of an answer that is no success; ``http_status`` where it is no ``Status``."""
    details = field(body, "details", dict, {})
    after = field(details, "retryAfterSeconds", int, 0)
    return Status(
        field(body, "code", int, http_status),
        shortened(field(body, "reason", str, "")),
        shortened(field(body, "message", str, "")),
        float(after) if after > 0 else None,
    )


ContainerPhase: TypeAlias = Literal["none", "waiting", "running", "terminated"]


@dataclass(frozen=True, slots=True)
class Pod:
    """What is known of a run's pod."""

    name: str
    uid: str
    job: str
    """The name of its Job."""
    owner: str
    """The uid of what it belongs to."""
    version: str
    """Its resourceVersion."""
    phase: str = ""
    reason: str = ""
    message: str = ""
    scheduled: bool = False
    unschedulable: str = ""
    """The scheduler's word on why there is no node for it."""
    sandbox_ready: bool = False
    """Whether its sandbox (network, volumes) is there, so that the container is about to start."""
    container: ContainerPhase = "none"
    container_reason: str = ""
    container_message: str = ""
    exit_code: int = 0
    disruption: str = ""
    """Why the cluster itself ends it, as far as it says so: reason and message."""
    deleting: bool = False
    deleted: bool = False
    """Whether it is not there any more."""

    def older_than(self, other: Pod) -> bool:
        """Whether it is a state from before the other one's. Versions grow (kubernetes.io, "API Concepts": comparable from 1.35
        on, and numbers for as long as there is etcd).
        """
        numbers = self.version.isdecimal() and other.version.isdecimal()
        return numbers and int(self.version) < int(other.version)

    @property
    def over(self) -> bool:
        """Whether its container will write no more."""
        return self.deleted or self.container == "terminated" or self.phase in {"Succeeded", "Failed"}


def parse_pod(body: object) -> Pod | None:
    """None: it is not one of a Job's."""
    metadata, spec, status = (field(body, name, dict, {}) for name in ("metadata", "spec", "status"))
    job = field(field(metadata, "labels", dict, {}), names.LABEL_JOB, str, "")
    name = field(metadata, "name", str, "")
    if not job or not name:
        return None
    conditions = {field(c, "type", str, ""): c for c in field(status, "conditions", list, [])}
    placing, disruption = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    container, reason, message, exit_code = _container(status)
    return Pod(
        name=name,
        uid=field(metadata, "uid", str, ""),
        job=job,
        owner=_owner(metadata),
        version=field(metadata, "resourceVersion", str, ""),
        phase=field(status, "phase", str, ""),
        reason=field(status, "reason", str, ""),
        message=shortened(field(status, "message", str, "")),
        scheduled=bool(field(spec, "nodeName", str, "")),
        unschedulable=shortened(field(placing, "message", str, "") or field(placing, "reason", str, ""))
        if field(placing, "status", str, "") == "False"
        else "",
        sandbox_ready=field(conditions.get("PodReadyToStartContainers", {}), "status", str, "") == "True",
        container=container,
        container_reason=reason,
        container_message=message,
        exit_code=exit_code,
        disruption=shortened(f"{field(disruption, 'reason', str, '')}: {field(disruption, 'message', str, '')}")
        if field(disruption, "status", str, "") == "True"
        else "",
        deleting=bool(field(metadata, "deletionTimestamp", str, "")),
    )


def _owner(metadata: object) -> str:
    for owner in field(metadata, "ownerReferences", list, []):
        if field(owner, "controller", bool, otherwise=False):
            return field(owner, "uid", str, "")
    return ""


def _container(status: Mapping[str, object]) -> tuple[ContainerPhase, str, str, int]:
    """Phase, reason, message and exit code of the box. Where the cluster lets them, others put containers beside it."""
    statuses = field(status, "containerStatuses", list, [])
    ours: object = next((one for one in statuses if field(one, "name", str, "") == names.CONTAINER), {})
    state = field(ours, "state", dict, {})
    phases: tuple[ContainerPhase, ...] = ("terminated", "running", "waiting")
    for phase in phases:
        said = field(state, phase, dict, None)
        if said is not None:
            return (
                phase,
                field(said, "reason", str, ""),
                shortened(field(said, "message", str, "")),
                field(said, "exitCode", int, 0),
            )
    return "none", "", "", 0


@dataclass(frozen=True, slots=True)
class Thing:
    """A Job or a ConfigMap of cloche's, as far as sweep needs to know it."""

    kind: str
    name: str
    uid: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    owners: frozenset[str] = frozenset()
    """uids of what it belongs to."""


def parse_thing(kind: str, body: object) -> Thing:
    """An item of a list of objects, or of their metadata."""
    metadata = field(body, "metadata", dict, {})
    return Thing(
        kind,
        field(metadata, "name", str, ""),
        field(metadata, "uid", str, ""),
        field(metadata, "labels", dict, {}),
        field(metadata, "annotations", dict, {}),
        frozenset(field(owner, "uid", str, "") for owner in field(metadata, "ownerReferences", list, [])),
    )


def parse_event(body: object) -> tuple[str, str]:
    """Reason and message of an Event."""
    return field(body, "reason", str, ""), shortened(field(body, "message", str, ""))


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that we may do (authorization.k8s.io/v1, ResourceRule)."""

    verbs: frozenset[str]
    groups: frozenset[str]
    resources: frozenset[str]

    def allows(self, verb: str, group: str, resource: str) -> bool:
        """Whether it covers a right; ``resource`` may be one such as ``pods/log``."""
        _, slash, part = resource.partition("/")
        names = {resource, "*", f"*/{part}"} if slash else {resource, "*"}
        return (
            not {verb, "*"}.isdisjoint(self.verbs)
            and not {group, "*"}.isdisjoint(self.groups)
            and not names.isdisjoint(self.resources)
        )


def parse_rule(body: object) -> Rule:
    """One that holds for some names only is none."""
    if field(body, "resourceNames", list, []):
        return Rule(frozenset(), frozenset(), frozenset())
    verbs, groups, resources = (
        frozenset(texts(field(body, key, list, []))) for key in ("verbs", "apiGroups", "resources")
    )
    return Rule(verbs, groups, resources)
