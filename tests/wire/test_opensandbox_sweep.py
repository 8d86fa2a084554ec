"""What the dead left at the service, by the service's clock, and what must stay there."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from tests.wire.conftest import died
from tests.wire.engine import DEFAULT, Raw, Reply, Word
from tests.wire.kubernetes import HI
from tests.wire.opensandbox import DELETE, GONE, LIST, SANDBOXES, Box, OpenSandbox, Step, no
from tests.wire.runs import SPEC

import cloche
from cloche.backends import owners
from cloche.backends.contract import Leftover
from cloche.backends.opensandbox import client, leftovers
from cloche.backends.opensandbox.backend import OpenSandboxBackend
from cloche.errors import ClocheError
from cloche.runtime.life import Counters

pytestmark = pytest.mark.anyio

ME = f"o{secrets.token_hex(8)}"
DAY_S = 86400.0
OFFSETS = pytest.mark.parametrize("offset_s", [0.0, DAY_S, -DAY_S], ids=["same", "ahead", "behind"])


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried as often as ever, with shorter pauses between."""
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.02))


@pytest.fixture
def dead_here(service: OpenSandbox) -> Iterator[str]:
    """The name of one who had nothing but sandboxes at this service."""
    with died(leftovers.note(service.base)) as name:
        yield name


@pytest.fixture
def file_of_the_dead(dead_here: str) -> Path:
    """What says that he lived."""
    return owners.state_folder() / f"{dead_here}.owner"


async def sweep(service: OpenSandbox) -> list[Leftover]:
    backend = OpenSandboxBackend(service.settings(), ME)
    try:
        assert (await backend.probe()).available
        return list(await backend.sweep())
    finally:
        await backend.aclose()


def ours(service: OpenSandbox, owner: str = "oother", in_s: float | None = None, place: str = "") -> dict[str, str]:
    """The metadata of a sandbox that somebody made, which expires so many seconds from now by the service's clock."""
    found = {"cloche-kind": "box", "cloche-run": "r1", "cloche-owner": owner, "cloche-try": "t1"}
    if in_s is not None:
        found["cloche-expires"] = str(int(time.time() + (service.engine.clock_offset_s or 0.0) + in_s))
    return {**found, "cloche-place": place} if place else found


@OFFSETS
async def test_expired(service: OpenSandbox, offset_s: float) -> None:
    """What has expired by the service's clock is removed, of whatever process, and what has not is kept."""
    service.engine.clock_offset_s = offset_s
    service.add("expired", ours(service, in_s=-10))
    service.add("fresh", ours(service, in_s=30))
    found = await sweep(service)
    assert set(service.boxes) == {"fresh"}
    assert [(leftover.kind, leftover.name, leftover.removed) for leftover in found] == [("sandbox", "expired", True)]
    assert "expired" in found[0].reason


async def test_service_without_a_clock(service: OpenSandbox) -> None:
    """A service that tells no time is taken to have ours."""
    service.engine.clock_offset_s = None
    service.add("expired", ours(service, in_s=-10))
    service.add("fresh", ours(service, in_s=30))
    await sweep(service)
    assert set(service.boxes) == {"fresh"}


async def test_our_own(service: OpenSandbox, place: str) -> None:
    """One's own sandboxes are never swept, also when their time is over: their runs remove them."""
    service.add("mine", ours(service, ME, -10, place))
    assert await sweep(service) == []
    assert set(service.boxes) == {"mine"}


async def test_dead_and_alive(service: OpenSandbox, place: str, alive: str, dead: str) -> None:
    """What belongs to a dead process of this machine goes before its time; a living one's stays, and another place's."""
    service.add("of-the-dead", ours(service, dead, 30, place))
    service.add("of-the-living", ours(service, alive, -999, place))
    service.add("elsewhere", ours(service, dead, 30, "elsewhere"))
    service.add("nowhere", ours(service, dead, 30))
    service.add("nobody", ours(service, "", 30, place))
    service.add("no-lock", ours(service, "onolock", 30, place))
    found = await sweep(service)
    assert set(service.boxes) == {"of-the-living", "elsewhere", "nowhere", "nobody", "no-lock"}
    assert [(leftover.name, leftover.reason) for leftover in found] == [("of-the-dead", f"owner {dead} is dead")]


