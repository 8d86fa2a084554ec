"""What the dead left on a daemon, by the daemon's clock, and what must stay there."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import pytest
from tests.wire.conftest import died
from tests.wire.docker import Docker
from tests.wire.engine import Raw, Reply

import cloche
from cloche.backends.contract import Leftover
from cloche.backends.docker import leftovers
from cloche.backends.docker.backend import DockerBackend
from cloche.runtime.life import Counters

pytestmark = pytest.mark.anyio

ME = f"o{secrets.token_hex(8)}"
DAY_S = 86400.0
OFFSETS = pytest.mark.parametrize("offset_s", [0.0, DAY_S, -DAY_S], ids=["same", "ahead", "behind"])


@pytest.fixture
def dead_here(docker: Docker) -> Iterator[str]:
    """The name of one who had nothing but things on this daemon."""
    with died(leftovers.note(docker.engine.address)) as name:
        yield name


async def sweep(docker: Docker) -> list[Leftover]:
    backend = DockerBackend(docker.settings(), ME)
    try:
        assert (await backend.probe()).available
        return list(await backend.sweep())
    finally:
        await backend.aclose()


def at(docker: Docker, in_s: float) -> str:
    """A moment by the daemon's clock, so many seconds from now, as a label has it."""
    return str(int(time.time() + (docker.engine.clock_offset_s or 0.0) + in_s))


def there(docker: Docker) -> set[str]:
    return set(docker.containers)


@OFFSETS
async def test_expired(docker: Docker, offset_s: float) -> None:
    """What has expired by the daemon's clock is removed, what has not is kept, however wrong that clock is."""
    docker.engine.clock_offset_s = offset_s
    docker.add("cloche-expired", cloche_owner="oother", cloche_place="elsewhere", cloche_expires=at(docker, -10))
    docker.add("cloche-fresh", cloche_owner="oother", cloche_place="elsewhere", cloche_expires=at(docker, 30))
    found = await sweep(docker)
    assert there(docker) == {"cloche-fresh"}
    assert [(leftover.kind, leftover.removed) for leftover in found] == [("container", True)]
    assert "expired" in found[0].reason


async def test_daemon_without_a_clock(docker: Docker) -> None:
    """A daemon that tells no time is taken to have ours."""
    docker.engine.clock_offset_s = None
    docker.add("cloche-expired", cloche_owner="oother", cloche_expires=at(docker, -10))
    docker.add("cloche-fresh", cloche_owner="oother", cloche_expires=at(docker, 30))
    await sweep(docker)
    assert there(docker) == {"cloche-fresh"}


async def test_our_own(docker: Docker, place: str) -> None:
    """One's own containers are never swept, also when their time is over: their runs remove them."""
    docker.add("cloche-mine", cloche_owner=ME, cloche_place=place, cloche_expires=at(docker, -10))
    assert await sweep(docker) == []
    assert there(docker) == {"cloche-mine"}


async def test_dead_and_alive(docker: Docker, place: str, alive: str, dead: str) -> None:
    """What belongs to a dead process of this machine goes before its time; a living one's stays, and another place's."""
    soon = at(docker, 30)
    docker.add("cloche-of-the-dead", cloche_owner=dead, cloche_place=place, cloche_expires=soon)
    docker.add("cloche-of-the-living", cloche_owner=alive, cloche_place=place, cloche_expires=soon)
    docker.add("cloche-elsewhere", cloche_owner=dead, cloche_place="elsewhere", cloche_expires=soon)
    docker.add("cloche-nowhere", cloche_owner=dead, cloche_expires=soon)
    docker.add("cloche-nobody", cloche_place=place, cloche_expires=soon)
    (found,) = await sweep(docker)
    assert there(docker) == {"cloche-of-the-living", "cloche-elsewhere", "cloche-nowhere", "cloche-nobody"}
    assert f"{dead} is dead" in found.reason


async def test_made_after_a_sweep(docker: Docker, place: str, dead_here: str) -> None:
    """What the daemon makes for the dead after a sweep has looked goes at the next one: his lock is still there to tell."""
    for container in ("cloche-first", "cloche-late"):
        docker.add(container, cloche_owner=dead_here, cloche_place=place, cloche_expires=at(docker, 30))
        assert [(left.name, left.removed) for left in await sweep(docker)] == [(container, True)]
    assert not docker.containers


async def test_a_lock_that_is_not_there(docker: Docker, place: str) -> None:
    """That an owner has no lock proves nothing: somebody may have cleaned up. What is his stays until its time."""
    docker.add("cloche-a", cloche_owner="onolock", cloche_place=place, cloche_expires=at(docker, 30))
    docker.add("cloche-b", cloche_owner="onolock", cloche_place=place, cloche_expires=at(docker, -30))
    await sweep(docker)
    assert there(docker) == {"cloche-a"}


