"""What the dead left in the namespace, by the API server's clock, and what must stay there."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator

import pytest
from tests.wire.engine import DEFAULT, Raw, Reply, Word
from tests.wire.kubernetes import BATCH, CORE, HI, PARTIAL, Kubernetes, Pod, status
from tests.wire.runs import SPEC

import cloche
from cloche.backends.contract import Leftover
from cloche.backends.kubernetes.backend import KubernetesBackend
from cloche.runtime.life import Counters

pytestmark = pytest.mark.anyio

ME = f"o{secrets.token_hex(8)}"
DAY_S = 86400.0
OFFSETS = pytest.mark.parametrize("offset_s", [0.0, DAY_S, -DAY_S], ids=["same", "ahead", "behind"])
JOBS, MAPS = f"GET {BATCH}/jobs", f"GET {CORE}/configmaps"


async def sweep(cluster: Kubernetes) -> list[Leftover]:
    backend = KubernetesBackend(cluster.settings(), ME)
    try:
        assert (await backend.probe()).available
        return list(await backend.sweep())
    finally:
        await backend.aclose()


def add(cluster: Kubernetes, name: str, owner: str = "oother", in_s: float | None = None, place: str = "") -> None:
    """A Job and a ConfigMap of the same name that somebody made, which expire so many seconds from now by the server's clock."""
    notes = {"cloche.dev/place": place} if place else {}
    if in_s is not None:
        notes["cloche.dev/expires"] = str(int(time.time() + (cluster.engine.clock_offset_s or 0.0) + in_s))
    labels = {"cloche.dev/run": "r1", **({"cloche.dev/owner": owner} if owner else {})}
    cluster.add_job(name, labels, notes)
    cluster.add_map(name, labels, notes)


def there(cluster: Kubernetes) -> set[str]:
    """The names of what is there, of which the Job and the ConfigMap share their fate."""
    assert cluster.jobs.keys() == cluster.config_maps.keys()
    return set(cluster.jobs)


@OFFSETS
async def test_expired(cluster: Kubernetes, offset_s: float) -> None:
    """What has expired by the API server's clock is removed, of whatever process, and what has not is kept."""
    cluster.engine.clock_offset_s = offset_s
    add(cluster, "cloche-expired", in_s=-10)
    add(cluster, "cloche-fresh", in_s=30)
    found = await sweep(cluster)
    assert there(cluster) == {"cloche-fresh"}
    assert sorted((leftover.kind, leftover.name, leftover.removed) for leftover in found) == [
        ("configmap", "cloche-expired", True),
        ("job", "cloche-expired", True),
    ]
    assert all("expired" in leftover.reason for leftover in found)


async def test_server_without_a_clock(cluster: Kubernetes) -> None:
    """A server that tells no time is taken to have ours."""
    cluster.engine.clock_offset_s = None
    add(cluster, "cloche-expired", in_s=-10)
    add(cluster, "cloche-fresh", in_s=30)
    await sweep(cluster)
    assert there(cluster) == {"cloche-fresh"}


async def test_our_own(cluster: Kubernetes, place: str) -> None:
    """One's own things are never swept, also when their time is over: their runs remove them."""
    add(cluster, "cloche-mine", ME, -10, place)
    assert await sweep(cluster) == []
    assert there(cluster) == {"cloche-mine"}


async def test_dead_and_alive(cluster: Kubernetes, place: str, alive: str, dead: str) -> None:
    """What belongs to a dead process of this machine goes before its time; a living one's stays, and another place's."""
    add(cluster, "cloche-of-the-dead", dead, 30, place)
    add(cluster, "cloche-of-the-living", alive, -9999, place)
    add(cluster, "cloche-elsewhere", dead, 30, "elsewhere")
    add(cluster, "cloche-nowhere", dead, 30)
    add(cluster, "cloche-nobody", "", 30, place)
    add(cluster, "cloche-no-lock", "onolock", 30, place)
    found = await sweep(cluster)
    assert there(cluster) == {
        "cloche-of-the-living",
        "cloche-elsewhere",
        "cloche-nowhere",
        "cloche-nobody",
        "cloche-no-lock",
    }
    assert all(f"{dead} is dead" in leftover.reason for leftover in found)