async def test_the_dead_are_forgotten(service: OpenSandbox, place: str, dead_here: str, file_of_the_dead: Path) -> None:
    """Of one whose sandboxes are all gone the file says that he was found dead; while one is left, it stays as it is."""
    service.add("one", ours(service, dead_here, 30, place))
    service.engine.on(DELETE, no(403, "X", "no"), DEFAULT)
    assert [leftover.removed for leftover in await sweep(service)] == [False]
    assert "found dead" not in file_of_the_dead.read_text()
    assert [leftover.removed for leftover in await sweep(service)] == [True]
    assert "found dead" in file_of_the_dead.read_text()


@pytest.mark.parametrize("missing", ["cloche-kind", "cloche-run", "cloche-owner", "cloche-try"])
async def test_foreign(service: OpenSandbox, missing: str) -> None:
    """What lacks any of our metadata is not ours to remove, also where the service shows it to us all the same."""
    metadata = ours(service, in_s=-10)
    del metadata[missing]
    box = service.add("foreign", metadata)
    other = service.add("other-kind", {**ours(service, in_s=-10), "cloche-kind": "pool"})
    service.engine.on(LIST, Reply(200, {"items": [box.shown(), other.shown()]}))
    assert await sweep(service) == []
    assert not service.engine.asked(DELETE)


async def test_image_made_of_a_box(service: OpenSandbox) -> None:
    """Metadata that were over before the sandbox was made came with an image that was made of one of ours: it is not ours."""
    service.add("young", ours(service, in_s=-100), age_s=50)
    service.add("old", ours(service, in_s=-100), age_s=200)
    await sweep(service)
    assert set(service.boxes) == {"young"}


@pytest.mark.parametrize(
    "expires", ["", "soon", "-1", "1.5", "1e3", "0x1", " 1", "9" * 400, "1\n2", "\u0663", None], ids=repr
)
async def test_nonsense(service: OpenSandbox, expires: str | None) -> None:
    """What says nonsense of its time, or nothing, has not expired."""
    service.add("a", {**ours(service), **({} if expires is None else {"cloche-expires": expires})})
    assert await sweep(service) == []
    assert set(service.boxes) == {"a"}


@pytest.mark.parametrize(
    "item",
    [7, None, {}, {"id": 7}, {"id": "x", "metadata": [7]}, {"id": "x", "metadata": {"cloche-kind": 7}, "status": "x"}],
    ids=repr,
)
async def test_odd_items(service: OpenSandbox, item: object) -> None:
    """An item of another form is nobody's, and does not keep the others."""
    box = service.add("expired", ours(service, in_s=-10))
    service.engine.on(LIST, Reply(200, {"items": [item, box.shown()]}))
    await sweep(service)
    assert not service.boxes


@pytest.mark.parametrize("name", ["../health", "a/b", "", "a" * 300, "x\n", "..", "a?b"], ids=repr)
async def test_hostile_names(service: OpenSandbox, name: str) -> None:
    """A sandbox with a name that none can have is not asked for by it."""
    box = service.add("expired", ours(service, in_s=-10))
    service.engine.on(LIST, Reply(200, {"items": [{**box.shown(), "id": name}, box.shown()]}))
    assert [leftover.name for leftover in await sweep(service)] == ["expired"]
    assert [request.target for request in service.engine.asked(DELETE)] == [f"{SANDBOXES}/expired"]


async def test_pages(service: OpenSandbox) -> None:
    """A list in several pages is read to its end before anything is deleted, each page with our metadata, encoded twice."""
    service.page = 2
    for number in range(5):
        service.add(f"old-{number}", ours(service, in_s=-10))
    assert len(await sweep(service)) == 5
    assert not service.boxes
    asked = [request for request in service.requests if str(request) == LIST or request.method == "DELETE"]
    assert [request.method for request in asked] == ["GET"] * 3 + ["DELETE"] * 5
    assert [request.query["page"] for request in asked[:3]] == ["1", "2", "3"]
    twice = quote(urlencode({"cloche-kind": "box"}), safe="")
    assert all(f"metadata={twice}&" in request.target for request in asked[:3])
    assert all(request.query["pageSize"] == "200" for request in asked[:3])


