"""A Kubernetes API server in good order, played by an :class:`Engine`, with the cluster behind it. A test changes what is to go
wrong.

Pods run nothing: what comes out of one is written by the test (``Kubernetes.play``). A Job has its pod at once, and the pod
its container as soon as all ConfigMaps that it mounts are there.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, cast

import anyio
from anyio.abc import TaskGroup
from tests.wire.engine import DEFAULT, GONE, Engine, Peer, Raw, Reply, Request, Word

import cloche
from cloche.backends.kubernetes.credentials import Credentials, WrittenCredentials
from cloche.backends.kubernetes.kubeconfig import Access
from cloche.supervisor.frames import Data, Frame
from cloche.testing.fake import begin, encode_frames, end

NAMESPACE = "boxes"
CORE, BATCH = f"/api/v1/namespaces/{NAMESPACE}", f"/apis/batch/v1/namespaces/{NAMESPACE}"
CREATE_JOB, DELETE_JOB, CREATE_MAP = f"POST {BATCH}/jobs", f"DELETE {BATCH}/jobs/*", f"POST {CORE}/configmaps"
LOG = f"GET {CORE}/pods/*/log"
RULES, REVIEW = (f"POST /apis/authorization.k8s.io/v1/selfsubject{what}reviews" for what in ("rules", "access"))
RIGHTS = {
    "batch jobs": {"create", "delete", "get", "list"},
    " configmaps": {"create", "delete", "get", "list"},
    " pods": {"get", "list", "watch"},
    " pods/log": {"get"},
    " events": {"list"},
}
"""What the Role of deploy/kubernetes gives, by API group and resource."""
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n"
FINISHED = b"0\r\n\r\n"
PARTIAL = "PartialObjectMetadata"
BEGIN: list[Any] = begin()


def frames(*given: Frame) -> bytes:
    """What the supervisor writes."""
    return encode_frames(given)


HI = frames(*BEGIN, Data("stdout", 0, b"hi"), end(stdout=2))
SO_FAR = frames(*BEGIN, Data("stdout", 0, b"so far"))


def chunk(data: bytes) -> bytes:
    """A piece of a body that is chunked."""
    return b"%x\r\n%s\r\n" % (len(data), data) if data else b""


def status(code: int, reason: str = "", message: str = "", **more: Any) -> Reply:
    """The API server's no."""
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }
    return Reply(code, {**body, **more})


def quota(what: str = "jobs") -> Reply:
    """The no of a quota."""
    said = f'{what} "x" is forbidden: exceeded quota: q, requested: count/{what}=1, used: count/{what}=5, limited: 5'
    return status(403, "Forbidden", said)


CREATING = status(400, "BadRequest", 'container "box" in pod "x" is waiting to start: ContainerCreating')
UNREACHABLE = status(500, "InternalError", 'Get "https://10.0.0.1:10250/containerLogs/x": dial tcp: connection refused')


