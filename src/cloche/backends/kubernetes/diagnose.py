"""What the cluster says → how a run ended, or why it could not begin. Pure.

The words are the kubelet's (kubernetes, pkg/kubelet/images/types.go, pkg/kubelet/container/sync_result.go), the scheduler's
and the admission plug-ins'; seen with 1.37.
"""

from __future__ import annotations

from collections.abc import Iterable

from cloche._kit.http import HttpFailure
from cloche.backends.contract import Fate, FateKind
from cloche.backends.kubernetes.client import Refused
from cloche.backends.kubernetes.facts import Pod
from cloche.errors import (
    BackendUnavailable,
    ClocheError,
    ImageUnavailable,
    PermissionDenied,
    QuotaExceeded,
    Unschedulable,
)

_NO_IMAGE = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
_NO_CONTAINER = frozenset(
    {
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "PreCreateHookError",
        "CrashLoopBackOff",
    }
)
_NEVER_RAN = frozenset({"StartError", "ContainerCannotRun"})
_NO_ROOM = ("OutOf", "UnexpectedAdmissionError", "NodeAffinity", "Topology")
"""What a kubelet says of a pod that it has no room for after all; the beginnings of its words."""
_FINAL = ("forbidden", "failed quota", "is invalid", "denied the request", "denied request", "not found")
"""Words in why a pod is not made that no waiting changes."""

EVENTS_HINT = "Look at the events of the Job's namespace: kubectl get events."


def pod_trouble(pod: Pod) -> Fate | None:
    """Why the pod's box will not start, as soon as the cluster says so; None: nothing says that."""
    said = _said(pod.container_reason, pod.container_message)
    if pod.container == "waiting" and pod.container_reason in _NO_IMAGE:
        return Fate(FateKind.IMAGE, said)
    if pod.container == "waiting" and pod.container_reason in _NO_CONTAINER:
        return Fate(FateKind.NOT_STARTED, said)
    if pod.container == "terminated" and pod.container_reason in _NEVER_RAN:
        return Fate(FateKind.NOT_STARTED, said)
    if pod.phase == "Failed" and pod.container == "none" and pod.reason.startswith(_NO_ROOM):
        return Fate(FateKind.UNSCHEDULABLE, _said(pod.reason, pod.message))
    return None


def pod_fate(pod: Pod) -> Fate:
    """The cluster's word on a pod, whatever its state."""
    ended_by_others = pod.disruption or (
        _said(pod.reason, pod.message) if pod.reason in {"Evicted", "NodeLost"} else ""
    )
    if ended_by_others:
        return Fate(FateKind.EVICTED, ended_by_others)
    if pod.deleted or pod.deleting:
        return Fate(FateKind.DELETED, f"The pod {pod.name} was deleted.")
    if (trouble := pod_trouble(pod)) is not None:
        return trouble
    if pod.container == "terminated":
        if pod.container_reason == "OOMKilled":
            return Fate(FateKind.OOM_KILLED, f"The container of the pod {pod.name} ran out of memory.")
        said = f"its container ended with {pod.exit_code}"
        return Fate(FateKind.EXITED, f"{_said(pod.container_reason, pod.container_message)}: {said}")
    if pod.phase == "Failed":
        return Fate(FateKind.EVICTED, _said(pod.reason, pod.message) or f"The pod {pod.name} failed.")
    if pod.container == "running":
        return Fate(FateKind.RUNNING, f"The pod {pod.name} still runs, and its log has ended.")
    if not pod.scheduled and pod.unschedulable:
        return Fate(FateKind.UNSCHEDULABLE, pod.unschedulable)
    waits = _said(pod.container_reason or pod.phase or "Pending", pod.container_message)
    return Fate(FateKind.LOST, f"The pod {pod.name} is not running yet: {waits}")


def job_fate(events: Iterable[tuple[str, str]]) -> Fate | None:
    """Why a Job has no pod, from the events about it; None: nothing says why that lasts. The Job's controller tries again."""
    for reason, message in events:
        if reason == "FailedCreate" and _is_quota(message):
            return Fate(FateKind.QUOTA, message)
        if reason == "FailedCreate" and any(word in message for word in _FINAL):
            return Fate(FateKind.DENIED, message)
    return None


