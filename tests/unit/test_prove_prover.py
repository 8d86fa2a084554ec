"""The prover drives its boxes as every run is driven, and a sandbox goes by what was proved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tests.unit.probes import CLAIMS, MIB, Row, changed, healthy, printed

from cloche import Sandbox, Settings
from cloche.backends.contract import Capabilities, Examination, Profile
from cloche.cli.doctor import plain, status
from cloche.errors import BackendUnavailable, InterpreterMissing, IsolationUnavailable, ProtocolError
from cloche.isolation import Check, Guarantee, Isolation, Posture, State, Verdict
from cloche.runtime.prove.report import Report, examine
from cloche.spec import Spec
from cloche.supervisor.bundle import File
from cloche.supervisor.frames import MAX_PAYLOAD_BYTES, Data, Fail
from cloche.testing.fake import FakeBackend, Play, begin, end, ended_by

NAMESPACE_CLAIMS = tuple(
    Guarantee(name, State.IN_FORCE, "so it says") for name in CLAIMS if name != "engine-call-filter"
)
LOCAL = Posture("local", available=True, isolation=Isolation.NAMESPACE, engine="fake", guarantees=NAMESPACE_CLAIMS)
SCRIPT = Spec(name="s.sh", content="true")


def says(rows: Sequence[Row], last: Callable[..., Any] = end, *args: Any) -> Play:
    """A box whose script prints these rows."""
    data = printed(rows)
    parts = [(at, data[at : at + MAX_PAYLOAD_BYTES]) for at in range(0, len(data), MAX_PAYLOAD_BYTES)]
    return Play([*begin(), *(Data("stdout", *part) for part in parts), last(*args, stdout=len(data))])


def probed(rows: Sequence[Row], *, memory: Play | None = None) -> Callable[[Profile], Play]:
    """Plays for a prover's boxes: what a look finds, and how the box for memory ends."""
    exhausted = memory or says([{"see": "memory", "bytes": 70 * MIB}], ended_by, 9, "memory")

    def play(profile: Profile) -> Play:
        return exhausted if profile.limits.memory_bytes == 64 * MIB and not profile.sockets else says(rows)

    return play


def backend(rows: Sequence[Row] | None = None, **values: Any) -> FakeBackend:
    plays = values.pop("plays", None) or probed(healthy() if rows is None else rows)
    return FakeBackend(plays, posture=LOCAL, **values)


def sandbox(fake: FakeBackend, **settings: Any) -> Sandbox:
    return Sandbox(Settings(**settings), backends={"local": fake.factory})


async def test_proved() -> None:
    """What was found holds from then on, for the posture and for the results of runs."""
    async with sandbox(backend()) as opened:
        assert not (await opened.posture()).proved
        posture = await opened.posture(prove=True)
        assert posture.proved
        assert posture.isolation is Isolation.NAMESPACE
        assert posture.missing == ()
        assert await opened.posture() == posture


async def test_its_boxes_are_like_every_other() -> None:
    """The prober comes in the bundle, as an executable file of the workspace; its boxes are bounded, and they are removed."""
    fake = backend()
    async with sandbox(fake, pids=1000, memory="8Gi", cpus=4.0) as opened:
        await opened.posture(prove=True)
        assert fake.alive == 0
    look, memory = fake.boxes
    for box in (look, memory):
        assert box.bundle is not None
        assert list(box.bundle.argv)[:2] == ["/workspace/cloche-prober", "probe"]
        (program,) = box.bundle.entries
        assert isinstance(program, File)
        assert program.executable
        assert box.profile.interpreter is None
        assert not box.profile.sockets
    assert look.profile.limits.pids == 64
    assert look.profile.limits.memory_bytes == 256 * MIB
    assert look.profile.limits.cpus == 0.25
    assert memory.profile.limits.memory_bytes == 64 * MIB


async def test_below_the_floor_after_the_proof() -> None:
    """A run that would have been allowed by what the mode promises is refused by what was found; one that asks for less goes."""
    fake = backend([*changed("connect", {"name": "host-network"}, errno=0)(healthy())])
    async with sandbox(fake) as opened:
        posture = await opened.posture(prove=True)
        assert posture.isolation is Isolation.PROCESS
        assert [guarantee.name for guarantee in posture.missing] == ["network"]
        with pytest.raises(IsolationUnavailable, match="network"):
            await opened.run(SCRIPT)
        result = await opened.run(SCRIPT.model_copy(update={"min_isolation": Isolation.PROCESS}))
        assert result.isolation is Isolation.PROCESS


