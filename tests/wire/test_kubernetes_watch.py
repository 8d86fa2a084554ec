"""The watch of pods: from a list's version on, over connections that break, and from anew where the server has forgotten."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import pytest
from tests.wire.engine import DEFAULT, Peer, Raw, Reply, Request, Word
from tests.wire.kubernetes import (
    CORE,
    EXPIRED,
    EXPIRED_EVENT,
    FINISHED,
    STREAM,
    Kubernetes,
    Pod,
    chunk,
    status,
)
from tests.wire.runs import wait_until

from cloche.backends.kubernetes import client, watch
from cloche.backends.kubernetes.client import MAX_EVENT_LINE, KubernetesClient
from cloche.backends.kubernetes.watch import Follower, Pods

pytestmark = pytest.mark.anyio

SELECTOR = "cloche.dev/owner=me"
LIST = f"GET {CORE}/pods"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried with shorter pauses between."""
    monkeypatch.setattr(watch, "PAUSES_S", (0.02, 0.02, 0.05))
    monkeypatch.setattr(client, "PAUSES_S", (0.02, 0.02))


@dataclass
class Watched:
    """A watch that runs, and who follows it."""

    cluster: Kubernetes
    pods: Pods
    followers: dict[str, Follower] = field(default_factory=dict)

    def new_pod(self, run_id: str = "r1", suffix: str = "p") -> Pod:
        labels = {"cloche.dev/run": run_id, "cloche.dev/owner": "me"}
        template = {"metadata": {"labels": labels}, "spec": {"containers": []}}
        job = {"metadata": {"name": run_id, "uid": run_id}, "spec": {"template": template}}
        return self.cluster.make_pod(job, suffix)

    async def hears(self, phase: str, run_id: str = "r1") -> None:
        """Until the run's pod has come so far as its follower knows."""
        await wait_until(lambda: (pod := self.followers[run_id].pod) is not None and pod.phase == phase)


@asynccontextmanager
async def watching(cluster: Kubernetes) -> AsyncIterator[Watched]:
    spoken = KubernetesClient(cluster.access(), "boxes")
    watched = Watched(cluster, Pods(spoken, SELECTOR))
    try:
        async with anyio.create_task_group() as group:
            with watched.pods.follow("r1") as watched.followers["r1"], watched.pods.follow("r2") as other:
                watched.followers["r2"] = other
                group.start_soon(watched.pods.watch)
                await wait_until(lambda: cluster.watched)
                yield watched
                group.cancel_scope.cancel()
    finally:
        await spoken.aclose()


def lists(cluster: Kubernetes) -> int:
    return len([request for request in cluster.engine.asked(LIST) if "watch" not in request.query])


async def test_from_the_list_on(cluster: Kubernetes) -> None:
    """What is there before the watch begins is told by the list; what comes, by the watch from the list's version."""
    async with watching(cluster) as watched:
        pod = watched.new_pod()
        await watched.hears("Pending")
        pod.starts()
        await watched.hears("Running")
    cluster.watched.clear()
    async with watching(cluster) as watched:
        await watched.hears("Running")
        assert cluster.watched == [str(cluster._version)]
        pod.gone()
        await wait_until(lambda: (known := watched.followers["r1"].pod) is not None and known.deleted)


@pytest.mark.parametrize("how", [EXPIRED, EXPIRED_EVENT], ids=["status", "event"])
async def test_forgotten_at_the_beginning(cluster: Kubernetes, how: Word) -> None:
    """A version that the server has forgotten by the time the watch begins leads to a new list."""
    cluster.on_watch = [how]
    async with watching(cluster) as watched:
        watched.new_pod().starts()
        await watched.hears("Running")
        await wait_until(lambda: len(cluster.watched) == 2)
        assert lists(cluster) == 2


