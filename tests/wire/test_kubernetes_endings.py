"""Runs whose log ends before its time, and boxes that never start: what the cluster says of the pod then decides."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable

import anyio
import pytest
from tests.wire.engine import DEFAULT, Peer, Raw, Reply, Request
from tests.wire.kubernetes import (
    BEGIN,
    CORE,
    HI,
    LOG,
    SO_FAR,
    Kubernetes,
    Pod,
    ends_with,
    frames,
    says,
    status,
)
from tests.wire.kubernetes_runs import ended, failure, run, sandbox
from tests.wire.runs import SPEC

import cloche
from cloche.backends.kubernetes import backend, box, client
from cloche.runtime import life, reading
from cloche.supervisor.frames import Data, Fail, Hello
from cloche.testing.fake import end, ended_by

pytestmark = pytest.mark.anyio

State = Callable[[Pod], object]


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried as often as ever, with shorter pauses between."""
    monkeypatch.setattr(reading, "PAUSES_S", (0.01, 0.01, 0.02, 0.05))
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.02, 0.02, 0.05))
    monkeypatch.setattr(box, "UNSURE_S", (0.2, 0.2, 0.4))
    monkeypatch.setattr(box, "NO_POD_S", 0.2)
    monkeypatch.setattr(box, "NO_LOG_S", 0.2)
    monkeypatch.setattr(box, "END_S", 2.0)
    monkeypatch.setattr(life, "LATE_FATE_S", 0.3)


CUTS = pytest.mark.parametrize("said", [SO_FAR, SO_FAR[:-3], b""], ids=["clean", "frame", "nothing"])


def evicted(pod: Pod) -> None:
    pod.tell(phase="Failed", reason="Evicted", message="The node was low on resource: memory.")


def disrupted(pod: Pod) -> None:
    pod.condition("DisruptionTarget", reason="PreemptionByScheduler", message="preempting")
    pod.ends(137, "Error")


def tainted(pod: Pod) -> None:
    pod.condition("DisruptionTarget", reason="DeletionByTaintManager", message="the node is not ready")
    pod.gone()


def node_lost(pod: Pod) -> None:
    pod.tell(reason="NodeLost", message="Node n1 which was running pod x is unresponsive")
    pod.terminate()


ENDS: dict[str, tuple[State, str, bool]] = {
    "exited": (lambda pod: pod.ends(137, "Error"), "ended with 137", False),
    "completed": (lambda pod: pod.ends(0), "ended with 0", False),
    "evicted": (evicted, "low on resource", False),
    "preempted": (disrupted, "PreemptionByScheduler: preempting", False),
    "tainted": (tainted, "DeletionByTaintManager", False),
    "deleting": (lambda pod: pod.terminate(), "was deleted", False),
    "deleted": (lambda pod: pod.gone(), "was deleted", False),
    "node-lost": (node_lost, "unresponsive", False),
    "failed": (lambda pod: pod.tell(phase="Failed", containerStatuses=[]), "failed", False),
}


def becomes(said: bytes, state: State) -> Callable[[Pod], AsyncIterator[bytes]]:
    """A log that ends, and what becomes of its pod."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        if said:
            yield said
        if pod.reads == 1:
            state(pod)

    return play


@CUTS
@pytest.mark.parametrize("how", ENDS)
async def test_ended_too_early(cluster: Kubernetes, how: str, said: bytes) -> None:
    """A log without a last frame is engine-lost with the cluster's word on the pod, whatever end that had."""
    state, words, retryable = ENDS[how]
    cluster.play = becomes(said, state)
    error = await failure(cluster)
    assert error.code == "engine-lost"
    assert words in error.message
    assert error.retryable is retryable


@CUTS
async def test_out_of_memory(cluster: Kubernetes, said: bytes) -> None:
    """A container that ran out of memory is a result, with what came before."""
    cluster.play = ends_with(said, 137, "OOMKilled") if said else becomes(b"", lambda pod: pod.ends(137, "OOMKilled"))
    result = await run(cluster)
    assert result.outcome == "out_of_memory"
    assert result.stdout in {"so far", ""}