async def test_proved_at_the_start() -> None:
    """With prove="start" a sandbox is proved when it opens. Below the floor, and where no box can be made, it does not open."""
    async with sandbox(backend(), prove="start") as opened:
        assert (await opened.posture()).proved
        assert (await opened.run(SCRIPT)).guarantees
    open_network = backend([*changed("connect", {"name": "host-network"}, errno=0)(healthy())])
    with pytest.raises(IsolationUnavailable, match="network"):
        await sandbox(open_network, prove="start").__aenter__()
    assert open_network.closed
    async with sandbox(open_network, prove="start", min_isolation="process") as opened:
        assert (await opened.posture()).isolation is Isolation.PROCESS
    failing = backend(plays=lambda _: Play(open_error=BackendUnavailable("No more boxes.")))
    with pytest.raises(BackendUnavailable, match="No more boxes"):
        await sandbox(failing, prove="start").__aenter__()
    assert failing.closed


def with_listener(rows: Sequence[Row], listen: Row) -> Callable[[Profile], Play]:
    """The same, where the first box with sockets listens for the next one and stays."""
    asked = 0

    def play(profile: Profile) -> Play:
        nonlocal asked
        asked += profile.sockets
        if profile.sockets and asked == 1:
            data = printed([listen])
            return Play([*begin(), Data("stdout", 0, data), math.inf])
        return probed(rows)(profile)

    return play


LISTENS = {"see": "listen", "address": "10.0.0.9", "port": 38127, "errno": 0}


async def test_a_second_proof() -> None:
    """What was broken is broken still, and what was mended counts again: each proof is measured by what the backend declares."""
    rows = [*changed("connect", {"name": "host-network"}, errno=0)(healthy())]
    now = {"rows": rows}

    def play(profile: Profile) -> Play:
        return probed(now["rows"])(profile)

    async with sandbox(backend(plays=play)) as opened:
        for _ in range(2):
            posture = await opened.posture(prove=True)
            assert [guarantee.name for guarantee in posture.missing] == ["network"]
        now["rows"] = healthy()
        posture = await opened.posture(prove=True)
        assert (posture.missing, posture.isolation) == ((), Isolation.NAMESPACE)


@pytest.mark.parametrize(("errno", "state"), [(0, State.NOT_IN_FORCE), (110, State.IN_FORCE), (111, State.UNKNOWN)])
async def test_where_the_supervisor_takes_the_sockets(errno: int, state: State) -> None:
    """Then two more boxes leave them to the prober, one to listen for the other: to see what else holds."""
    rows = [*changed("socket", {"errno": 0}, errno=1)(healthy())]
    open_rows = [row for row in healthy() if row["see"] != "connect"]
    open_rows = [*changed("interfaces", names=["lo", "eth0"])(open_rows)]
    open_rows += [
        {"see": "connect", "name": "another-box", "to": "10.0.0.9:38127", "by": "tcp", "errno": errno, "at": "answer"}
    ]

    def play(profile: Profile) -> Play:
        return with_sockets(profile) if profile.sockets else without(profile)

    with_sockets, without = with_listener(open_rows, LISTENS), probed(rows)
    fake = backend(plays=play, examination=Examination(addresses={"kubernetes-api": "10.0.0.1:443"}))
    async with sandbox(fake) as opened:
        posture = await opened.posture(prove=True)
        assert fake.alive == 0
    assert [box.profile.sockets for box in fake.boxes] == [False, False, True, True]
    first, _, listener, last = (box.bundle for box in fake.boxes)
    assert first is not None
    assert listener is not None
    assert last is not None
    assert "kubernetes-api=10.0.0.1:443" in first.argv
    assert "--listen" in listener.argv
    assert "another-box=10.0.0.9:38127" in last.argv
    found = {guarantee.name: guarantee.state for guarantee in posture.guarantees}
    assert found["network-policy"] is state
    assert found["network"] is State.IN_FORCE


async def test_one_box_at_a_time() -> None:
    """Then nobody listens, and nothing waits for it."""
    fake = backend([*changed("socket", {"errno": 0}, errno=1)(healthy())])
    async with sandbox(fake, max_concurrent=1) as opened:
        await opened.posture(prove=True)
    assert [box.profile.sockets for box in fake.boxes] == [False, False, True]


async def test_a_box_that_cannot_be_made() -> None:
    """The first one must be: without it nothing is proved. What a later one would have shown is unknown."""
    failing = backend(plays=lambda _: Play(open_error=BackendUnavailable("No more boxes.")))
    async with sandbox(failing) as opened:
        with pytest.raises(BackendUnavailable, match="No more boxes"):
            await opened.posture(prove=True)
        assert not (await opened.posture()).proved
    later = backend(plays=probed(healthy(), memory=Play(open_error=BackendUnavailable("No more boxes."))))
    async with sandbox(later) as opened:
        posture = await opened.posture(prove=True)
    states = {guarantee.name: guarantee.state for guarantee in posture.guarantees}
    assert states["memory-limit"] is State.UNKNOWN