def as_error(fate: Fate) -> ClocheError:
    """The error for a box that did not start."""
    said = fate.message.rstrip(".")
    match fate.kind:
        case FateKind.IMAGE:
            return ImageUnavailable(
                f"The node cannot have the image: {said}.",
                hint="Check CLOCHE_IMAGE, the node's way to the registry, and CLOCHE_KUBE_IMAGE_PULL_SECRETS.",
            )
        case FateKind.UNSCHEDULABLE:
            return Unschedulable(f"The cluster has no place for the box: {said}.")
        case FateKind.QUOTA:
            return QuotaExceeded(f"A quota of the namespace forbids the box: {said}.")
        case FateKind.DENIED:
            return PermissionDenied(f"The cluster refuses the box's pod: {said}.", hint=_advice(said))
        case _:
            again = said.startswith("CreateContainerError")  # a runtime that took too long; the kubelet would try again
            return BackendUnavailable(f"The node cannot start the box: {said}.", hint=EVENTS_HINT, retryable=again)


def refusal(exc: Refused, what: str) -> ClocheError:
    """The error for an API server's no to ``what``, such as "make a Job"."""
    message = exc.message.rstrip(".")
    if exc.code == 403 and _is_quota(message):
        return QuotaExceeded(f"A quota of the namespace forbids the box: {message}.")
    if exc.code == 401:
        return PermissionDenied(
            f"The API server does not know who we are: {message}.",
            hint="Renew the credentials: kubectl get --raw /version says whether they work.",
        )
    if exc.code in {403, 422}:
        # A policy answers with 422, and so does the server to what is not well formed.
        return PermissionDenied(f"The cluster does not let cloche {what}: {message}.", hint=_advice(message))
    if exc.code == 404:
        return BackendUnavailable(
            f"The cluster cannot {what}: {message}.",
            hint="Make the namespace of CLOCHE_KUBE_NAMESPACE (deploy/kubernetes has it).",
        )
    busy = exc.code == 429 or exc.code >= 500
    return BackendUnavailable(
        f"The API server did not {what}: {message} (status {exc.code}).",
        hint="Try again later." if busy else "Run again with CLOCHE_LOG=debug and report what it prints.",
        retryable=busy,
    )


def unreachable(exc: HttpFailure, what: str) -> BackendUnavailable:
    """The error for an API server that was lost while it was to do ``what``."""
    return BackendUnavailable(
        f"The API server was lost when it was to {what}: {exc}.",
        hint="Check that the cluster can be reached: kubectl get --raw /readyz.",
        retryable=True,
    )


def _is_quota(message: str) -> bool:
    # A quota that is new has counted nothing for a moment.
    return "exceeded quota" in message or "status unknown for quota" in message


def _advice(message: str) -> str:
    """What to do about a refusal of the cluster's admission, by the words of the plug-in."""
    words = message.lower()
    for signs, advice in _ADVICE:
        if any(sign in words for sign in signs):
            return advice
    return "Let the cluster's rules admit it, or change the settings that the message names."


_ADVICE = (
    (
        ("serviceaccount", "service account"),
        "Make the service account of CLOCHE_KUBE_SERVICE_ACCOUNT in the namespace (deploy/kubernetes has it).",
    ),
    (("runtimeclass",), "Set CLOCHE_KUBE_RUNTIME_CLASS to one that `kubectl get runtimeclass` lists."),
    (("priorityclass",), "Set CLOCHE_KUBE_PRIORITY_CLASS to one that `kubectl get priorityclass` lists."),
    (
        ("validatingadmissionpolicy",),
        "Let the policy that the message names admit it, or change the settings: it has the list of images, for one.",
    ),
    (("podsecurity",), "The namespace's Pod Security level refuses it; cloche's pods pass `restricted`."),
    (
        ("per container", "per pod"),
        "Set CLOCHE_MEMORY or CLOCHE_CPUS within the namespace's LimitRange, or change that.",
    ),
    (("cannot create resource",), "Give cloche the Role of deploy/kubernetes in the namespace."),
)


def _said(reason: str, message: str) -> str:
    return f"{reason}: {message}" if reason and message else reason or message