async def test_status_comes_later(cluster: Kubernetes) -> None:
    """The log of a container ends before its node has told of the end: the cluster's word is waited for."""

    async def later(pod: Pod) -> None:
        await anyio.sleep(1.0)
        pod.ends(137, "OOMKilled")

    cluster.play = becomes(SO_FAR, lambda pod: cluster.group.start_soon(later, pod))
    assert (await run(cluster)).outcome == "out_of_memory"


async def test_still_running(cluster: Kubernetes) -> None:
    """A log that ends again and again while its container still runs is read until the run's time is over, and no longer."""
    cluster.play = says(SO_FAR)
    started = time.monotonic()
    found = await ended(cluster, cloche.Spec(content="pass", name="main.py", timeout=1))
    if found.result is not None:
        assert (found.result.outcome, found.result.stdout) == ("timed_out", "so far")
    else:
        assert found.error is not None
        assert (found.error.code, found.error.retryable) == ("engine-lost", True)
    assert time.monotonic() - started < 6


@pytest.mark.parametrize("reply", [status(403, "Forbidden", "no"), Raw()], ids=["forbidden", "cut"])
async def test_cluster_cannot_tell(cluster: Kubernetes, reply: Reply | Raw) -> None:
    """An API server that cannot say how the pod is doing is engine-lost, and the run may be repeated."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        cluster.deaf = True
        cluster.engine.on(f"GET {CORE}/pods/*", reply)
        cluster.engine.on(LOG, cluster.log)
        yield SO_FAR

    cluster.play = play
    error = await failure(cluster, cloche.Spec(content="pass", name="main.py", timeout=0.3))
    assert (error.code, error.retryable) == ("engine-lost", True)


async def test_server_hangs_when_time_is_over(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers nothing any more when the run's time is over is engine-lost: nobody saw the script go on so long."""
    monkeypatch.setattr(backend, "REMOVE_S", 0.3)

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        yield SO_FAR
        cluster.engine.on("*", Raw(math.inf))
        await anyio.sleep(math.inf)

    cluster.play = play
    found = await ended(cluster, cloche.Spec(content="pass", name="main.py", timeout=0.3))
    assert found.result is None
    assert found.error is not None
    assert (found.error.code, found.error.retryable) == ("engine-lost", True)


@pytest.mark.parametrize(
    ("reason", "late_s"),
    [
        ("OOMKilled", 0.0),
        ("OOMKilled", 0.6),
        ("Error", 0.0),
        ("Error", 0.6),
    ],
)
async def test_killed_for_a_reason_unseen(cluster: Kubernetes, reason: str, late_s: float) -> None:
    """A script that SIGKILL ended, where the supervisor cannot see why, was out of memory if the cluster says so, as soon as
    it says so.
    """

    async def later(pod: Pod) -> None:
        await anyio.sleep(late_s)
        pod.ends(137, reason)

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        pod.ends_itself = False
        if late_s:
            cluster.group.start_soon(later, pod)
        else:
            pod.ends(137, reason)
        yield frames(*BEGIN, ended_by(9))

    cluster.play = play
    result = await run(cluster)
    assert (result.outcome, result.signal) == (
        ("out_of_memory", None) if reason == "OOMKilled" else ("signaled", "SIGKILL")
    )


async def test_word_that_does_not_come(cluster: Kubernetes) -> None:
    """A script that failed keeps its exit code, whatever becomes of the question whether it was out of memory."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        pod.ends(3)
        cluster.engine.on(f"GET {CORE}/pods", Raw())
        yield frames(*BEGIN, end(3))

    cluster.play = play
    result = await run(cluster)
    assert (result.outcome, result.exit_code) == ("exited", 3)


async def test_ended_by_somebody(cluster: Kubernetes) -> None:
    """A supervisor that was told to end the run, and not by us, is engine-lost: nobody here has cancelled it."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        pod.terminate()
        yield frames(*BEGIN, ended_by(15, cause="cancel"))

    cluster.play = play
    error = await failure(cluster)
    assert (error.code, error.retryable) == ("engine-lost", False)


async def test_supervisor_cannot_start_the_script(cluster: Kubernetes) -> None:
    """The supervisor's own reason is the error that it names."""
    cluster.play = says(frames(Hello(1, 1, 0), Fail("interpreter-missing", "There is no python3 in the box")))
    error = await failure(cluster)
    assert (error.code, error.message) == ("interpreter-missing", "There is no python3 in the box.")


