"""The life of a run, on an engine that plays what the test wrote down."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloche
from cloche.backends.contract import Capabilities, Fate, FateKind, Leftover, Profile
from cloche.events import Artifact, Event, Finished, Output, Started
from cloche.isolation import Isolation, Posture
from cloche.runtime import Load, Sandbox, choose, life, new_run_id, reading
from cloche.runtime.sweep import pause
from cloche.settings import Settings
from cloche.spec import Spec
from cloche.supervisor.frames import Data, Fail, File, FileData
from cloche.testing.fake import FakeBackend, Play, Step, begin, encode_frames, end, ended_by

SPEC = Spec(content="pass", name="main.py", timeout=30)
HI: list[Step] = [*begin(), Data("stdout", 0, b"hi"), end(3, stdout=2)]
NEVER: list[Step] = [*begin(), Data("stdout", 0, b"hi"), math.inf]
"""A script that prints and then runs until it is ended."""
REPLAYABLE = Capabilities(mode="local", replayable=True)


def sandbox(backend: FakeBackend, **settings: Any) -> Sandbox:
    return Sandbox(Settings.model_validate(settings), backends={"local": backend.factory})


async def played(*plays: Play, capabilities: Capabilities | None = None, spec: Spec = SPEC) -> cloche.Result:
    backend = FakeBackend(plays, capabilities=capabilities)
    async with sandbox(backend, start_timeout=5) as s:
        result = await s.run(spec)
    assert backend.alive == 0
    return result


async def wait_until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110 (what is waited for is looked at from outside)
            await anyio.sleep(0.001)


# --- a run ---------------------------------------------------------------------------------------------------------


async def test_result() -> None:
    """A run gives the result of its frames, with who ran it and how long each phase took."""
    result = await played(Play(HI))
    assert (result.outcome, result.exit_code, result.stdout) == ("exited", 3, "hi")
    assert (result.mode, result.isolation, result.fallback_from) == ("local", "namespace", None)
    times = result.timings_ms
    assert times["cleanup"] is None
    assert times["run"] == 1.0
    assert all(times[phase] is not None for phase in ("queued", "prepare", "start", "collect", "total"))


async def test_events() -> None:
    """A stream gives what happens in order, and ends with Finished."""
    play = Play([*HI[:-1], File("a.txt", 2, truncated=False), FileData(b"xy"), end(3, stdout=2)])
    async with sandbox(FakeBackend([play])) as s:
        events = [event async for event in s.stream(SPEC, run_id="r1")]
    assert events[:3] == [
        Started("r1", "local", Isolation.NAMESPACE),
        Output("stdout", 0, b"hi"),
        Artifact("a.txt", 2, b"xy"),
    ]
    assert isinstance(events[3], Finished)
    assert len(events) == 4


async def test_events_come_as_they_happen() -> None:
    """An event arrives while the script still runs."""
    backend = FakeBackend([Play(NEVER, when_stopped=[ended_by(15, "cancel", stdout=2)])])
    async with sandbox(backend) as s:
        seen: list[Event] = []
        async for event in s.stream(SPEC, run_id="r1"):
            seen.append(event)
            if isinstance(event, Output):
                assert backend.alive == 1
                await s.cancel("r1")
    assert [type(event) for event in seen] == [Started, Output, Finished]


async def test_what_the_box_is_made_from() -> None:
    """The profile has the run's identity, limits and needs; the bundle what goes in."""
    backend = FakeBackend([Play(HI)])
    spec = Spec.model_validate(
        {
            "content": "x",
            "name": "a.js",
            "timeout": 5,
            "memory": "32Mi",
            "network": "open",
            "image": "i",
            "stdin": b"abc",
        }
    )
    async with sandbox(backend, start_timeout=10) as s:
        await s.run(spec, run_id="abc-1")
    (box,) = backend.boxes
    p = box.profile
    assert (p.run_id, p.owner, p.network, p.image, p.interpreter, p.bundle_bytes) == (
        "abc-1",
        s.owner,
        "open",
        "i",
        "node",
        4,
    )
    assert (p.limits.timeout_s, p.limits.memory_bytes) == (5.0, 32 * 2**20)
    assert box.bundle is not None
    assert (box.bundle.argv, box.bundle.stdin) == (["node", "/workspace/a.js"], b"abc")


async def test_expiry() -> None:
    """A box expires when start, run, grace and the skew of clocks are over, and not before."""
    backend = FakeBackend([Play(HI)])
    before = time.time()
    async with sandbox(backend, start_timeout=10) as s:
        await s.run(Spec(content="x", name="a.py", timeout=5))
    profile = backend.boxes[0].profile
    assert before <= profile.expires_at - (10 + 5 + profile.limits.grace_s + 60) <= time.time()


async def test_result_before_removal() -> None:
    """The result is handed out before the box is removed; its place is held until then, and closing waits for it."""
    backend = FakeBackend([Play(HI, removal_s=0.3)])
    async with sandbox(backend, max_concurrent=1) as s:
        result = await s.run(SPEC)
        assert result.timings_ms["cleanup"] is None
        assert backend.alive == 1
        await s.run(SPEC)
        assert backend.most_alive == 1, "the second box was made after the first was removed"
    assert backend.alive == 0