@pytest.mark.parametrize("how", ["status", "event"])
async def test_forgotten_in_the_middle(cluster: Kubernetes, how: str) -> None:
    """A version that is forgotten while the connection is broken, or as the server says on it, leads to a new list, and what
    happened meanwhile is found in it.
    """
    async with watching(cluster) as watched:
        pod = watched.new_pod()
        await watched.hears("Pending")
        cluster.on_watch = [EXPIRED if how == "status" else EXPIRED_EVENT]
        cluster.deaf = True
        pod.starts()
        cluster.deaf = False
        cluster.cut_watches()
        await watched.hears("Running")
        await wait_until(lambda: len(cluster.watched) == 3)
        assert lists(cluster) == 2


async def test_forgotten_again_and_again(cluster: Kubernetes) -> None:
    """A server that forgets every version at once is asked with pauses, not in a storm."""
    cluster.on_watch = [EXPIRED] * 100_000
    async with watching(cluster):
        await anyio.sleep(1.0)
        assert len(cluster.watched) < 12


@pytest.mark.parametrize("how", [Raw(STREAM, FINISHED), Reply(200, b"")], ids=["chunked", "empty"])
async def test_ends_at_once_again_and_again(cluster: Kubernetes, how: Word) -> None:
    """A server that ends every watch as soon as it is there is asked with pauses, not in a storm."""
    cluster.on_watch = [how] * 100_000
    async with watching(cluster):
        await anyio.sleep(1.0)
        assert len(cluster.watched) < 12


async def test_ends_after_one_word_again_and_again(cluster: Kubernetes) -> None:
    """The same where each watch brings one word before its end."""
    bookmark = {"type": "BOOKMARK", "object": {"kind": "Pod", "metadata": {"resourceVersion": "177"}}}
    cluster.on_watch = [Raw(STREAM, chunk(json.dumps(bookmark).encode() + b"\n"), FINISHED)] * 100_000
    async with watching(cluster):
        await anyio.sleep(1.0)
        assert len(cluster.watched) < 12


async def test_ended_by_the_server(cluster: Kubernetes) -> None:
    """A watch whose time is over goes on from the last version, without a list."""
    bookmark = {"type": "BOOKMARK", "object": {"kind": "Pod", "metadata": {"resourceVersion": "177"}}}
    cluster.on_watch = [Raw(STREAM, chunk(json.dumps(bookmark).encode() + b"\n"), FINISHED), DEFAULT]
    cluster._version = 170
    async with watching(cluster):
        await wait_until(lambda: len(cluster.watched) == 2)
    assert cluster.watched == ["170", "177"]
    assert lists(cluster) == 1


async def test_bookmarks(cluster: Kubernetes) -> None:
    """A bookmark moves the version from which the watch goes on, although nothing of ours has happened."""
    async with watching(cluster):
        version = cluster.bookmark()
        await anyio.sleep(0.05)
        cluster.cut_watches()
        await wait_until(lambda: len(cluster.watched) == 2)
    assert cluster.watched == ["100", version]
    assert lists(cluster) == 1


async def test_goes_on_after_a_cut(cluster: Kubernetes) -> None:
    """A connection that breaks is followed by one from the last version: nothing is lost, and nothing listed again."""
    async with watching(cluster) as watched:
        pod = watched.new_pod()
        await watched.hears("Pending")
        seen = str(cluster._version)
        cluster.deaf = True
        pod.starts()
        await anyio.sleep(0.02)
        cluster.deaf = False
        cluster.cut_watches()
        await watched.hears("Running")
    assert cluster.watched == ["100", seen]
    assert lists(cluster) == 1


async def test_deleted_while_away(cluster: Kubernetes) -> None:
    """A pod that is missing from a new list has been deleted; others are not."""
    async with watching(cluster) as watched:
        pod, other = watched.new_pod(), watched.new_pod("r2")
        other.starts()
        await watched.hears("Running", "r2")
        cluster.on_watch = [EXPIRED]
        cluster.pods.pop(pod.name)
        cluster.cut_watches()
        await wait_until(lambda: (known := watched.followers["r1"].pod) is not None and known.deleted)
        known = watched.followers["r2"].pod
        assert known is not None
        assert not known.deleted