async def test_pod_deleted_while_nobody_watched(cluster: Kubernetes) -> None:
    """A pod that went while the watch was broken is found out by the next list, also when its log never ended."""
    cluster.starts = lambda pod: None

    def gone(pod: Pod) -> None:
        async def later() -> None:
            await anyio.sleep(0.1)
            cluster.on_watch = [status(410, "Expired", "too old")]
            cluster.pods.pop(pod.name)
            cluster.cut_watches()

        cluster.group.start_soon(later)

    cluster.starts = gone
    started = time.monotonic()
    error = await failure(cluster)
    assert (error.code, error.retryable) == ("engine-lost", False)
    assert "was deleted" in error.message
    assert time.monotonic() - started < 6


async def test_one_lost_run_does_not_spoil_the_next(cluster: Kubernetes) -> None:
    """After a run that was lost the same sandbox gives the next one its result."""
    async with sandbox(cluster) as opened:
        cluster.play = ends_with(SO_FAR)
        with pytest.raises(cloche.EngineLost):
            await opened.run(SPEC)
        cluster.play = says(HI)
        assert (await opened.run(SPEC)).stdout == "hi"


async def test_timed_out_by_the_supervisor(cluster: Kubernetes) -> None:
    """A run whose supervisor ended it at its limit is timed_out."""
    cluster.play = says(frames(*BEGIN, Data("stdout", 0, b"so far"), ended_by(15, "timeout", stdout=6)))
    result = await run(cluster)
    assert (result.outcome, result.stdout) == ("timed_out", "so far")


# --- boxes that never start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"])
async def test_no_image(cluster: Kubernetes, reason: str) -> None:
    """A node that cannot have the image is image-unavailable at once, with its words."""

    def starts(pod: Pod) -> None:
        pod.condition("PodReadyToStartContainers")
        pod.state(waiting={"reason": reason, "message": "manifest for x not found"})

    cluster.starts = starts
    started = time.monotonic()
    error = await failure(cluster)
    assert error.code == "image-unavailable"
    assert "manifest for x not found" in error.message
    assert "CLOCHE_IMAGE" in error.hint
    assert time.monotonic() - started < 3
    assert not cluster.engine.asked(LOG)


async def test_no_image_a_little_later(cluster: Kubernetes) -> None:
    """The same while the log is already asked for."""

    async def later(pod: Pod) -> None:
        await anyio.sleep(0.2)
        pod.state(waiting={"reason": "ErrImagePull", "message": "denied"})

    def starts(pod: Pod) -> None:
        pod.condition("PodReadyToStartContainers")
        pod.state(waiting={"reason": "ContainerCreating"})
        cluster.group.start_soon(later, pod)

    cluster.starts = starts
    started = time.monotonic()
    assert (await failure(cluster)).code == "image-unavailable"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("reason", ["CreateContainerConfigError", "CreateContainerError", "RunContainerError"])
async def test_no_container(cluster: Kubernetes, reason: str) -> None:
    """A node that cannot make the container is backend-unavailable, with its words."""
    cluster.starts = lambda pod: pod.state(waiting={"reason": reason, "message": "no such runtime"})
    error = await failure(cluster)
    assert error.code == "backend-unavailable"
    assert "no such runtime" in error.message


async def test_supervisor_cannot_be_executed(cluster: Kubernetes) -> None:
    """A container whose program cannot be executed is backend-unavailable, with the node's words."""
    cluster.starts = lambda pod: pod.ends(128, "StartError", "exec format error")
    error = await failure(cluster)
    assert error.code == "backend-unavailable"
    assert "exec format error" in error.message


async def test_no_room_on_the_node(cluster: Kubernetes) -> None:
    """A node that refuses a pod that was given to it is unschedulable, at once."""
    said = "Node didn't have enough resource: memory"
    cluster.starts = lambda pod: pod.tell(phase="Failed", reason="OutOfmemory", message=said)
    error = await failure(cluster)
    assert error.code == "unschedulable"
    assert said in error.message


