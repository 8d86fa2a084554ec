"""Runs that go well: what is asked of the API server, how often, and what is not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from typing import Any

import anyio
import pytest
from tests.wire.engine import Peer, Raw, Reply, Request
from tests.wire.kubernetes import (
    BEGIN,
    CREATE_JOB,
    CREATE_MAP,
    DELETE_JOB,
    HI,
    LOG,
    Kubernetes,
    Pod,
    bundle,
    frames,
    says,
    status,
)
from tests.wire.kubernetes_runs import run, sandbox
from tests.wire.runs import SPEC, wait_until

import cloche
from cloche.backends.kubernetes import backend
from cloche.backends.kubernetes.box import JobName, KubernetesBox
from cloche.backends.kubernetes.client import KubernetesClient
from cloche.backends.kubernetes.watch import Follower, Pods
from cloche.isolation import Isolation
from cloche.spec import Limits
from cloche.supervisor.bundle import Bundle
from cloche.supervisor.frames import Data, File, FileData
from cloche.testing.fake import end, ended_by

pytestmark = pytest.mark.anyio

EVERYTHING = frames(
    *BEGIN,
    Data("stdout", 0, b"out"),
    Data("stderr", 0, b"err"),
    File("a/b.txt", 3, truncated=False),
    FileData(b"abc"),
    end(3, stdout=3, stderr=3),
)
A_RUN = ["POST /jobs", "POST /configmaps", "GET /pods/POD/log", "DELETE /jobs/JOB"]
"""All that a healthy run asks."""


async def test_result(cluster: Kubernetes) -> None:
    """A run gives the result of the frames in its pod's log, and leaves nothing on the cluster."""
    cluster.play = says(EVERYTHING)
    result = await run(cluster)
    assert (result.outcome, result.exit_code, result.stdout, result.stderr) == ("exited", 3, "out", "err")
    assert [(a.path, a.data) for a in result.artifacts] == [("a/b.txt", b"abc")]
    assert (result.mode, result.isolation) == ("kubernetes", Isolation.CONTAINER)


async def test_cut_anywhere(cluster: Kubernetes) -> None:
    """However the log is cut into pieces, the result is the same."""
    steps: list[bytes | float] = []
    for at in range(0, len(EVERYTHING), 7):
        steps += [EVERYTHING[at : at + 7], 0.0]
    cluster.play = says(*steps)
    assert (await run(cluster)).stdout == "out"


async def test_requests_of_a_run(cluster: Kubernetes) -> None:
    """A healthy run makes four requests, in this order: nothing is polled, and nobody asks for the state of pod or Job."""
    async with sandbox(cluster) as opened:
        for _ in range(3):
            before = len(cluster.asked())
            await opened.run(SPEC, wait_cleanup=True)
            assert cluster.asked()[before:] == A_RUN


async def test_requests_of_a_sandbox(cluster: Kubernetes) -> None:
    """Opening a sandbox asks for its rights, looks for leftovers, lists the pods, watches them and has the supervisor."""
    async with sandbox(cluster):
        pass
    assert cluster.asked()[:2] == ["POST /rules", "GET /version"]
    (name,) = (body["metadata"]["name"] for body in cluster.supervisors)
    assert sorted(cluster.asked()[2:]) == [
        "GET /configmaps",
        f"GET /configmaps/{name}",
        "GET /jobs",
        "GET /pods",
        "GET /pods?watch",
        "POST /configmaps",
    ]


async def test_slow_start_asks_for_nothing_but_the_log(cluster: Kubernetes) -> None:
    """While a container is being made nothing is asked for but its log, in steps of no more than a fifth of a second."""

    def half(pod: Pod) -> None:
        pod.condition("PodReadyToStartContainers")
        cluster.group.start_soon(later, pod)

    async def later(pod: Pod) -> None:
        await anyio.sleep(0.6)
        pod.state("Running", running={})

    cluster.starts = half
    async with sandbox(cluster) as opened:
        before = len(cluster.asked())
        started = time.monotonic()
        await opened.run(SPEC, wait_cleanup=True)
        assert time.monotonic() - started < 1.2
    asked = cluster.asked()[before:]
    tries = asked.count("GET /pods/POD/log")
    assert 6 <= tries <= 14
    assert sorted(asked) == sorted([*A_RUN, *["GET /pods/POD/log"] * (tries - 1)])