async def test_wait_cleanup() -> None:
    """With wait_cleanup the result comes after removal, and tells how long it took."""
    backend = FakeBackend([Play(HI, removal_s=0.05)])
    async with sandbox(backend) as s:
        result = await s.run(SPEC, wait_cleanup=True)
        assert backend.alive == 0
    cleanup, total = result.timings_ms["cleanup"], result.timings_ms["total"]
    assert cleanup is not None
    assert total is not None
    assert total > cleanup >= 50


async def test_a_slow_listener() -> None:
    """A caller who is slow to listen loses nothing and stops nothing."""
    backend = FakeBackend([Play(HI)])
    async with sandbox(backend) as s:
        events = s.stream(SPEC)
        await anext(events)
        await wait_until(lambda: backend.alive == 0)
        assert [type(event) async for event in events] == [Output, Finished]


def test_run_ids() -> None:
    """Run ids are unique, short, url-safe, begin with a letter, and sort by time."""
    ids = [new_run_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(len(i) <= 32 and i.isalnum() and i == i.lower() and i[0].isalpha() for i in ids)
    assert [i[:12] for i in ids] == sorted(i[:12] for i in ids)


@pytest.mark.parametrize("run_id", ["", "1a", "A", "a/b", "a" * 33, "a-", "ä1"])
async def test_bad_run_id(run_id: str) -> None:
    """A run id that is not fit for a label or a path is refused."""
    async with sandbox(FakeBackend()) as s:
        with pytest.raises(cloche.InvalidSpec, match="run id"):
            await s.run(SPEC, run_id=run_id)


async def test_run_id_in_use() -> None:
    """An id names one run at a time."""
    backend = FakeBackend([Play(NEVER)])
    async with sandbox(backend) as s, anyio.create_task_group() as group:
        group.start_soon(lambda: s.run(SPEC, run_id="r1"))
        await wait_until(lambda: backend.alive)
        with pytest.raises(cloche.InvalidSpec, match="in use"):
            await s.run(SPEC, run_id="r1")
        s.kill("r1")


# --- which engine --------------------------------------------------------------------------------------------------


def postured(mode: str, isolation: Isolation = Isolation.NAMESPACE, *, reason: str = "") -> FakeBackend:
    return FakeBackend(
        posture=Posture(
            mode, available=not reason, isolation=isolation, reason=reason, hint="Start it." if reason else ""
        )
    )


def two(first: FakeBackend, local: FakeBackend, **settings: Any) -> Sandbox:
    table = {"docker": first.factory, "local": local.factory}
    return Sandbox(Settings.model_validate({"mode": "docker", **settings}), backends=table)


async def test_fallback(caplog: pytest.LogCaptureFixture) -> None:
    """Where the engine is unavailable, local takes its place with one warning that has the reason, and results say so."""
    docker, local = postured("docker", Isolation.CONTAINER, reason="no daemon"), postured("local")
    with caplog.at_level(logging.DEBUG, "cloche"):
        async with two(docker, local) as s:
            assert (s.mode, s.fallback_from) == ("local", "docker")
            results = [await s.run(SPEC) for _ in range(3)]
            started = await anext(events := s.stream(SPEC))
            await events.aclose()
    assert [(r.mode, r.fallback_from, r.isolation) for r in results] == [("local", "docker", "namespace")] * 3
    assert isinstance(started, Started)
    assert started.fallback_from == "docker"
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "docker is unavailable: no daemon." in warnings[0].getMessage()
    assert "local instead" in warnings[0].getMessage()
    assert (docker.closed, local.closed) == (True, True)


async def test_no_fallback_when_available(caplog: pytest.LogCaptureFixture) -> None:
    """An engine that is available is used, without a word; local is not even asked."""
    docker, local = postured("docker", Isolation.CONTAINER), postured("local")
    async with two(docker, local) as s:
        assert (s.mode, s.fallback_from, (await s.posture()).isolation) == ("docker", None, "container")
    assert local.probes == 0
    assert not caplog.records


@pytest.mark.parametrize(
    ("docker", "local", "settings", "error", "words"),
    [
        (
            postured("docker", reason="no daemon"),
            postured("local"),
            {"fallback": False},
            cloche.BackendUnavailable,
            ["no daemon"],
        ),
        (
            postured("docker", reason="no daemon"),
            postured("local", reason="no bwrap"),
            {},
            cloche.BackendUnavailable,
            ["no daemon", "no bwrap"],
        ),
        (
            postured("docker", reason="no daemon"),
            postured("local", Isolation.PROCESS),
            {},
            cloche.IsolationUnavailable,
            ["no daemon", "process", "namespace is required"],
        ),
        (
            postured("docker", reason="no daemon"),
            postured("local"),
            {"min_isolation": "container"},
            cloche.IsolationUnavailable,
            ["no daemon", "container is required"],
        ),
        (
            postured("docker"),
            postured("local", reason="not Linux"),
            {"mode": "local"},
            cloche.BackendUnavailable,
            ["not Linux"],
        ),
        (
            postured("docker"),
            postured("local"),
            {"mode": "remote"},
            cloche.BackendUnavailable,
            ["no mode remote"],
        ),
    ],
)
async def test_no_engine(
    docker: FakeBackend,
    local: FakeBackend,
    settings: dict[str, Any],
    error: type[cloche.ClocheError],
    words: Sequence[str],
) -> None:
    """Where no engine may be used, entering says why and what to do, and lets go of every engine."""
    with pytest.raises(error) as caught:
        async with two(docker, local, **settings):
            pytest.fail("it was entered")
    assert type(caught.value) is error
    assert all(word in caught.value.message for word in words), caught.value.message
    assert "Start it." in caught.value.hint or "docker, local" in caught.value.hint or "isolation" in caught.value.hint
    assert all(b.closed == (b.probes > 0) for b in (docker, local))


async def test_floor() -> None:
    """A run that would get less isolation than the floor is refused, and nothing is made; a spec can move the floor."""
    backend = postured("local", Isolation.PROCESS)
    async with sandbox(backend) as s:
        with pytest.raises(
            cloche.IsolationUnavailable, match="gives the isolation process here, and namespace is required"
        ):
            await s.run(SPEC)
        assert not backend.boxes
        result = await s.run(SPEC.model_copy(update={"min_isolation": Isolation.PROCESS}))
        assert result.isolation == "process"
    async with sandbox(postured("local"), min_isolation="none") as s:
        with pytest.raises(cloche.IsolationUnavailable, match="container is required"):
            await s.run(SPEC.model_copy(update={"min_isolation": Isolation.CONTAINER}))


async def test_disabled() -> None:
    """In the mode disabled every run is refused, whatever it asks for."""
    async with Sandbox(Settings.model_validate({"mode": "disabled"})) as s:
        assert s.mode == "disabled"
        assert not (await s.posture()).available
        for spec in (SPEC, Spec(script="nope.py"), SPEC.model_copy(update={"min_isolation": Isolation.KERNEL})):
            with pytest.raises(cloche.SandboxDisabled, match="switched off"):
                await s.run(spec)


# --- the queue -----------------------------------------------------------------------------------------------------


async def test_never_more_at_once() -> None:
    """However many runs there are, no more boxes exist than allowed, and every run gets its turn."""
    backend = FakeBackend([Play([*begin(), 0.01, end(0)], removal_s=0.005)])
    results: list[cloche.Result] = []
    async with sandbox(backend, max_concurrent=4) as s:

        async def one() -> None:
            results.append(await s.run(SPEC))

        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(one)
    assert len(results) == 50
    assert all(r.ok for r in results)
    assert backend.most_alive == 4


async def test_first_come_first_served() -> None:
    """Runs that wait are served in the order in which they came."""
    backend = FakeBackend([Play([*begin(), 0.001, end(0)])])
    async with sandbox(backend, max_concurrent=1) as s, anyio.create_task_group() as group:
        for i in range(10):
            group.start_soon(partial(s.run, SPEC, run_id=f"r{i}"))
    assert [box.profile.run_id for box in backend.boxes] == [f"r{i}" for i in range(10)]


async def test_queue_timeout() -> None:
    """A run that waits longer than allowed is refused, and can be repeated; the clock of the others goes on."""
    backend = FakeBackend([Play(NEVER)])
    async with sandbox(backend, max_concurrent=1, queue_timeout=0.05) as s, anyio.create_task_group() as group:
        group.start_soon(lambda: s.run(SPEC, run_id="first"))
        await wait_until(lambda: backend.alive)
        with pytest.raises(cloche.QueueTimeout, match=r"All 1 places were taken for 0\.05 s") as caught:
            await s.run(SPEC)
        assert caught.value.retryable
        assert len(backend.boxes) == 1
        s.kill("first")


async def test_queue_does_not_count() -> None:
    """The time in the queue counts neither for the start nor for the script."""
    backend = FakeBackend([Play([*begin(), 0.3, end(0)]), Play(HI)])
    async with sandbox(backend, max_concurrent=1, start_timeout=0.2) as s, anyio.create_task_group() as group:
        group.start_soon(lambda: s.run(SPEC))
        await wait_until(lambda: backend.alive)
        result = await s.run(SPEC.model_copy(update={"timeout": 0.1}))
    assert result.outcome == "exited"
    assert (result.timings_ms["queued"] or 0) > 200


# --- the clock -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("play", [Play(NEVER, open_s=math.inf), Play([math.inf]), Play([*begin()[:1], math.inf])])
async def test_start_timeout(play: Play) -> None:
    """A box that is not ready in time is given up, and the run can be repeated."""
    backend = FakeBackend([play])
    async with sandbox(backend, start_timeout=0.05) as s:
        with pytest.raises(cloche.StartTimeout, match=r"within 0\.05 s") as caught:
            await s.run(SPEC)
        assert caught.value.retryable
    assert backend.alive == 0


async def test_backstop() -> None:
    """A supervisor that does not end its run at the limit is not waited for: timed out, with what came, and the box killed."""
    backend = FakeBackend(
        [Play([*NEVER[:-1], File("a", 9, truncated=False), FileData(b"x"), math.inf], heeds_stop=False)]
    )
    async with sandbox(backend) as s:
        with anyio.fail_after(3):
            result = await s.run(SPEC.model_copy(update={"timeout": 0.05}), wait_cleanup=True)
    assert (result.outcome, result.exit_code, result.signal, result.stdout) == ("timed_out", None, None, "hi")
    assert (result.artifacts[0].data, result.artifacts[0].truncated) == (b"x", True)
    run_ms = result.timings_ms["run"]
    assert run_ms is not None
    assert 1350 <= run_ms < 2500, "the limit, the grace and a second"
    assert backend.boxes[0].removed


# --- cancellation --------------------------------------------------------------------------------------------------


async def cancelled_at(backend: FakeBackend, ready: Callable[[], object], **settings: Any) -> None:
    """Cancel the caller's task once ``ready``; when it has ended, nothing may be left."""
    async with sandbox(backend, **settings) as s:
        async with anyio.create_task_group() as group:
            group.start_soon(s.run, SPEC)
            await wait_until(ready)
            group.cancel_scope.cancel()
        assert backend.alive == 0, "the caller waited until the box was gone"


async def test_cancel_caller_while_running() -> None:
    """Cancelling the caller kills the box, and waits until it is removed."""
    backend = FakeBackend([Play(NEVER, removal_s=0.05)])
    await cancelled_at(backend, lambda: backend.boxes and backend.boxes[0].bundle)
    assert backend.boxes[0].removed


async def test_cancel_caller_while_starting() -> None:
    """Cancelling the caller while the engine makes the box gives it up."""
    asked: list[Profile] = []

    def play(profile: Profile) -> Play:
        asked.append(profile)
        return Play(open_s=math.inf)

    backend = FakeBackend(play)
    await cancelled_at(backend, lambda: asked)
    assert not backend.boxes


async def test_cancel_caller_while_feeding() -> None:
    """Cancelling the caller while the bundle goes in kills the box."""
    backend = FakeBackend([Play([math.inf], feed_s=math.inf)])
    await cancelled_at(backend, lambda: backend.boxes)


async def test_cancel_caller_while_queued() -> None:
    """Cancelling a caller who waits takes him out of the queue."""
    backend = FakeBackend([Play(NEVER), Play(HI)])
    async with sandbox(backend, max_concurrent=1) as s, anyio.create_task_group() as outer:
        outer.start_soon(lambda: s.run(SPEC, run_id="first"))
        await wait_until(lambda: backend.alive)
        async with anyio.create_task_group() as group:
            group.start_soon(s.run, SPEC)
            await wait_until(lambda: s._house is not None and s._house.admission.waiting)
            group.cancel_scope.cancel()
        assert len(backend.boxes) == 1
        s.kill("first")
        assert (await s.run(SPEC)).exit_code == 3, "the queue still serves"


async def test_cancel_by_id() -> None:
    """A run that is cancelled by its id lets the supervisor end it: what the script left is collected."""
    stopped: list[Step] = [File("a", 1, truncated=False), FileData(b"x"), ended_by(15, "cancel", stdout=2)]
    backend = FakeBackend([Play(NEVER, when_stopped=stopped)])
    async with sandbox(backend) as s:
        result = await stopped_run(s, backend, s.cancel)
        assert (result.outcome, result.stdout, result.artifact("a").data) == ("cancelled", "hi", b"x")
        assert await s.cancel("r1") is False
        assert await s.cancel("other") is False


async def stopped_run(s: Sandbox, backend: FakeBackend, stop: Callable[[str], Any]) -> cloche.Result:
    results: list[cloche.Result] = []

    async def run() -> None:
        results.append(await s.run(SPEC, run_id="r1", wait_cleanup=True))

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await wait_until(lambda: backend.boxes and backend.boxes[0].bundle)
        await anyio.sleep(0.01)
        answer = stop("r1")
        assert (answer if isinstance(answer, bool) else await answer) is True
    return results[0]


@pytest.mark.parametrize(
    "play",
    [
        Play(NEVER, heeds_stop=False),
        Play(NEVER, when_stopped=[]),
        Play(NEVER, when_stopped=[b"garbage\n"]),
    ],
    ids=["deaf", "dies", "garbles"],
)
async def test_cancel_a_deaf_supervisor(play: Play) -> None:
    """A supervisor that does not answer, or answers nonsense, is killed: the run is cancelled, with what came."""
    backend = FakeBackend([play])
    async with sandbox(backend) as s:
        with anyio.fail_after(3):
            result = await stopped_run(s, backend, s.cancel)
    assert (result.outcome, result.stdout) == ("cancelled", "hi")


async def test_kill() -> None:
    """A run that is killed ends at once, also with a deaf supervisor."""
    backend = FakeBackend([Play(NEVER, heeds_stop=False)])
    async with sandbox(backend) as s:
        with anyio.fail_after(1):
            result = await stopped_run(s, backend, s.kill)
        assert s.kill("r1") is False
    assert (result.outcome, result.stdout) == ("cancelled", "hi")


async def test_cancel_by_id_while_queued() -> None:
    """A run that still waits is cancelled without a box."""
    backend = FakeBackend([Play(NEVER)])
    async with sandbox(backend, max_concurrent=1) as s, anyio.create_task_group() as group:
        group.start_soon(lambda: s.run(SPEC, run_id="first"))
        await wait_until(lambda: backend.alive)
        results: list[cloche.Result] = []

        async def second() -> None:
            results.append(await s.run(SPEC, run_id="second"))

        group.start_soon(second)
        await wait_until(lambda: s._house is not None and s._house.admission.waiting)
        assert await s.cancel("second")
        await wait_until(lambda: results)
        assert (results[0].outcome, results[0].run_id, results[0].mode) == ("cancelled", "second", "local")
        assert len(backend.boxes) == 1
        s.kill("first")


async def test_generator_closed_early() -> None:
    """A stream that is closed before its end kills the box and waits for its removal."""
    backend = FakeBackend([Play(NEVER, removal_s=0.02)])
    async with sandbox(backend) as s:
        events = s.stream(SPEC)
        await anext(events)
        assert backend.alive == 1
        await events.aclose()
        assert backend.alive == 0


async def test_generator_dropped() -> None:
    """A stream that is dropped half-read is collected, and its box removed."""
    backend = FakeBackend([Play(NEVER)])
    async with sandbox(backend) as s:
        async for _ in s.stream(SPEC):
            break
        gc.collect()
        await wait_until(lambda: backend.alive == 0)


async def test_close() -> None:
    """Closing kills what runs and what waits, waits for removal, can be repeated, and refuses what comes later."""
    backend = FakeBackend([Play(NEVER, removal_s=0.05)])
    results: list[cloche.Result] = []
    async with anyio.create_task_group() as group:
        async with sandbox(backend, max_concurrent=2) as s:

            async def one() -> None:
                results.append(await s.run(SPEC))

            for _ in range(4):
                group.start_soon(one)
            await wait_until(lambda: backend.alive == 2)
            await s.close()
            assert backend.alive == 0
            await s.close()
            with pytest.raises(RuntimeError, match="closed"):
                await s.run(SPEC)
        await s.close()
    assert [r.outcome for r in results] == ["cancelled"] * 4
    assert backend.closed


async def test_body_that_raises() -> None:
    """An error in the body of the context comes out as it is, after every box is removed."""
    backend = FakeBackend([Play(NEVER)])
    with pytest.raises(KeyError, match="mine"):  # noqa: PT012 (what leaves the context is what is tested)
        async with sandbox(backend) as s:
            events = s.stream(SPEC)
            await anext(events)
            raise KeyError("mine")
    assert backend.alive == 0
    await events.aclose()


async def test_context_that_is_cancelled() -> None:
    """A whole context that is cancelled removes its boxes behind a shield."""
    backend = FakeBackend([Play(NEVER, removal_s=0.05)])
    with anyio.move_on_after(0.05) as scope:
        async with sandbox(backend) as s:
            await s.run(SPEC)
    assert scope.cancelled_caught
    assert (backend.alive, backend.closed) == (0, True)


async def test_use_before_and_twice() -> None:
    """A sandbox is entered before it is used, and once."""
    s = sandbox(FakeBackend())
    with pytest.raises(RuntimeError, match="enter the sandbox first"):
        await s.run(SPEC)
    await s.close()
    s = sandbox(FakeBackend())
    async with s:
        pass
    with pytest.raises(RuntimeError, match="entered once"):
        await s.__aenter__()


# --- without a last frame ------------------------------------------------------------------------------------------


async def test_oom_killed() -> None:
    """A box that the engine says was killed for want of memory is a result, with what came."""
    result = await played(Play(NEVER[:-1], fate=Fate(FateKind.OOM_KILLED)))
    assert (result.outcome, result.exit_code, result.signal, result.stdout) == ("out_of_memory", None, None, "hi")


@pytest.mark.parametrize(
    ("kind", "error", "retryable"),
    [
        (FateKind.NOT_STARTED, cloche.BackendUnavailable, False),
        (FateKind.EXITED, cloche.EngineLost, False),
        (FateKind.EVICTED, cloche.EngineLost, False),
        (FateKind.DELETED, cloche.EngineLost, False),
        (FateKind.LOST, cloche.EngineLost, True),
        (FateKind.RUNNING, cloche.EngineLost, True),
        (FateKind.IMAGE, cloche.ImageUnavailable, False),
        (FateKind.UNSCHEDULABLE, cloche.Unschedulable, True),
        (FateKind.QUOTA, cloche.QuotaExceeded, True),
        (FateKind.DENIED, cloche.PermissionDenied, False),
    ],
)
async def test_fates(kind: FateKind, error: type[cloche.ClocheError], retryable: bool) -> None:
    """Without a last frame the engine's word decides: an error with its message, never a guessed result."""
    with pytest.raises(error, match=r"The engine says: so it is\.") as caught:
        await played(Play([*begin()], fate=Fate(kind, "so it is.")))
    assert type(caught.value) is error
    assert caught.value.retryable is retryable


async def test_every_fate_is_tested() -> None:
    """The two tests above know every fate."""
    assert len(FateKind) == 11


async def test_fail_frame() -> None:
    """A script that the supervisor could not start is the error that it names."""
    with pytest.raises(cloche.InterpreterMissing, match="no ruby here") as caught:
        await played(Play([begin()[0], Fail("interpreter-missing", "no ruby here")]))
    assert caught.value.code == "interpreter-missing"


@pytest.mark.parametrize("garbage", [b"hello\n", b"@c 7 start\n", b"@c 2 o 0 !\n", b"x" * 9000, b"\n"])
async def test_garbage(garbage: bytes) -> None:
    """What no supervisor writes is an error, never output."""
    with pytest.raises(cloche.ProtocolError, match="not what the supervisor writes"):
        await played(Play([*begin(), garbage, end(0)]))


@pytest.mark.parametrize(
    "play",
    [
        Play(open_error=cloche.QuotaExceeded("No more pods.")),
        Play(feed_error=cloche.QuotaExceeded("No more maps."), steps=[math.inf]),
        Play([*begin(), cloche.QuotaExceeded("No more bytes.")]),
    ],
    ids=["open", "feed", "output"],
)
async def test_engine_errors(play: Play) -> None:
    """An error of the engine arrives as it is, wherever it happens, and the box is removed."""
    with pytest.raises(cloche.QuotaExceeded, match="No more"):
        await played(play)


async def test_bundle_that_nobody_takes() -> None:
    """A script that ended before the box took its whole bundle has its result all the same."""
    with anyio.fail_after(3):
        assert (await played(Play(HI, feed_s=math.inf))).exit_code == 3


async def test_foreign_errors() -> None:
    """An error in a backend itself arrives at its caller, and other runs go on."""
    backend = FakeBackend([Play(open_error=ZeroDivisionError("oops")), Play([*begin(), ZeroDivisionError("oops")])])
    async with sandbox(backend) as s:
        with pytest.raises(ZeroDivisionError):
            await s.run(SPEC)
        backend._plays = [Play([*begin(), ZeroDivisionError("oops")]), Play(HI)]
        with pytest.raises(ZeroDivisionError):
            await s.run(SPEC)
        assert (await s.run(SPEC)).exit_code == 3


# --- reading again -------------------------------------------------------------------------------------------------


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAUSES_S", (0.001,) * 4)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    "first",
    [
        HI[:1],
        HI[:3],
        [*HI[:2], b"@c 2 o 0 aG"],
        [*HI[:3], b"unable to retrieve container logs for x\n"],
        [*HI[:3], cloche.EngineLost("Reset by peer.", retryable=True)],
        [],
    ],
    ids=["hello", "data", "cut-line", "foreign", "lost", "nothing"],
)
async def test_replay(first: list[Step]) -> None:
    """A stream that ends early is read again from its start, and every frame arrives once."""
    backend = FakeBackend([Play(first, again=[HI])], capabilities=REPLAYABLE)
    async with sandbox(backend) as s:
        result = await s.run(SPEC)
    assert (result.exit_code, result.stdout, result.stdout_bytes) == (3, "hi", 2)
    assert backend.boxes[0].reads == 2