class Pod:
    """A pod that is there. What is changed by its methods the watchers hear."""

    def __init__(self, cluster: Kubernetes, job: dict[str, Any], name: str) -> None:
        self.cluster = cluster
        self.job = job["metadata"]["name"]
        self.name = name
        self.reads = 0
        """How often its log was asked for, and was there."""
        self.readers = 0
        self.terminating = anyio.Event()
        self.ends_itself = True
        """Whether its container ends soon after its last frame."""
        template = json.loads(json.dumps(job["spec"]["template"]))
        template["metadata"].setdefault("labels", {})["batch.kubernetes.io/job-name"] = self.job
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": self.job, "controller": True}
        template["metadata"]["ownerReferences"] = [{**owner, "uid": job["metadata"]["uid"]}]
        self.body: dict[str, Any] = {
            "metadata": {"name": name, "namespace": NAMESPACE, "uid": secrets.token_hex(8), **template["metadata"]},
            "spec": {"containers": template["spec"]["containers"]},
            "status": {"phase": "Pending"},
        }

    @property
    def run(self) -> str:
        return str(self.body["metadata"]["labels"]["cloche.dev/run"])

    @property
    def begun(self) -> bool:
        """Whether its container has a log."""
        state = (self.body["status"].get("containerStatuses") or [{}])[0].get("state", {})
        return bool(state.keys() & {"running", "terminated"})

    def tell(self, **status: Any) -> None:
        """Change its status."""
        self.body["status"] = {**self.body["status"], **status}
        self.cluster.note("MODIFIED", self.body)

    def placed(self) -> None:
        """It has a node."""
        self.body["spec"]["nodeName"] = "n1"
        self.tell(conditions=[{"type": "PodScheduled", "status": "True"}])

    def condition(self, kind: str, value: str = "True", **more: str) -> None:
        known = [found for found in self.body["status"].get("conditions", []) if found["type"] != kind]
        self.tell(conditions=[*known, {"type": kind, "status": value, **more}])

    def state(self, phase: str = "Pending", **state: Any) -> None:
        """Its phase, and the state of its container."""
        self.tell(phase=phase, containerStatuses=[{"name": "box", "state": state}] if state else [])

    def starts(self) -> None:
        self.condition("PodReadyToStartContainers")
        self.state("Running", running={})

    def ends(self, exit_code: int = 0, reason: str = "Completed", message: str = "") -> None:
        said = {"exitCode": exit_code, "reason": reason, "message": message}
        self.state("Failed" if exit_code else "Succeeded", terminated=said)

    def gone(self) -> None:
        """It is not there any more."""
        if self.cluster.pods.pop(self.name, None) is not None:
            self.cluster.note("DELETED", self.body)

    def terminate(self) -> None:
        """Somebody deletes it: its supervisor is told, and it goes when nobody reads its log any more."""
        self.body["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        self.terminating.set()
        self.cluster.note("MODIFIED", self.body)
        if not self.readers:
            self.gone()


Play: TypeAlias = Callable[[Pod], AsyncIterator[bytes]]
Live: TypeAlias = Callable[[Pod], object]


def says(*steps: bytes | float) -> Play:
    """What stands in a pod's log; numbers are pauses in seconds."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        for step in steps:
            if isinstance(step, bytes):
                yield step
            else:
                await anyio.sleep(step)

    return play


def ends_with(said: bytes, exit_code: int = 137, reason: str = "Error") -> Play:
    """A log that ends, and a container that has ended with it."""

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        yield said
        pod.ends(exit_code, reason)

    return play


class Kubernetes:
    """The cluster. ``jobs``, ``config_maps`` and ``pods`` are there now, ``made`` are all Jobs that ever were."""

    def __init__(self, engine: Engine, folder: Path, group: TaskGroup) -> None:
        self.engine = engine
        self.group = group
        """For what happens in the cluster by itself."""
        self.base = f"http{engine.address.removeprefix('tcp')}"
        self.play = says(HI)
        self.places: Live = Pod.placed
        """What becomes of a new pod."""
        self.starts: Live = Pod.starts
        """What becomes of a pod whose ConfigMaps are all there."""
        self.makes_pods = True
        self.jobs: dict[str, dict[str, Any]] = {}
        self.config_maps: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, Pod] = {}
        self.made: list[dict[str, Any]] = []
        self.made_maps: list[dict[str, Any]] = []
        self.all_pods: list[Pod] = []
        self.events: list[tuple[str, str]] = []
        """Reason and message of what is noted about every Job."""
        self.denied: set[str] = set()
        """Rights such as "create jobs" that nobody has."""
        self.tells_all = True
        """Whether the cluster can list all rights that somebody has."""
        self.page = 500
        """Objects in a list, at most."""
        self.forgotten = 0
        """Versions up to this one are forgotten."""
        self.deaf = False
        """Whether watchers hear nothing."""
        self.on_watch: list[Word] = []
        """What is said to the next watches; then it is as it should be."""
        self.on_list: list[Word] = []
        """The same for lists of pods."""
        self.watched: list[str] = []
        """The versions from which pods were watched."""
        self.watching: set[anyio.CancelScope] = set()
        self._version = 100
        self._history: list[tuple[int, str, dict[str, Any]]] = []
        self._news = anyio.Event()
        self._kubeconfig = folder / "kubeconfig"
        known = {"clusters": [{"name": "c", "cluster": {"server": self.base}}], "users": [{"name": "u", "user": {}}]}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        self._kubeconfig.write_text(json.dumps({"current-context": "c", "contexts": [context], **known}))
        table: dict[str, Word] = {
            "GET /version": Reply(body={"gitVersion": "v1.37.2"}),
            RULES: self._rules,
            REVIEW: self._review,
            CREATE_JOB: self.create_job,
            DELETE_JOB: self.delete_job,
            f"GET {BATCH}/jobs": self._list_jobs,
            f"GET {BATCH}/jobs/*": self._get_job,
            CREATE_MAP: self.create_map,
            f"GET {CORE}/configmaps": self._list_maps,
            f"GET {CORE}/configmaps/*": self._get_map,
            f"DELETE {CORE}/configmaps/*": self.delete_map,
            f"GET {CORE}/pods/*": self._get_pod,
            f"GET {CORE}/pods": self.pods_of,
            f"GET {CORE}/events": self._list_events,
            LOG: self.log,
        }
        for route, word in table.items():
            engine.on(route, word)

    def settings(self, **more: Any) -> cloche.Settings:
        """Settings that lead to this cluster and to no other."""
        known = {"mode": "kubernetes", "fallback": False, "kube_config": str(self._kubeconfig)}
        return cloche.Settings.model_validate({**known, "kube_namespace": NAMESPACE, **more})

    def access(self, credentials: Credentials | None = None) -> Access:
        """The same for a client alone."""
        return Access(self.base, f"{self.base} (a test)", credentials or WrittenCredentials())

    @property
    def supervisors(self) -> list[dict[str, Any]]:
        """The ConfigMaps that hold one."""
        return [body for body in self.config_maps.values() if "cloche.dev/supervisor" in body["metadata"]["labels"]]

    def asked(self) -> list[str]:
        """What was asked so far, with watches told from lists, and without names that are made up."""
        found = []
        for request in self.engine.requests:
            said = str(request) + ("?watch" if request.query.get("watch") == "true" else "")
            for name, word in [(job["metadata"]["name"], "JOB") for job in self.made]:
                said = said.replace(f"{name}-p", "POD").replace(name, word)
            found.append(
                said.replace(CORE, "").replace(BATCH, "").replace(RULES, "POST /rules").replace(REVIEW, "POST /review")
            )
        return found

    def note(self, kind: str, body: dict[str, Any]) -> None:
        """A change of a pod, of which all who watch hear."""
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self._history.append((self._version, kind, json.loads(json.dumps(body))))
        self._news.set()
        self._news = anyio.Event()

    def bookmark(self) -> str:
        """All who watch hear how far the world has come; the version."""
        self.note("BOOKMARK", {"kind": "Pod", "metadata": {}})
        return str(self._version)

    def add_job(self, name: str, labels: Mapping[str, str], annotations: Mapping[str, str]) -> None:
        """A Job that somebody else made."""
        self.jobs[name] = {"metadata": _metadata(name, labels, annotations), "spec": {"secret": "hush"}}

    def add_map(self, name: str, labels: Mapping[str, str], annotations: Mapping[str, str]) -> None:
        """A ConfigMap that somebody else made."""
        self.config_maps[name] = {"metadata": _metadata(name, labels, annotations), "data": {"secret": "hush"}}

    # --- what is asked ------------------------------------------------------------------------------------------------

    async def _rules(self, request: Request, _: Peer) -> Reply:
        assert request.json()["spec"] == {"namespace": NAMESPACE}
        found = []
        for what, verbs in RIGHTS.items():
            group, __, resource = what.partition(" ")
            held = sorted(verb for verb in verbs if f"{verb} {resource}" not in self.denied)
            found.append({"verbs": held, "apiGroups": [group], "resources": [resource]})
        rules = found if self.tells_all else found[:1]
        return Reply(201, {"status": {"resourceRules": rules, "incomplete": not self.tells_all}})

    async def _review(self, request: Request, _: Peer) -> Reply:
        asked = request.json()["spec"]["resourceAttributes"]
        assert asked["namespace"] == NAMESPACE
        what = "/".join(part for part in (asked["resource"], asked["subresource"]) if part)
        return Reply(201, {"status": {"allowed": f"{asked['verb']} {what}" not in self.denied}})

    async def create_job(self, request: Request, _: Peer) -> Reply:
        body = request.json()
        name = body["metadata"]["name"]
        if name in self.jobs:
            return status(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
        body["metadata"]["uid"] = secrets.token_hex(8)
        self.jobs[name] = body
        self.made.append(body)
        if self.makes_pods:
            self.make_pod(body)
        return Reply(201, body)

    def make_pod(self, job: dict[str, Any], suffix: str = "p") -> Pod:
        """Have the Job's controller make a pod."""
        pod = Pod(self, job, f"{job['metadata']['name']}-{suffix}")
        self.pods[pod.name] = pod
        self.all_pods.append(pod)
        self.note("ADDED", pod.body)
        self.places(pod)
        self._start(pod)
        return pod

    def _start(self, pod: Pod) -> None:
        job = self.jobs.get(pod.job)
        if job is None or not pod.body["spec"].get("nodeName") or pod.begun:
            return
        sources = job["spec"]["template"]["spec"]["volumes"][0]["projected"]["sources"]
        if all(source["configMap"]["name"] in self.config_maps for source in sources):
            self.starts(pod)

    async def delete_job(self, request: Request, _: Peer) -> Reply:
        name = request.path.rpartition("/")[2]
        if self.jobs.pop(name, None) is None:
            return status(404, "NotFound", f'jobs.batch "{name}" not found')
        assert request.json()["propagationPolicy"] == "Background"
        for other, body in list(self.config_maps.items()):
            if any(owner["name"] == name for owner in body["metadata"].get("ownerReferences", [])):
                del self.config_maps[other]
        for pod in list(self.pods.values()):
            if pod.job == name:
                pod.terminate()
        return Reply(body={"kind": "Status", "status": "Success"})

    async def create_map(self, request: Request, _: Peer) -> Reply:
        body = request.json()
        name = body["metadata"]["name"]
        if name in self.config_maps:
            return status(409, "AlreadyExists", f'configmaps "{name}" already exists')
        self.config_maps[name] = body
        self.made_maps.append(body)
        for pod in list(self.pods.values()):
            self._start(pod)
        return Reply(201, body)

    async def delete_map(self, request: Request, _: Peer) -> Reply:
        name = request.path.rpartition("/")[2]
        if self.config_maps.pop(name, None) is None:
            return status(404, "NotFound", f'configmaps "{name}" not found')
        return Reply(body={"kind": "Status", "status": "Success"})

    async def _get_job(self, request: Request, _: Peer) -> Reply:
        found = self.jobs.get(request.path.rpartition("/")[2])
        return status(404, "NotFound", "jobs.batch not found") if found is None else Reply(body=found)

    async def _get_map(self, request: Request, _: Peer) -> Reply:
        found = self.config_maps.get(request.path.rpartition("/")[2])
        return status(404, "NotFound", "configmaps not found") if found is None else Reply(body=found)

    async def _get_pod(self, request: Request, _: Peer) -> Reply:
        found = self.pods.get(request.path.rpartition("/")[2])
        return status(404, "NotFound", "pods not found") if found is None else Reply(body=found.body)

    async def _list_jobs(self, request: Request, _: Peer) -> Reply:
        return self._list(request, list(self.jobs.values()))

    async def _list_maps(self, request: Request, _: Peer) -> Reply:
        return self._list(request, list(self.config_maps.values()))

    async def _list_events(self, request: Request, _: Peer) -> Reply:
        name, __, uid = request.query["fieldSelector"].partition("=")
        known = {job["metadata"]["uid"] for job in self.jobs.values()}
        found = self.events if name == "involvedObject.uid" and uid in known else []
        return Reply(body={"items": [{"reason": reason, "message": message} for reason, message in found]})

    def _list(self, request: Request, found: list[dict[str, Any]]) -> Reply:
        chosen = [body for body in found if _selected(body, request.query.get("labelSelector", ""))]
        begin_at = int(request.query.get("continue", "0"))
        end_at = begin_at + min(int(request.query.get("limit", "500")), self.page)
        items = chosen[begin_at:end_at]
        if PARTIAL in request.headers.get("accept", ""):
            items = [{"kind": PARTIAL, "metadata": body["metadata"]} for body in items]
        metadata = {"resourceVersion": str(self._version)}
        if end_at < len(chosen):
            metadata["continue"] = str(end_at)
        return Reply(body={"kind": "List", "metadata": metadata, "items": items})

    async def pods_of(self, request: Request, peer: Peer) -> Reply | Raw:
        watch = request.query.get("watch") == "true"
        words = self.on_watch if watch else self.on_list
        if watch:
            self.watched.append(request.query["resourceVersion"])
        word = words.pop(0) if words else DEFAULT
        if word is DEFAULT:
            return await self._watch(request, peer) if watch else self.list_pods(request)
        return word if isinstance(word, Reply | Raw) else await cast("Handler", word)(request, peer)

    def list_pods(self, request: Request) -> Reply:
        """The pods as they are now."""
        return self._list(request, [pod.body for pod in self.pods.values()])

    async def _watch(self, request: Request, peer: Peer) -> Raw | Reply:
        assert request.query["allowWatchBookmarks"] == "true"
        version = int(request.query["resourceVersion"] or self._version)
        if version < self.forgotten:
            return EXPIRED
        async with attended(peer) as scope:
            self.watching.add(scope)
            try:
                await peer.send(STREAM)
                while not scope.cancel_called:
                    news = self._news
                    for at, kind, body in self._history:
                        if at > version and not self.deaf:
                            version = at
                            if kind == "BOOKMARK" or _selected(body, request.query["labelSelector"]):
                                await peer.send(chunk(json.dumps({"type": kind, "object": body}).encode() + b"\n"))
                    await news.wait()
            finally:
                self.watching.discard(scope)
        return Raw()

    def cut_watches(self) -> None:
        """The connections of all who watch break."""
        for scope in list(self.watching):
            scope.cancel()

    async def log(self, request: Request, peer: Peer) -> Raw | Reply:
        assert request.query == {"container": "box", "follow": "true"}
        pod = self.pods.get(request.path.split("/")[-2])
        if pod is None:
            return status(404, "NotFound", "pods not found")
        if not pod.begun:
            return CREATING
        pod.reads += 1
        pod.readers += 1
        async with attended(peer):
            try:
                await peer.send(STREAM)
                said = b""
                async for data in self.play(pod):
                    await peer.send(chunk(data))
                    said = said[-20:] + data
                    if b" end " in said or b" fail " in said:
                        said = b""
                        self.group.start_soon(self._end, pod)
                await peer.send(FINISHED)
            finally:
                pod.readers -= 1
                if pod.terminating.is_set():
                    pod.gone()
        return Raw()

    async def _end(self, pod: Pod) -> None:
        await anyio.sleep(0.05)
        if pod.ends_itself and pod.name in self.pods:
            pod.ends()


EXPIRED = status(410, "Expired", "too old resource version: 1 (2)")
EXPIRED_EVENT = Raw(STREAM, chunk(json.dumps({"type": "ERROR", "object": EXPIRED.body}).encode() + b"\n"), FINISHED)


@asynccontextmanager
async def attended(peer: Peer) -> AsyncIterator[anyio.CancelScope]:
    """A scope that is cancelled when the other side leaves."""

    async def attend(scope: anyio.CancelScope) -> None:
        with suppress(*GONE):
            await peer.reader.read(1)
        scope.cancel()

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(attend, scope)
            with suppress(*GONE):  # or the test has the connection break
                yield scope
            group.cancel_scope.cancel()


def _metadata(name: str, labels: Mapping[str, str], annotations: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "uid": secrets.token_hex(8),
        "labels": {"app.kubernetes.io/managed-by": "cloche", **labels},
        "annotations": dict(annotations),
        "creationTimestamp": "2026-01-02T03:04:05Z",
    }


def _selected(body: Mapping[str, Any], selector: str) -> bool:
    name, _, value = selector.partition("=")
    return not selector or body["metadata"].get("labels", {}).get(name) == value


def bundle(cluster: Kubernetes, job: Mapping[str, Any]) -> bytes:
    """What the pod of a Job finds where its supervisor is told to look, in the order in which it is told."""
    pod = job["spec"]["template"]["spec"]
    items: dict[str, bytes] = {}
    maps = {body["metadata"]["name"]: body for body in cluster.made_maps}
    for source in pod["volumes"][0]["projected"]["sources"]:
        for item in source["configMap"]["items"]:
            data = maps[source["configMap"]["name"]]["binaryData"][item["key"]]
            items[f"/run/cloche/{item['path']}"] = base64.b64decode(data)
    command = pod["containers"][0]["command"]
    return b"".join(items[path] for option, path in pairwise(command) if option == "--bundle")


Handler: TypeAlias = Callable[[Request, Peer], Awaitable[Reply | Raw]]
"""What answers a request."""