async def test_endless_pages(service: OpenSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that never ends is read no further than any list is long."""
    monkeypatch.setattr(client, "MAX_PAGES", 5)
    service.engine.on(LIST, Reply(200, {"items": [], "pagination": {"hasNextPage": True}}))
    assert await sweep(service) == []
    assert len(service.engine.asked(LIST)) == 5


async def test_removal_fails(service: OpenSandbox) -> None:
    """What cannot be removed is told with the reason, and does not keep the others."""
    for name in ("a", "b", "c", "d"):
        service.add(name, ours(service, in_s=-10))
    service.engine.on(f"{DELETE[:-1]}b", no(403, "X", "not yours"))
    service.engine.on(f"{DELETE[:-1]}c", Raw())
    found = {leftover.name: leftover for leftover in await sweep(service)}
    assert {name: leftover.removed for name, leftover in found.items()} == {
        "a": True,
        "b": False,
        "c": False,
        "d": True,
    }
    assert "not yours" in found["b"].reason
    assert set(service.boxes) == {"b", "c"}


async def test_somebody_else_was_quicker(service: OpenSandbox) -> None:
    """What another process sweeps at the same time is gone, which is all that was wanted."""
    service.add("a", ours(service, in_s=-10))
    service.engine.on(DELETE, GONE)
    assert [leftover.removed for leftover in await sweep(service)] == [True]


async def swept(service: OpenSandbox) -> Counters:
    """What a sandbox counts of its sweep, after a run that must not mind."""
    async with cloche.Sandbox(service.settings()) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"
    return opened.counters


async def test_beside_the_runs(service: OpenSandbox) -> None:
    """A sandbox sweeps when it is opened."""
    service.add("a", ours(service, in_s=-10))
    service.add("b", ours(service, in_s=-10))
    service.engine.on(f"{DELETE[:-1]}b", no(403, "X", "not yours"))
    counters = await swept(service)
    assert (counters.swept, counters.sweeps_failed) == (1, 1)


@pytest.mark.parametrize(
    "word",
    [
        no(403, "X", "denied"),
        no(400, "X::INVALID_METADATA_FORMAT", "x"),
        Reply(200, b"<html>"),
        Reply(200, b'{"items": ['),
    ],
    ids=["403", "400", "html", "short"],
)
async def test_list_is_refused(service: OpenSandbox, word: Word) -> None:
    """A service that shows no list is a sweep that failed, and no reason not to run."""
    service.engine.on(LIST, word)
    counters = await swept(service)
    assert (counters.swept, counters.sweeps_failed) == (0, 1)


async def test_list_is_refused_with_words(service: OpenSandbox) -> None:
    """Whoever sweeps by himself is told why he cannot."""
    service.engine.on(LIST, no(403, "X", "denied by rule"))
    with pytest.raises(ClocheError, match="denied by rule"):
        await sweep(service)


@pytest.mark.parametrize("word", [Raw(), Reply(503, b"busy"), no(429, "", "")], ids=["cut", "503", "429"])
async def test_list_after_all(service: OpenSandbox, word: Word) -> None:
    """A list that cannot be had at first is asked for again."""
    service.engine.on(LIST, word, DEFAULT)
    service.add("a", ours(service, in_s=-10))
    assert len(await sweep(service)) == 1


async def test_living_run_of_another_sandbox(service: OpenSandbox) -> None:
    """A run of another sandbox that lives is not swept, also when the service's clock leaps a year ahead."""
    swept_meanwhile: list[Leftover] = []

    async def play(_: Box) -> AsyncIterator[Step]:
        service.engine.clock_offset_s = 365 * DAY_S
        swept_meanwhile.extend(await sweep(service))
        assert service.boxes
        yield HI

    service.play = play
    async with cloche.Sandbox(service.settings()) as opened:
        assert (await opened.run(SPEC)).stdout == "hi"
    assert len(service.engine.asked(LIST)) == 2
    assert swept_meanwhile == []