async def test_supervisors_stay(cluster: Kubernetes) -> None:
    """The ConfigMap that holds a supervisor stays, of whatever version, and whatever it says of its time."""
    labels = {"cloche.dev/supervisor": "true"}
    cluster.add_map("cloche-supervisor-0123456789abcdef", labels, {"cloche.dev/expires": "1"})
    assert await sweep(cluster) == []
    assert cluster.config_maps


async def test_foreign(cluster: Kubernetes) -> None:
    """What has only our common label, or has not our name, is not ours to remove."""
    old = {"cloche.dev/expires": "1"}
    cluster.add_job("cloche-chart-test", {}, old)
    cluster.add_job("backup", {"cloche.dev/run": "r1"}, old)
    cluster.add_map("cloche-config", {}, old)
    cluster.add_map("kube-root-ca.crt", {"cloche.dev/run": "r1", "cloche.dev/owner": "oother"}, old)
    assert await sweep(cluster) == []
    assert (len(cluster.jobs), len(cluster.config_maps)) == (2, 2)


@pytest.mark.parametrize(
    "expires",
    [
        *("", "soon", "-1", "1.5", "1e3", "0x1", " 1", "9" * 400, "1\n2", None),
        "\u0663",
    ],
)
async def test_nonsense(cluster: Kubernetes, expires: str | None) -> None:
    """What says nonsense of its time, or nothing, has not expired."""
    notes = {} if expires is None else {"cloche.dev/expires": expires}
    labels = {"cloche.dev/run": "r1", "cloche.dev/owner": "oother"}
    cluster.add_job("cloche-a", labels, notes)
    cluster.add_map("cloche-a", labels, notes)
    assert await sweep(cluster) == []
    assert there(cluster) == {"cloche-a"}


@pytest.mark.parametrize(
    "item",
    [7, {}, {"metadata": 7}, {"metadata": {"name": 7, "labels": [], "annotations": "x"}}, None],
    ids=repr,
)
async def test_odd_items(cluster: Kubernetes, item: object) -> None:
    """An item of another form is nobody's, and does not keep the others."""
    add(cluster, "cloche-expired", in_s=-10)
    good = {"metadata": cluster.jobs["cloche-expired"]["metadata"]}
    cluster.engine.on(JOBS, Reply(200, {"items": [item, good]}))
    await sweep(cluster)
    assert there(cluster) == set()


async def test_long_lists(cluster: Kubernetes) -> None:
    """Lists in several answers are read to their end, the metadata alone, and each with our label."""
    cluster.page = 2
    for number in range(5):
        add(cluster, f"cloche-{number}", in_s=-10)
    assert len(await sweep(cluster)) == 10
    assert there(cluster) == set()
    for route in (JOBS, MAPS):
        requests = cluster.engine.asked(route)
        assert [request.query.get("continue") for request in requests] == [None, "2", "4"]
        for request in requests:
            assert request.query["labelSelector"] == "app.kubernetes.io/managed-by=cloche"
            assert request.headers["accept"].startswith(f"application/json;as={PARTIAL}List;g=meta.k8s.io;v=v1")


async def test_server_that_does_not_know_metadata_alone(cluster: Kubernetes) -> None:
    """A server that gives whole objects is read as well."""
    add(cluster, "cloche-expired", in_s=-10)
    for route, found in ((JOBS, cluster.jobs), (MAPS, cluster.config_maps)):
        cluster.engine.on(route, Reply(200, {"items": list(found.values())}))
    assert len(await sweep(cluster)) == 2


async def test_removal_fails(cluster: Kubernetes) -> None:
    """What cannot be removed is told with the reason, and does not keep the others."""
    for name in ("cloche-a", "cloche-b", "cloche-c"):
        add(cluster, name, in_s=-10)
    cluster.engine.on(f"DELETE {BATCH}/jobs/cloche-b", status(403, "Forbidden", "not yours"))
    found = {(leftover.kind, leftover.name): leftover for leftover in await sweep(cluster)}
    assert len(found) == 6
    assert not found["job", "cloche-b"].removed
    assert "not yours" in found["job", "cloche-b"].reason
    assert sum(leftover.removed for leftover in found.values()) == 5
    assert set(cluster.jobs) == {"cloche-b"}