async def test_the_living_do_not_expire(docker: Docker, place: str, alive: str) -> None:
    """A container whose owner is seen to live stays, whatever its label says of the time: a clock may have been wrong."""
    docker.add("cloche-a", cloche_owner=alive, cloche_place=place, cloche_expires=at(docker, -9999))
    assert await sweep(docker) == []
    assert there(docker) == {"cloche-a"}


async def test_labels_of_an_image(docker: Docker) -> None:
    """A container that is not cloche's is not touched, though its image bears cloche's label."""
    docker.add("web", cloche_expires="1")
    docker.add("shop", cloche_expires="1", cloche_owner="x")
    docker.add("cloche-like", cloche_expires="1")
    assert await sweep(docker) == []
    assert there(docker) == {"web", "shop", "cloche-like"}


@pytest.mark.parametrize("expires", ["", "soon", "-1", "1e3", "0x10", "1.5", "9" * 5000])
async def test_expiry_that_cannot_be_read(docker: Docker, expires: str) -> None:
    """What does not say when it expires is kept: it may be somebody else's."""
    docker.add("cloche-strange", cloche_owner="oother", cloche_expires=expires)
    assert await sweep(docker) == []
    assert there(docker) == {"cloche-strange"}


async def test_asks_for_its_own_label(docker: Docker) -> None:
    """Containers that are not cloche's are not even asked for, those that have ended are."""
    docker.add("cloche-database", com_example="x")
    await sweep(docker)
    (request,) = docker.engine.asked("GET /containers/json")
    assert request.query == {"all": "true", "filters": '{"label": ["cloche.expires"]}'}
    assert there(docker) == {"cloche-database"}


async def test_volumes(docker: Docker) -> None:
    """A volume that has expired is removed, one that has not, or says nothing, is kept."""
    docker.volumes = {
        "cloche-old": {"cloche.expires": at(docker, -10), "cloche.supervisor": "x"},
        "cloche-new": {"cloche.expires": at(docker, 9999), "cloche.supervisor": "x"},
        "data": {},
    }
    (found,) = await sweep(docker)
    assert docker.volumes.keys() == {"cloche-new", "data"}
    assert (found.kind, found.name, found.removed) == ("volume", "cloche-old", True)


async def test_volume_in_use(docker: Docker) -> None:
    """A volume that a container uses is no leftover, and no failure."""
    docker.volumes = {"cloche-old": {"cloche.expires": at(docker, -10), "cloche.supervisor": "x"}}
    docker.engine.on(
        "DELETE /volumes/cloche-old", Reply(409, {"message": "remove cloche-old: volume is in use - [1a2b]"})
    )
    assert await sweep(docker) == []


@pytest.mark.parametrize("answer", [Reply(500, {"message": "device is busy"}), Raw()], ids=["error", "cut"])
async def test_one_cannot_be_removed(docker: Docker, answer: Reply | Raw) -> None:
    """One that cannot be removed does not keep the others; it is reported with its reason."""
    for name in ("a", "b", "c"):
        docker.add(f"cloche-{name}", cloche_owner="oother", cloche_expires=at(docker, -10))
    docker.engine.on(f"DELETE /containers/{docker.containers['cloche-b'].name}", answer)
    found = await sweep(docker)
    assert there(docker) == {"cloche-b"}
    assert [leftover.removed for leftover in found] == [True, False, True]
    assert found[1].reason


@pytest.mark.parametrize(
    "said",
    [Reply(404), Reply(409, {"message": "removal of container a is already in progress"})],
    ids=["gone", "going"],
)
async def test_somebody_else_sweeps(docker: Docker, said: Reply) -> None:
    """Where two sweep at the same time, that the other one was quicker is no failure."""
    docker.add("cloche-a", cloche_owner="oother", cloche_expires=at(docker, -10))
    docker.engine.on("DELETE /containers/*", said)
    assert [leftover.removed for leftover in await sweep(docker)] == [True]


async def swept(docker: Docker) -> Counters:
    """What a sandbox that runs nothing counts."""
    async with cloche.Sandbox(docker.settings()) as opened:
        await docker.engine.wait_for("DELETE /containers/cloche-fill-*")
    return opened.counters


async def test_in_the_background(docker: Docker) -> None:
    """A sandbox sweeps when it opens, and counts what it removed."""
    docker.add("cloche-expired", cloche_owner="oother", cloche_expires=at(docker, -10))
    counters = await swept(docker)
    assert (counters.swept, counters.sweeps_failed) == (1, 0)
    assert not docker.containers


async def test_list_is_refused(docker: Docker) -> None:
    """A daemon that shows no list is a sweep that failed, and no reason not to run."""
    docker.engine.on("GET /containers/json", Reply(403, {"message": "denied"}))
    counters = await swept(docker)
    assert (counters.swept, counters.sweeps_failed) == (0, 1)