async def test_log_waits_for_the_sandbox(cluster: Kubernetes) -> None:
    """The log is not asked for before the pod's sandbox is ready, and then at once."""
    ready_at: list[float] = []

    async def later(pod: Pod) -> None:
        await anyio.sleep(0.4)
        ready_at.append(time.monotonic())
        pod.starts()

    async def log(request: Request, peer: Peer) -> Raw | Reply:
        assert ready_at
        assert time.monotonic() - ready_at[0] < 0.15
        return await cluster.log(request, peer)

    cluster.starts = lambda pod: cluster.group.start_soon(later, pod)
    cluster.engine.on(LOG, log)
    assert (await run(cluster)).stdout == "hi"
    assert len(cluster.engine.asked(LOG)) == 1


@pytest.mark.parametrize("state", ["running", "terminated"])
async def test_cluster_without_the_condition(cluster: Kubernetes, state: str) -> None:
    """Where no condition tells of the sandbox, a container that runs, or has ended, has a log too."""
    cluster.starts = lambda pod: pod.state("Running", **{state: {}})
    assert (await run(cluster)).stdout == "hi"


async def test_result_at_the_last_frame(cluster: Kubernetes) -> None:
    """The result is there with the last frame: neither the end of the log, nor the pod's, nor what follows is waited for."""
    cluster.play = says(HI, b"more words\n", 20.0)
    async with sandbox(cluster) as opened:
        started = time.monotonic()
        assert (await opened.run(SPEC, wait_cleanup=True)).stdout == "hi"
        assert time.monotonic() - started < 2