async def test_somebody_else_was_quicker(cluster: Kubernetes) -> None:
    """What another process sweeps at the same time is gone, which is all that was wanted."""
    add(cluster, "cloche-a", in_s=-10)
    cluster.engine.on("DELETE *", status(404, "NotFound", "gone"))
    assert [leftover.removed for leftover in await sweep(cluster)] == [True, True]


async def swept(cluster: Kubernetes) -> Counters:
    """What a sandbox counts of its sweep, after a run that must not mind."""
    async with cloche.Sandbox(cluster.settings()) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"
    return opened.counters


async def test_beside_the_runs(cluster: Kubernetes) -> None:
    """A sandbox sweeps when it is opened."""
    add(cluster, "cloche-expired", in_s=-10)
    counters = await swept(cluster)
    assert (counters.swept, counters.sweeps_failed) == (2, 0)


@pytest.mark.parametrize(
    "word",
    [
        status(403, "Forbidden", "denied"),
        status(410, "Expired", "The provided continue parameter is too old"),
        Reply(200, b"<html>"),
        Reply(200, b'{"items": ['),
        status(400, "BadRequest", "no"),
    ],
    ids=["403", "410", "html", "short", "400"],
)
async def test_list_is_refused(cluster: Kubernetes, word: Word) -> None:
    """A server that shows no list is a sweep that failed, and no reason not to run."""
    cluster.engine.on(MAPS, word)
    counters = await swept(cluster)
    assert (counters.swept, counters.sweeps_failed) == (0, 1)


@pytest.mark.parametrize("word", [Raw(), status(503, "", ""), status(429, "", "")], ids=["cut", "503", "429"])
async def test_list_after_all(cluster: Kubernetes, word: Word) -> None:
    """A list that cannot be had at first is asked for again."""
    cluster.engine.on(JOBS, word, DEFAULT)
    add(cluster, "cloche-expired", in_s=-10)
    assert len(await sweep(cluster)) == 2


async def test_nothing_to_do(cluster: Kubernetes) -> None:
    """Where nothing was left two requests say so."""
    await sweep(cluster)
    assert [str(request) for request in cluster.engine.requests[2:]] in ([JOBS, MAPS], [MAPS, JOBS])


async def test_living_run_of_another_sandbox(cluster: Kubernetes) -> None:
    """A run of another sandbox that lives is not swept, also when the server's clock leaps a year ahead."""
    swept_meanwhile: list[Leftover] = []

    async def play(pod: Pod) -> AsyncIterator[bytes]:
        cluster.engine.clock_offset_s = 365 * DAY_S
        swept_meanwhile.extend(await sweep(cluster))
        assert cluster.jobs
        yield HI

    cluster.play = play
    async with cloche.Sandbox(cluster.settings()) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"
    assert len(cluster.engine.asked(JOBS)) == 2
    assert swept_meanwhile == []


async def test_parts_of_a_bundle(cluster: Kubernetes) -> None:
    """What a Job owns goes with it, unasked; what has lost its Job is removed by itself."""
    add(cluster, "cloche-a", in_s=-10)
    owner = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": "cloche-a",
        "uid": cluster.jobs["cloche-a"]["metadata"]["uid"],
    }
    notes, labels = cluster.jobs["cloche-a"]["metadata"]["annotations"], cluster.jobs["cloche-a"]["metadata"]["labels"]
    for name, uid in (("cloche-a-00", owner["uid"]), ("cloche-b-00", "gone")):
        cluster.add_map(name, labels, notes)
        cluster.config_maps[name]["metadata"]["ownerReferences"] = [{**owner, "uid": uid, "name": name[:8]}]
    found = await sweep(cluster)
    assert sorted((leftover.kind, leftover.name) for leftover in found) == [
        ("configmap", "cloche-a"),
        ("configmap", "cloche-b-00"),
        ("job", "cloche-a"),
    ]
    assert not cluster.config_maps