@pytest.mark.usefixtures("_quick")
async def test_replay_is_bounded() -> None:
    """A stream that ends early again and again is given up; then the engine's word decides."""
    backend = FakeBackend([Play(HI[:3], fate=Fate(FateKind.EVICTED))], capabilities=REPLAYABLE)
    async with sandbox(backend) as s:
        with pytest.raises(cloche.EngineLost, match="evicted"):
            await s.run(SPEC)
    assert backend.boxes[0].reads == reading.ENDS


@pytest.mark.usefixtures("_quick")
async def test_garbage_twice() -> None:
    """Garbage twice in the same place is not the connection's: it is an error."""
    backend = FakeBackend([Play([*HI[:3], b"?\n"])], capabilities=REPLAYABLE)
    async with sandbox(backend) as s:
        with pytest.raises(cloche.ProtocolError):
            await s.run(SPEC)
    assert backend.boxes[0].reads == 2


async def test_no_replay_unless_declared() -> None:
    """An engine that cannot give its output again is not asked to."""
    backend = FakeBackend([Play(HI[:3], again=[HI])])
    async with sandbox(backend) as s:
        with pytest.raises(cloche.EngineLost):
            await s.run(SPEC)
    assert backend.boxes[0].reads == 1


async def test_bytes_cut_anywhere() -> None:
    """An engine may cut the bytes anywhere."""
    frames = encode_frames([step for step in HI if not isinstance(step, bytes | float | Exception)])
    result = await played(Play([frames[i : i + 1] for i in range(len(frames))]))
    assert (result.exit_code, result.stdout) == (3, "hi")