async def test_one_watch_for_all(cluster: Kubernetes) -> None:
    """Runs side by side share one watch and one supervisor, and each gets what came out of its own pod."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        name = pod.run.encode()
        yield frames(*BEGIN, Data("stdout", 0, name), replace(end(0), stdout_bytes=len(name)))

    cluster.play = play
    got: dict[str, str] = {}

    async def one(opened: cloche.Sandbox, run_id: str) -> None:
        got[run_id] = (await opened.run(SPEC, run_id=run_id)).stdout

    async with sandbox(cluster, max_concurrent=20) as opened, anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(one, opened, f"r{number:02}")
    assert got == {name: name for name in got}
    assert len(got) == 20
    asked = cluster.asked()
    assert asked.count("GET /pods?watch") == asked.count("GET /pods") == 1
    assert asked.count("GET /pods/POD/log") == 20
    assert len(cluster.supervisors) == 1


async def test_selector(cluster: Kubernetes) -> None:
    """Pods are listed and watched by the label of this process alone, from the version of the list."""
    async with sandbox(cluster) as opened:
        pass
    listing, watch = (request for request in cluster.engine.requests if request.path.endswith("/pods"))
    assert listing.query["labelSelector"] == watch.query["labelSelector"] == f"cloche.dev/owner={opened.owner}"
    assert watch.query["resourceVersion"] == "100"


async def test_nothing_of_the_script_in_the_job(cluster: Kubernetes) -> None:
    """The script, its arguments, variables and stdin stand in the bundle, whole, and nowhere else."""
    secret = "print('a secret')\n" * 500
    spec = cloche.Spec(content=secret, name="main.py", args=["another secret"], env={"TOKEN": "hush"}, stdin=b"psst")
    await run(cluster, spec)
    (job,) = cluster.made
    data = bundle(cluster, job)
    for part in (secret.encode(), b"another secret", b"TOKEN=hush", b"psst"):
        assert part in data
    said = json.dumps(job)
    for word in ("secret", "hush", "TOKEN", "psst", "main.py"):
        assert word not in said
    for request in cluster.engine.requests:
        assert "secret" not in request.line


async def test_large_bundle(cluster: Kubernetes) -> None:
    """A bundle of more than one ConfigMap arrives whole and in order; all its parts are the Job's, and go with it."""
    stdin = bytes(range(256)) * 4096 * 3
    assert (await run(cluster, cloche.Spec(content="pass", name="main.py", stdin=stdin))).stdout == "hi"
    (job,) = cluster.made
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    parts = [body for body in cluster.made_maps if "cloche.dev/run" in body["metadata"]["labels"]]
    assert sorted(body["metadata"]["name"] for body in parts) == [f"{name}-{index:02}" for index in range(4)]
    for body in parts:
        assert body["metadata"]["ownerReferences"] == [
            {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
        ]
        assert body["immutable"] is True
        assert len(json.dumps(body)) < 1.5 * 2**20
    data = bundle(cluster, job)
    assert data.endswith(b"Z\0\0\0\0")
    # Records have 64 KiB each.
    whole = b"".join(data.split(b"C\0\0\1\0"))
    assert stdin in whole
    expected = Bundle(["x"], {}, Limits(), (), stdin).delivery_bytes
    assert 0 <= len(data) - expected < 4096


async def test_parts_side_by_side(cluster: Kubernetes) -> None:
    """The parts of a bundle are handed in side by side, but not all of them at once."""
    on_their_way = most = 0

    async def slowly(request: Request, peer: Peer) -> Reply:
        nonlocal on_their_way, most
        on_their_way += 1
        most = max(most, on_their_way)
        await anyio.sleep(0.05)
        on_their_way -= 1
        return await cluster.create_map(request, peer)

    async with sandbox(cluster) as opened:
        cluster.engine.on(CREATE_MAP, slowly)
        await opened.run(cloche.Spec(content="pass", name="main.py", stdin=bytes(7 * 10**6)))
    assert most == 4


async def test_large_bundle_is_encoded_elsewhere(cluster: Kubernetes) -> None:
    """The bodies of a large bundle are made in a thread: base64 of many megabytes must not stop the other runs."""
    made_in: set[int] = set()

    def maps(data: bytes) -> Iterator[Mapping[str, Any]]:
        made_in.add(threading.get_ident())
        yield {"metadata": {"name": "a", "labels": {}}, "binaryData": {}}

    async def mend() -> None:
        pass

    client = KubernetesClient(cluster.access(), "boxes")
    box = KubernetesBox(client, Pods(client, "x"), Follower(), JobName("j", "u"), maps, mend)
    await box.feed(Bundle(["x"], {}, Limits(), (), bytes(500_000)))
    await client.aclose()
    assert made_in
    assert threading.get_ident() not in made_in


@pytest.mark.parametrize("offset_s", [0.0, 86400.0, -86400.0], ids=["same", "ahead", "behind"])
async def test_labels(cluster: Kubernetes, offset_s: float) -> None:
    """Job, pod and ConfigMap say whose they are, and until when they may be there by the API server's clock; the Job also ends
    by itself then.
    """
    cluster.engine.clock_offset_s = offset_s
    async with sandbox(cluster) as opened:
        await opened.run(SPEC, run_id="r-one")
    (job,) = cluster.made
    things = [job, job["spec"]["template"], cluster.made_maps[-1]]
    for thing in things:
        labels, annotations = thing["metadata"]["labels"], thing["metadata"]["annotations"]
        assert labels["cloche.dev/run"] == "r-one"
        assert labels["cloche.dev/owner"] == opened.owner
        assert 120 < int(annotations["cloche.dev/expires"]) - (time.time() + offset_s) < 600
    assert 120 < job["spec"]["activeDeadlineSeconds"] < 600


async def test_settings_cannot_replace_our_labels(cluster: Kubernetes) -> None:
    """Labels and annotations of the settings stand beside cloche's own, and replace none."""
    more = {"cloche.dev/owner": "me", "team": "search"}
    async with sandbox(cluster, kube_labels=more, kube_annotations={"cloche.dev/expires": "1", "a": "b"}) as opened:
        await opened.run(SPEC)
    labels, annotations = cluster.made[0]["metadata"]["labels"], cluster.made[0]["metadata"]["annotations"]
    assert (labels["cloche.dev/owner"], labels["team"]) == (opened.owner, "search")
    assert int(annotations["cloche.dev/expires"]) > time.time()
    assert annotations["a"] == "b"


async def test_asked_to_stop(cluster: Kubernetes) -> None:
    """A run that is cancelled is ended by its supervisor, whom the pod's deletion tells, and keeps what was collected."""
    whole = frames(*BEGIN, Data("stdout", 0, b"so far"), ended_by(15, "cancel", stdout=6))
    so_far = b"".join(whole.splitlines(keepends=True)[:-1])

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        yield so_far
        await pod.terminating.wait()
        yield whole[len(so_far) :]

    cluster.play = play
    async with sandbox(cluster) as opened, anyio.create_task_group() as group:
        fold = opened.fold("r1")
        async for event in opened.stream(SPEC, run_id="r1"):
            fold.add(event)
            if isinstance(event, cloche.Output):
                group.start_soon(opened.cancel, "r1")
    result = fold.result()
    assert (result.outcome, result.stdout) == ("cancelled", "so far")


async def test_supervisor_that_is_deaf(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose supervisor does not heed its end is cancelled all the same, with what came."""
    monkeypatch.setattr(backend, "STOP_S", 0.2)
    cluster.play = says(frames(*BEGIN, Data("stdout", 0, b"so far")), 30.0)
    started = time.monotonic()
    async with sandbox(cluster) as opened, anyio.create_task_group() as group:
        fold = opened.fold("r1")
        async for event in opened.stream(SPEC, run_id="r1"):
            fold.add(event)
            if isinstance(event, cloche.Output):
                group.start_soon(opened.cancel, "r1")
    assert (fold.result().outcome, fold.result().stdout) == ("cancelled", "so far")
    assert time.monotonic() - started < 5


async def test_pod_that_only_a_question_shows(cluster: Kubernetes) -> None:
    """A watch on which nothing comes does not stop a run: the pod is looked for after a while."""
    cluster.deaf = True
    started = time.monotonic()
    assert (await run(cluster)).stdout == "hi"
    assert time.monotonic() - started < 3


async def test_other_peoples_pods(cluster: Kubernetes) -> None:
    """What the watch tells of pods of other runs, or of things that are no pods of cloche's, concerns no run."""

    def crowd(pod: Pod) -> None:
        other = json.loads(json.dumps(pod.body))
        other["metadata"] |= {"name": "other", "uid": "other"}
        other["metadata"]["labels"]["batch.kubernetes.io/job-name"] = "other"
        other["status"] = {"phase": "Failed", "reason": "Evicted"}
        for kind in ("ADDED", "MODIFIED", "DELETED"):
            cluster.note(kind, other)
        del other["metadata"]["labels"]["batch.kubernetes.io/job-name"]
        cluster.note("DELETED", other)
        Pod.starts(pod)

    cluster.starts = crowd
    assert (await run(cluster)).stdout == "hi"


async def test_two_pods_of_one_run(cluster: Kubernetes) -> None:
    """Of two pods of one Job the first one is the run's: the end of the other is not its end."""

    def twice(pod: Pod) -> None:
        second = json.loads(json.dumps(pod.body))
        second["metadata"] |= {"name": f"{pod.name}-second", "uid": "second"}
        second["status"] = {"phase": "Failed", "reason": "Evicted"}
        cluster.note("ADDED", second)
        cluster.note("DELETED", second)
        Pod.starts(pod)

    cluster.starts = twice
    assert (await run(cluster)).stdout == "hi"
    (log,) = cluster.engine.asked(LOG)
    assert log.path.split("/")[-2] == cluster.all_pods[0].name


async def test_name_of_a_pod_is_encoded(cluster: Kubernetes) -> None:
    """A pod's name that leads elsewhere stays one part of the path."""

    def renamed(pod: Pod) -> None:
        pod.body["metadata"]["name"] = "../../secrets/x?y"
        Pod.starts(pod)

    cluster.starts = renamed
    cluster.engine.on("GET */log", status(403, "Forbidden", "no"))
    async with cloche.Sandbox(cluster.settings(start_timeout=0.3)) as opened:
        with pytest.raises(cloche.ClocheError):
            await opened.run(SPEC)
    targets = [request.target for request in cluster.engine.requests if "/log?" in request.target]
    assert set(targets) == {"/api/v1/namespaces/boxes/pods/..%2F..%2Fsecrets%2Fx%3Fy/log?container=box&follow=true"}


async def test_closed_twice(cluster: Kubernetes) -> None:
    """A sandbox may be closed twice; each of its runs is ended by it."""
    cluster.play = says(frames(*BEGIN), 30.0)
    async with sandbox(cluster) as opened, anyio.create_task_group() as group:

        async def lost() -> None:
            assert (await opened.run(SPEC)).outcome == "cancelled"

        group.start_soon(lost)
        await wait_until(lambda: cluster.all_pods and cluster.all_pods[0].reads)
        await opened.close()
        await opened.close()
    assert len(cluster.engine.asked(DELETE_JOB)) == 1


async def test_result_before_removal(cluster: Kubernetes) -> None:
    """The result is handed out while the Job is still being deleted; leaving the sandbox waits for that."""
    may_go = anyio.Event()

    async def slowly(request: Request, peer: Peer) -> Reply:
        await may_go.wait()
        return await cluster.delete_job(request, peer)

    cluster.engine.on(DELETE_JOB, slowly)
    async with sandbox(cluster) as opened:
        result = await opened.run(SPEC)
        assert (result.stdout, result.timings_ms["cleanup"]) == ("hi", None)
        assert cluster.jobs
        may_go.set()


async def test_one_at_a_time_uid(cluster: Kubernetes) -> None:
    """Each box has a uid of its own, from the range that is set."""
    async with sandbox(cluster, kube_run_as_user="5000-4000000") as opened:
        for _ in range(8):
            await opened.run(SPEC)
    uids = [job["spec"]["template"]["spec"]["securityContext"]["runAsUser"] for job in cluster.made]
    assert all(5000 <= uid <= 4_000_000 for uid in uids)
    assert len(set(uids)) > 5


async def test_restarted_between_two_runs(cluster: Kubernetes) -> None:
    """An API server whose connections all broke between two runs is spoken to again, and watched again."""
    async with sandbox(cluster) as opened:
        for _ in range(3):
            assert (await opened.run(SPEC, wait_cleanup=True)).stdout == "hi"
            before = len(cluster.watched)
            cluster.engine.cut()
            await wait_until(lambda before=before: len(cluster.watched) > before)  # type: ignore[misc]


async def test_not_one_request_too_many_when_idle(cluster: Kubernetes) -> None:
    """A sandbox without runs asks for nothing."""
    async with sandbox(cluster):
        before = len(cluster.asked())
        await anyio.sleep(0.3)
        assert len(cluster.asked()) == before


async def test_create_job_is_asked_once(cluster: Kubernetes) -> None:
    """A Job is named by the client, after its run, and asked for with what makes its pod run once and no more."""
    await run(cluster)
    (request,) = cluster.engine.asked(CREATE_JOB)
    body = request.json()
    assert body["metadata"]["name"].startswith(f"cloche-{body['metadata']['labels']['cloche.dev/run']}-")
    assert "generateName" not in body["metadata"]
    assert (body["spec"]["backoffLimit"], body["spec"]["template"]["spec"]["restartPolicy"]) == (0, "Never")