async def test_made_while_the_list_was_on_its_way(cluster: Kubernetes) -> None:
    """A pod that was found by a question of its own is not deleted because an older list does not have it yet."""
    go_on = anyio.Event()

    async def slowly(request: Request, peer: Peer) -> Reply:
        before = cluster.list_pods(request)
        await go_on.wait()
        return before

    cluster.on_watch = [EXPIRED, DEFAULT]
    cluster.on_list = [DEFAULT, slowly]
    async with watching(cluster) as watched:
        await wait_until(lambda: lists(cluster) == 2)
        watched.new_pod().starts()
        await watched.pods.look("r1")
        await watched.hears("Running")
        go_on.set()
        await wait_until(lambda: len(cluster.watched) == 2)
        known = watched.followers["r1"].pod
        assert known is not None
        assert not known.deleted


async def test_older_news(cluster: Kubernetes) -> None:
    """What the watch tells late does not take back what a question has shown since."""
    async with watching(cluster) as watched:
        pod = watched.new_pod()
        await watched.hears("Pending")
        cluster.deaf = True
        pod.starts()
        older = json.dumps({"type": "MODIFIED", "object": pod.body}).encode() + b"\n"
        pod.ends()
        await watched.pods.look("r1")
        await watched.hears("Succeeded")
        cluster.on_watch = [Raw(STREAM, chunk(older), math.inf)]
        cluster.cut_watches()
        await wait_until(lambda: len(cluster.watched) == 2)
        await anyio.sleep(0.1)
        known = watched.followers["r1"].pod
        assert known is not None
        assert known.phase == "Succeeded"


async def test_second_pod(cluster: Kubernetes) -> None:
    """Of two pods of a run the first is followed, also when it is gone."""
    async with watching(cluster) as watched:
        first = watched.new_pod()
        await watched.hears("Pending")
        second = watched.new_pod(suffix="q")
        first.gone()
        second.starts()
        await wait_until(lambda: (known := watched.followers["r1"].pod) is not None and known.deleted)
        await anyio.sleep(0.05)
        known = watched.followers["r1"].pod
        assert known is not None
        assert (known.name, known.deleted) == (first.name, True)


POD = {
    "metadata": {"name": "p", "uid": "u", "resourceVersion": "150", "labels": {"batch.kubernetes.io/job-name": "r1"}}
}


@pytest.mark.parametrize(
    "garbage",
    [
        b"{not json}\n",
        b"\xff\xfe\n",
        b"[" * 200_000 + b"\n",
        b"<html>\n",
        b"\n",
        b"x" * (MAX_EVENT_LINE + 70_000),
    ],
    ids=["no-json", "no-text", "deep", "html", "empty", "endless"],
)
async def test_garbage(cluster: Kubernetes, garbage: bytes) -> None:
    """What is no event, or a line without an end, breaks the watch, which goes on from the last version."""
    event = json.dumps({"type": "ADDED", "object": POD}).encode() + b"\n"
    cluster.on_watch = [Raw(STREAM, chunk(event), chunk(garbage), math.inf), DEFAULT]
    async with watching(cluster):
        await wait_until(lambda: len(cluster.watched) == 2)
    assert cluster.watched == ["100", "150"]
    assert lists(cluster) == 1