# --- removal and sweep ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
async def test_removal_that_fails(caplog: pytest.LogCaptureFixture, wait: bool) -> None:
    """A removal that fails costs nobody his result: it is logged and counted."""
    backend = FakeBackend([Play(HI, removal_error=OSError("device busy"))])
    async with sandbox(backend) as s:
        assert (await s.run(SPEC, run_id="r1", wait_cleanup=wait)).exit_code == 3
        await s.close()
        assert s.counters.removals_failed == 1
    assert "the box of run r1 was not removed" in caplog.text
    assert "device busy" in caplog.text


@pytest.mark.parametrize("wait", [True, False])
async def test_removal_that_hangs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    """A removal that hangs is given up after its time, logged and counted; the place is free again."""
    monkeypatch.setattr(life, "REMOVAL_S", 0.05)
    backend = FakeBackend([Play(HI, removal_s=math.inf), Play(HI)])
    async with sandbox(backend, max_concurrent=1) as s:
        assert (await s.run(SPEC, wait_cleanup=wait)).exit_code == 3
        assert (await s.run(SPEC)).exit_code == 3
        assert s.counters.removals_failed == 1
    assert "took longer than 0.05 s" in caplog.text


async def test_sweep() -> None:
    """Entering sweeps in the background, once; what was removed is counted."""
    backend = FakeBackend(
        leftovers=[Leftover("folder", "x", removed=True), Leftover("job", "y", removed=False, reason="no")]
    )
    async with sandbox(backend) as s:
        pass
    assert (backend.sweeps, s.counters.swept, s.counters.sweeps_failed) == (1, 1, 1)