async def test_unschedulable(cluster: Kubernetes) -> None:
    """A pod for which there is no node until its start is overdue is unschedulable, with the scheduler's message."""
    said = "0/3 nodes are available: 3 Insufficient memory."
    cluster.places = lambda pod: pod.condition("PodScheduled", "False", reason="Unschedulable", message=said)
    error = await failure(cluster, start_timeout=1.2)
    assert (error.code, error.retryable) == ("unschedulable", True)
    assert "3 Insufficient memory" in error.message


async def test_schedulable_after_all(cluster: Kubernetes) -> None:
    """A pod that gets a node later runs."""

    async def later(pod: Pod) -> None:
        await anyio.sleep(0.5)
        pod.placed()
        pod.starts()

    def places(pod: Pod) -> None:
        pod.condition("PodScheduled", "False", reason="Unschedulable", message="0/3 nodes are available")
        cluster.group.start_soon(later, pod)

    cluster.places = places
    assert (await run(cluster)).stdout == "hi"


async def test_never_ready(cluster: Kubernetes) -> None:
    """A pod that has a node and does not start is start-timeout, with what it waits for."""
    cluster.starts = lambda pod: pod.state(waiting={"reason": "ContainerCreating"})
    error = await failure(cluster, start_timeout=1.2)
    assert (error.code, error.retryable) == ("start-timeout", True)
    assert "ContainerCreating" in error.message


FORBIDDEN = 'Error creating: pods "x" is forbidden: '


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (FORBIDDEN + "exceeded quota: q, requested: pods=1, used: pods=5, limited: pods=5", "quota-exceeded"),
        (FORBIDDEN + "failed quota: q: must specify limits.cpu", "permission-denied"),
        (FORBIDDEN + 'violates PodSecurity "restricted:latest"', "permission-denied"),
        (FORBIDDEN + 'error looking up service account boxes/x: serviceaccount "x" not found', "permission-denied"),
        ('admission webhook "policy" denied the request: no such image here', "permission-denied"),
        ("Internal error occurred: failed calling webhook", "start-timeout"),
    ],
    ids=["quota", "no-limits", "security", "account", "webhook", "passing"],
)
async def test_job_without_a_pod(cluster: Kubernetes, message: str, code: str) -> None:
    """A Job that cannot make its pod is told by the events about it: what waiting may change is waited for, the rest is not."""
    cluster.makes_pods = False
    cluster.events = [("SuccessfulDelete", "x"), ("FailedCreate", message)]
    started = time.monotonic()
    error = await failure(cluster, start_timeout=1)
    assert error.code == code
    if code != "start-timeout":
        assert message.split(": ", 1)[1] in error.message
    assert (time.monotonic() - started > 0.9) is (code != "permission-denied")


async def test_quota_that_makes_room(cluster: Kubernetes) -> None:
    """A Job whose pod a quota forbids at first runs when there is room."""
    cluster.makes_pods = False
    cluster.events = [("FailedCreate", FORBIDDEN + "exceeded quota: q")]

    async def later() -> None:
        await anyio.sleep(0.5)
        cluster.make_pod(cluster.made[0])

    async with sandbox(cluster) as opened:
        cluster.group.start_soon(later)
        assert (await opened.run(SPEC)).stdout == "hi"


async def test_supervisor_is_missing(cluster: Kubernetes) -> None:
    """A pod that waits because somebody deleted the supervisor gets it back."""
    async with sandbox(cluster) as opened:
        cluster.config_maps.clear()
        assert (await opened.run(SPEC)).stdout == "hi"


async def test_supervisor_is_another(cluster: Kubernetes) -> None:
    """A supervisor with another content is refused, with what to do, and before anything is made."""

    async def slowly(request: Request, peer: Peer) -> Reply:
        await cluster.create_map(request, peer)
        (body,) = cluster.supervisors
        body["binaryData"] = {"supervisor": "AAAA"}
        return status(409, "AlreadyExists", "already exists")

    cluster.engine.on(f"POST {CORE}/configmaps", slowly, DEFAULT)
    async with cloche.Sandbox(cluster.settings()) as opened:
        with pytest.raises(cloche.BackendUnavailable, match="does not hold what it should") as caught:
            await opened.run(SPEC)
    assert "kubectl delete configmap" in caught.value.hint
    assert not cluster.made