@pytest.mark.parametrize(
    "event",
    [
        7,
        [],
        {},
        {"type": "ADDED"},
        {"type": "ADDED", "object": 7},
        {"type": 7, "object": POD},
        {"type": "NEW", "object": {}},
        {"type": "ADDED", "object": {"metadata": {"name": 7, "labels": []}, "status": []}},
        {"type": "ADDED", "object": {**POD, "status": {"conditions": [7, {}], "containerStatuses": [7]}}},
        {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": 7}}},
    ],
    ids=repr,
)
async def test_odd_events(cluster: Kubernetes, event: object) -> None:
    """An event of another form is passed over, and the connection kept."""
    good = {"type": "ADDED", "object": {**POD, "status": {"phase": "Running"}}}
    lines = b"".join(json.dumps(line).encode() + b"\n" for line in (event, good))
    cluster.on_watch = [Raw(STREAM, chunk(lines), math.inf)]
    async with watching(cluster) as watched:
        await watched.hears("Running")
        assert len(cluster.watched) == 1


async def test_events_in_pieces(cluster: Kubernetes) -> None:
    """Events that come byte by byte are put together."""
    line = json.dumps({"type": "ADDED", "object": {**POD, "status": {"phase": "Running"}}}).encode() + b"\n"
    cluster.on_watch = [Raw(STREAM, *[chunk(line[at : at + 1]) for at in range(len(line))], math.inf)]
    async with watching(cluster) as watched:
        await watched.hears("Running")


@pytest.mark.parametrize(
    "word",
    [
        status(500, "InternalError", "etcd"),
        status(429, "TooManyRequests", "slow down"),
        status(403, "Forbidden", "not now"),
        Reply(200, b"<html>hello</html>"),
        Reply(502, b"<html>"),
        Raw(),
        Raw(b"HTTP/1.1 200"),
        Raw(STREAM, b"zzz\r\n"),
        Raw(STREAM, chunk(json.dumps({"type": "ERROR", "object": {"code": 500, "message": "x"}}).encode() + b"\n")),
        Raw(STREAM, chunk(b'{"type": "ERROR"}\n')),
    ],
    ids=["500", "429", "403", "html", "502", "cut", "head", "no-chunk", "error", "no-status"],
)
async def test_begins_badly(cluster: Kubernetes, word: Word, hurried: None) -> None:
    """A watch that cannot be had, for whatever reason, is tried again after a moment, and all is heard then."""
    cluster.on_watch = [word] * 3
    async with watching(cluster) as watched:
        watched.new_pod().starts()
        await watched.hears("Running")
        await wait_until(lambda: cluster.watching)


@pytest.mark.parametrize(
    "word",
    [Raw(), Reply(200, b"<html>"), Reply(200, {"items": 7}), status(403, "Forbidden", "no"), Reply(500, b"")],
    ids=["cut", "html", "odd", "403", "500"],
)
async def test_list_fails(cluster: Kubernetes, word: Word, hurried: None) -> None:
    """A list that cannot be had is asked for again, until it can."""
    cluster.on_list = [word, word]
    async with watching(cluster) as watched:
        watched.new_pod().starts()
        await watched.hears("Running")


async def test_long_list(cluster: Kubernetes) -> None:
    """A list in several answers is read to its end, and watched from its version."""
    cluster.page = 2
    async with watching(cluster) as watched:
        for suffix in "abcdef":
            watched.new_pod("other", suffix)
        watched.new_pod("r2", "z").starts()
        cluster.on_watch = [EXPIRED]
        cluster.deaf = True
        cluster.cut_watches()
        await watched.hears("Running", "r2")
        await wait_until(lambda: len(cluster.watched) == 3)
    assert lists(cluster) == 1 + 4
    assert [request.query.get("continue") for request in cluster.engine.asked(LIST)][-5:-1] == [None, "2", "4", "6"]


async def test_list_expires_in_its_middle(cluster: Kubernetes) -> None:
    """A list whose continuation the server has forgotten is begun anew."""
    cluster.page = 1
    async with watching(cluster) as watched:
        watched.new_pod("r1").starts()
        watched.new_pod("r2").starts()
        await watched.hears("Running", "r2")
        cluster.on_watch = [EXPIRED]
        cluster.on_list = [DEFAULT, status(410, "Expired", "The provided continue parameter is too old")]
        cluster.cut_watches()
        await wait_until(lambda: cluster.watching)
        for follower in watched.followers.values():
            assert follower.pod is not None
            assert not follower.pod.deleted


async def test_what_is_asked(cluster: Kubernetes) -> None:
    """A watch asks for bookmarks, and for its own end after some minutes."""
    async with watching(cluster):
        pass
    asked = next(request for request in cluster.engine.asked(LIST) if "watch" in request.query)
    assert asked.query == {
        "labelSelector": SELECTOR,
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": "100",
        "timeoutSeconds": "300",
    }
    assert "labelSelector=cloche.dev%2Fowner%3Dme" in asked.target