async def test_close_waits_for_the_sweep() -> None:
    """A process that lives for one run still gets to its sweep; one that hangs is not waited for."""
    backend = FakeBackend(leftovers=[Leftover("folder", "x", removed=True)], sweep_s=0.1)
    async with sandbox(backend) as s:
        pass
    assert s.counters.swept == 1
    with anyio.fail_after(5):
        async with sandbox(FakeBackend(sweep_s=math.inf)) as s:
            pass
    assert s.counters.swept == 0


async def test_sweep_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A sweep that fails is logged and counted; runs do not notice."""
    backend = FakeBackend([Play(HI)], leftovers=OSError("no"))
    async with sandbox(backend) as s:
        assert (await s.run(SPEC)).exit_code == 3
    assert s.counters.sweeps_failed == 1
    assert "sweep" in caplog.text


async def test_sweep_that_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """A sweep that fails with an error of cloche's is told in its words, without a traceback."""
    backend = FakeBackend([Play(HI)], leftovers=cloche.BackendUnavailable("The daemon does not answer."))
    async with sandbox(backend) as s:
        assert (await s.run(SPEC)).exit_code == 3
    assert s.counters.sweeps_failed == 1
    assert "The daemon does not answer." in caplog.text
    assert "Traceback" not in caplog.text