async def test_output_that_is_none_of_the_probers() -> None:
    """It is not believed."""
    fake = backend(plays=lambda _: Play([*begin(), Data("stdout", 0, b"all is well\n"), end(stdout=12)]))
    async with sandbox(fake) as opened:
        with pytest.raises(ProtocolError):
            await opened.posture(prove=True)


async def test_the_other_architecture() -> None:
    """An engine that cannot execute the prober for this machine is given the other one; if that cannot be run either, the first
    error is told.
    """
    failing = Play(
        [begin()[0], Fail("interpreter-missing", "/workspace/cloche-prober cannot be started: Exec format error")]
    )
    fake = backend(plays=lambda _: failing)
    async with sandbox(fake) as opened:
        with pytest.raises(InterpreterMissing, match="Exec format error"):
            await opened.posture(prove=True)


async def test_without_scripts_there_is_nothing_to_prove() -> None:
    """A mode that runs nothing makes no box."""
    fake = FakeBackend(
        posture=dataclasses.replace(LOCAL, available=False), capabilities=Capabilities("local", runs=False)
    )
    async with sandbox(fake) as opened:
        assert not (await opened.posture(prove=True)).proved
    assert fake.boxes == []


async def report_of(fake: FakeBackend, **settings: Any) -> Report:
    return await examine(Settings(**settings), backends={"local": fake.factory})


async def test_a_report() -> None:
    """Checks, guarantees and a conclusion, as values, as JSON and as lines."""
    checks = (
        Check("engine", Verdict.OK, "it answers"),
        Check("excess-rights", Verdict.NOT_OK, "more", "Less.", needed=False),
    )
    report = await report_of(backend(examination=Examination(checks)))
    assert report.ok
    assert status([report]) == 0
    found = report.to_dict()
    assert found.keys() == {"mode", "engine", "level", "required", "ok", "proved", "checks", "guarantees", "error"}
    assert (found["mode"], found["level"], found["required"], found["error"]) == (
        "local",
        "namespace",
        "namespace",
        None,
    )
    assert [check["name"] for check in found["checks"]] == ["settings", "engine", "excess-rights"]
    lines = list(plain(report))
    assert "  + engine: it answers" in lines
    assert "  - excess-rights: more. Less." in lines
    assert lines[-1].endswith("everything that a run counts on is in force")


@pytest.mark.parametrize(
    ("fake", "settings", "said"),
    [
        (backend(), {"min_isolation": "container"}, "that is not enough"),
        (backend([*changed("processes", count=60)(healthy())]), {}, "that is not enough"),
        (backend([*changed("interfaces", names=["eth0"])(healthy())]), {}, "not in force: network"),
        (backend([*changed("create", {"path": "/tmp"}, bytes=999 * MIB)(healthy())]), {}, "not in force: disk-limit"),
        (backend(examination=Examination((Check("image", Verdict.NOT_OK, "gone"),))), {}, "not in force: image"),
    ],
)
async def test_a_report_that_is_not_well(fake: FakeBackend, settings: dict[str, Any], said: str) -> None:
    """A level below the required one, a guarantee that is broken, a step of the way that is not as it must be."""
    report = await report_of(fake, **settings)
    assert not report.ok
    assert status([report]) == 1
    assert said in list(plain(report))[-1]


async def test_a_report_of_what_cannot_be_used() -> None:
    """The reason, what to do, and the steps of the way as far as it goes; nothing else takes the mode's place."""
    posture = dataclasses.replace(LOCAL, available=False, reason="It sleeps.", hint="Wake it.")
    checks = (Check("engine", Verdict.NOT_OK, "it sleeps", "Wake it."),)
    fake = FakeBackend(posture=posture, examination=Examination(checks))
    report = await report_of(fake)
    assert fake.closed
    assert report.error is not None
    assert report.error.code == "backend-unavailable"
    assert report.to_dict()["error"]["hint"] == "Wake it."
    assert status([report]) == 125
    lines = list(plain(report))
    assert "  - engine: it sleeps. Wake it." in lines
    assert lines[-1] == "what to do: Wake it."


async def test_several_reports() -> None:
    """Modes that cannot be used here do not count beside one that can."""
    well, away = await report_of(backend()), Report("docker", Isolation.NAMESPACE, error=BackendUnavailable("away"))
    assert status([well, away]) == 0
    assert status([away]) == 125
    assert status([dataclasses.replace(well, required=Isolation.KERNEL), away]) == 1


async def test_evidence_cannot_steer_a_terminal() -> None:
    """What comes out of a box is escaped."""
    rows = [*changed("environment", names=["PATH", "TOKEN\x1b[2J"])(healthy())]
    lines = list(plain(await report_of(backend(rows))))
    assert not any("\x1b" in line for line in lines)
    assert any("TOKEN\\x1b" in line for line in lines)