async def test_tended() -> None:
    """Entering has the backend look after its engine in the background, once."""
    backend = FakeBackend([Play(HI)])
    async with sandbox(backend) as s:
        await s.run(SPEC)
        await s.run(SPEC)
    assert backend.tended == 1


@pytest.mark.parametrize("error", [cloche.ImageUnavailable("There is no such image."), OSError("no")])
async def test_preparation_that_fails(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """A preparation that fails is logged, and no run notices: one that needs what is missing says so itself."""
    caplog.set_level(logging.INFO, "cloche.runtime")
    backend = FakeBackend([Play(HI)], tend_error=error)
    async with sandbox(backend) as s:
        assert (await s.run(SPEC)).exit_code == 3
    assert str(error).split(".")[0] in caplog.text


async def test_no_script_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of the script, its arguments, its environment or its output is logged."""
    spec = Spec(content="SECRET", name="a.py", args=("SECRET",), env={"X": "SECRET"}, stdin=b"SECRET")
    steps: list[Step] = [*begin(), Data("stdout", 0, b"SECRET"), end(0, stdout=6)]
    with caplog.at_level(logging.DEBUG):
        async with sandbox(FakeBackend([Play(steps, removal_error=OSError("x"))])) as s:
            await s.run(spec)
    assert caplog.records
    assert "SECRET" not in caplog.text


# --- for whoever keeps a sandbox open -------------------------------------------------------------------------------


async def test_sweeps_again_and_again() -> None:
    """As long as the sandbox is open, what the dead left is removed, again and again."""
    backend = FakeBackend(leftovers=[Leftover("folder", "x", removed=True)])
    async with sandbox(backend, sweep_every=0.01) as s:
        await wait_until(lambda: backend.sweeps >= 4)
        assert s.counters.swept >= 3
        await s.close()
        swept = backend.sweeps
        await anyio.sleep(0.05)
        assert backend.sweeps == swept, "a closed sandbox sweeps no more"


@pytest.mark.parametrize("error", [OSError("no"), cloche.BackendUnavailable("The daemon does not answer.")])
async def test_sweeps_after_one_that_failed(error: Exception) -> None:
    """A sweep that fails is not the last one."""
    backend = FakeBackend([Play(HI)], leftovers=error)
    async with sandbox(backend, sweep_every=0.01) as s:
        await wait_until(lambda: s.counters.sweeps_failed >= 3)
        assert (await s.run(SPEC)).exit_code == 3


@given(st.floats(1e-3, 7 * 24 * 3600))
def test_pauses_between_sweeps(every_s: float) -> None:
    """The pauses are half to one and a half times as long as said, and not all alike."""
    pauses = [pause(every_s) for _ in range(20)]
    assert all(0.5 * every_s <= each <= 1.5 * every_s for each in pauses)
    assert len(set(pauses)) > 1


async def test_load() -> None:
    """How many places there are, how many are taken, and how many runs wait for one."""
    backend = FakeBackend([Play(NEVER)])
    async with sandbox(backend, max_concurrent=2) as s, anyio.create_task_group() as group:
        assert s.load == Load(places=2, taken=0, waiting=0)
        for i in range(3):
            group.start_soon(partial(s.run, SPEC, run_id=f"r{i}"))
        await wait_until(lambda: backend.alive == 2)
        assert s.load == Load(places=2, taken=2, waiting=1)
        for i in range(3):
            s.kill(f"r{i}")


async def test_runs() -> None:
    """Whether scripts are run at all can be seen without running one."""
    async with sandbox(FakeBackend()) as s:
        assert s.runs
    async with Sandbox(Settings.model_validate({"mode": "disabled"})) as s:
        assert not s.runs


class Engines:
    """Makes a backend each time, as the real tables do. ``postures`` are what they find, one after the other."""

    def __init__(self, *postures: Posture | Exception, slow_s: float = 0.0) -> None:
        self.postures = list(postures)
        self.slow_s = slow_s
        self.made: list[FakeBackend] = []
        self.owners: list[str] = []

    def factory(self, settings: Settings, owner: str) -> FakeBackend:
        backend = FakeBackend([Play(HI)])
        found = self.postures[min(len(self.made), len(self.postures) - 1)]

        async def probe() -> Posture:
            await anyio.sleep(self.slow_s)
            if isinstance(found, Exception):
                raise found
            return found

        backend.probe = probe  # type: ignore[method-assign]
        self.made.append(backend)
        self.owners.append(owner)
        return backend


WELL = Posture("local", available=True, isolation=Isolation.NAMESPACE)
ILL = Posture("local", available=False, isolation=Isolation.NONE, reason="it is gone")


async def test_probe() -> None:
    """The engine is asked anew, by a backend of its own; the posture that was found on entering stays, and runs go on."""
    engines = Engines(WELL, ILL, WELL)
    async with Sandbox(backends={"local": engines.factory}) as s:
        assert await s.probe() == ILL
        assert await s.posture() == WELL
        assert (await s.run(SPEC)).exit_code == 3
        assert await s.probe() == WELL
        assert len(set(engines.owners)) == 3
        assert [backend.closed for backend in engines.made] == [False, True, True]


async def test_probe_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens to an engine, asking it raises nothing."""
    async with Sandbox(backends={"local": Engines(WELL, ZeroDivisionError("oops")).factory}) as s:
        found = await s.probe()
        assert (found.mode, found.available) == ("local", False)
        assert "oops" in found.reason
    engines = Engines(WELL)
    async with Sandbox(backends={"local": engines.factory}) as s:
        monkeypatch.setattr(choose, "LOOK_S", 0.01)
        engines.slow_s = math.inf
        found = await s.probe()
        assert (found.available, found.reason) == (False, "it gave no answer within 0.01 s")
        assert engines.made[1].closed


async def test_probes_at_once() -> None:
    """Those who ask while somebody else does share an answer that is no older than their question."""
    engines = Engines(WELL, ILL, WELL)
    async with Sandbox(backends={"local": engines.factory}) as s:
        engines.slow_s = 0.02
        found: list[Posture] = []

        async def ask() -> None:
            found.append(await s.probe())

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await anyio.sleep(0.005)
            for _ in range(20):
                group.start_soon(ask)
    assert found == [ILL, *[WELL] * 20]
    assert len(engines.made) == 3


async def test_probe_of_a_caller_who_leaves() -> None:
    """Somebody who does not wait for the answer leaves nothing, and takes nothing from the next one."""
    engines = Engines(WELL, ILL, WELL)
    async with Sandbox(backends={"local": engines.factory}) as s:
        engines.slow_s = math.inf
        with anyio.move_on_after(0.01):
            await s.probe()
        engines.slow_s = 0
        assert await s.probe() == WELL
    assert all(backend.closed for backend in engines.made)
