"""Whole runs at a service that is played, and what can go wrong with them: it is told of every run that is to end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.wire.engine import Raw, Reply
from tests.wire.remote import (
    DELETE,
    ENDED,
    EVENTS,
    HI,
    POST,
    STARTED,
    Remote,
    Step,
    message,
    playing,
    problem,
    signs_of_life,
)
from tests.wire.runs import SPEC, wait_until

import cloche
from cloche.events import Artifact, Event, Outcome, Output
from cloche.runtime.remote import client, run
from cloche.wire import event_to_dict

pytestmark = pytest.mark.anyio

NEVER: list[Step] = [STARTED, HI, math.inf, math.inf]
"""A script that prints and then runs until it is ended."""


@pytest.fixture
async def service(anyio_backend: object, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Remote]:
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.02))
    async with playing() as service:
        yield service
        assert not service.running


async def result_of(service: Remote, spec: cloche.Spec = SPEC, **settings: Any) -> cloche.Result:
    async with cloche.Sandbox(service.settings(**settings)) as sandbox:
        return await sandbox.run(spec, run_id="run-1")


async def failure(service: Remote, spec: cloche.Spec = SPEC, **settings: Any) -> cloche.ClocheError:
    async with cloche.Sandbox(service.settings(**settings)) as sandbox:
        with pytest.raises(cloche.ClocheError) as caught:
            await sandbox.run(spec, run_id="run-1")
    assert caught.value.hint
    return caught.value


# --- good runs -----------------------------------------------------------------------------------------------------


async def test_result(service: Remote) -> None:
    """A run gives the result of its events; mode and total are ours, the isolation is the service's, times are of both."""
    result = await result_of(service)
    assert (result.run_id, result.outcome, result.exit_code, result.stdout) == ("run-1", "exited", 3, "hi")
    assert (result.mode, result.isolation, result.fallback_from) == ("remote", "namespace", None)
    assert result.guarantees == ("network",)
    times = result.timings_ms
    assert (times["run"], times["collect"], times["cleanup"]) == (4.0, 5.0, None)
    assert (times["queued"] or 0) >= 1.0
    assert (times["prepare"] or 0) >= 2.0
    assert times["start"] is not None
    assert times["total"] is not None
    assert (service.killed, service.asked_to_end, service.left) == ([], [], [])


async def test_what_is_asked(service: Remote, tmp_path: Path) -> None:
    """A script alone is JSON; a folder is a form, whose length is told. Both carry the token and want events."""
    (tmp_path / "data").write_bytes(b"x" * 300_000)
    await result_of(service)
    await result_of(service, cloche.Spec(content="pass", name="main.py", workspace=tmp_path))
    small, large = service.engine.asked(POST)
    assert small.query == large.query == {"run_id": "run-1"}
    assert small.json() == {
        "name": "main.py",
        "content": "pass",
        "timeout": 20.0,
        "network": "none",
        "min_isolation": "namespace",
    }
    assert large.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert "transfer-encoding" not in large.headers
    assert len(large.body) == int(large.headers["content-length"]) > 300_000
    for request in (small, large):
        assert (request.headers["accept"], request.headers["authorization"][:7]) == ("text/event-stream", "Bearer ")


async def test_events(service: Remote) -> None:
    """Events are handed out as they come."""
    service.play = [STARTED, HI, math.inf]
    service.when_ended = [Artifact("a", 1, b"x"), replace(ENDED, outcome=Outcome.CANCELLED, exit_code=None)]
    async with cloche.Sandbox(service.settings()) as sandbox:
        seen: list[Event] = []
        async for event in sandbox.stream(SPEC, run_id="run-1"):
            seen.append(event)
            if isinstance(event, Output):
                assert service.running
                assert await sandbox.cancel("run-1")
    assert [type(event).__name__ for event in seen] == ["Started", "Output", "Artifact", "Finished"]
    assert (service.asked_to_end, service.killed) == (["run-1"], [])


async def test_signs_of_life(service: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that says nothing for long is not taken for dead as long as the service gives signs of life."""
    monkeypatch.setattr(client, "DEAD_S", 0.2)
    service.play = [STARTED, HI, *signs_of_life(5, every_s=0.1), ENDED]
    assert (await result_of(service)).exit_code == 3


async def test_places(service: Remote) -> None:
    """Here too no more runs are asked for than the settings allow, and who waits too long is refused."""
    service.play = NEVER
    settings = service.settings(max_concurrent=1, queue_timeout=0.1)
    async with cloche.Sandbox(settings) as sandbox, anyio.create_task_group() as group:
        group.start_soon(lambda: sandbox.run(SPEC, run_id="first"))
        await wait_until(lambda: service.running)
        with pytest.raises(cloche.QueueTimeout):
            await sandbox.run(SPEC)
        sandbox.kill("first")
    assert len(service.engine.asked(POST)) == 1


async def test_refused_here(service: Remote, tmp_path: Path) -> None:
    """What cannot be delivered is refused before anything is sent, with the errors of every engine."""
    (tmp_path / "data").write_bytes(b"x" * 2000)
    (tmp_path / "out").symlink_to("/etc/passwd")
    cases = [
        (cloche.Spec(script=str(tmp_path / "missing.py")), cloche.ScriptNotFound),
        (cloche.Spec(script="missing.py", workspace=tmp_path), cloche.ScriptNotFound),
        (cloche.Spec(content="x" * 1000, name="a.py"), cloche.ScriptTooLarge),
        (cloche.Spec(content="x", name="a.py", workspace=tmp_path), cloche.InvalidSpec),
    ]
    async with cloche.Sandbox(service.settings(max_script_bytes=100)) as sandbox:
        for spec, error in cases:
            with pytest.raises(error):
                await sandbox.run(spec)
    (tmp_path / "out").unlink()
    assert isinstance(await failure(service, cases[3][0], max_workspace_bytes=1000), cloche.WorkspaceTooLarge)
    assert not service.engine.asked(POST)
    assert not service.engine.asked(DELETE)


async def test_bounds_of_ours(service: Remote) -> None:
    """Where less may be kept here than there, it is cut here."""
    data = b"a" * 6000 + b"z" * 6000
    service.play = [
        STARTED,
        Output("stdout", 0, data),
        Artifact("f", 500, b"x" * 500),
        replace(ENDED, stdout_bytes=12_000),
    ]
    result = await result_of(service, max_output_bytes=4096, max_artifact_bytes=100)
    assert (len(result.stdout_raw), result.stdout_bytes, result.stdout_truncated) == (4096, 12_000, True)
    assert result.stdout.endswith("z" * 1024)
    assert (result.artifact("f").data, result.artifact("f").truncated) == (b"x" * 100, True)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "error", "words"),
    [
        (problem(422, "interpreter-missing", "No ruby."), cloche.InterpreterMissing, "No ruby."),
        (problem(429, "too-many-runs", "256 wait."), cloche.TooManyRuns, "256 wait."),
        (problem(409, "run-exists", "It is there."), cloche.InvalidSpec, "It is there."),
        (problem(403, "sandbox-disabled", "Off."), cloche.SandboxDisabled, "Off."),
        (problem(503, "shutting-down", "About to end."), cloche.BackendUnavailable, "About to end."),
        (problem(401, "unauthorized", "Who?"), cloche.BackendUnavailable, "does not take the token"),
        (Reply(404, b""), cloche.BackendUnavailable, "is no cloche service"),
        (Reply(307, b"", {"Location": "http://elsewhere.example"}), cloche.BackendUnavailable, "sends us elsewhere"),
        (Reply(200, {"run_id": "run-1"}), cloche.BackendUnavailable, "it sends no events"),
        (Reply(502, b"<html>" * 100_000), cloche.BackendUnavailable, "is away"),
        (problem(422, "invalid-spec", "x" * 1_000_000), cloche.BackendUnavailable, "is no cloche service"),
    ],
)
async def test_refused_there(service: Remote, word: Reply, error: type[cloche.ClocheError], words: str) -> None:
    """A refusal is the error that the service names, or tells what answers instead. Nothing was begun, so nothing is ended."""
    service.engine.on(POST, word)
    found = await failure(service)
    assert type(found) is error
    assert words in found.message
    assert len(found.message) < 3000
    assert len(service.engine.asked(POST)) == 1, "a run is asked for once"
    assert not service.engine.asked(DELETE)


async def test_error_in_the_stream(service: Remote) -> None:
    """A run that fails once it was accepted is the error that the service names; what it printed is kept."""
    told = {"code": "engine-lost", "detail": "The pod is gone.", "hint": "Look.", "retryable": False}
    service.play = [STARTED, HI, message("error", told)]
    found = await failure(service)
    assert (type(found), found.message, found.hint) == (cloche.EngineLost, "The pod is gone.", "Look.")
    service.play = [STARTED, message("error", ["what?"])]
    assert isinstance(await failure(service), cloche.EngineLost)
    assert not service.killed


async def test_below_the_floor_there(service: Remote) -> None:
    """A run that the service starts with less isolation than it must have is ended."""
    service.play = [replace(STARTED, isolation=cloche.Isolation.PROCESS), *NEVER[1:]]
    assert isinstance(await failure(service), cloche.IsolationUnavailable)
    assert service.killed == ["run-1"]


# --- what goes wrong on the way ------------------------------------------------------------------------------------


def told(event: Event) -> dict[str, Any]:
    return event_to_dict(event)


@pytest.mark.parametrize(
    "step",
    [
        b"event: started\ndata: {\n\n",
        b"event: output\ndata: 5\n\n",
        b"data: {}\n\n",
        message("surprise", {}),
        message("output", {**told(HI), "more": 1}),
        message("output", {**told(HI), "data": "?"}),
        message("started", {**told(STARTED), "run_id": "run-2"}),
        message("artifact", {**told(Artifact("a", 1, b"x")), "path": "/etc/passwd"}),
        message("finished", {**told(ENDED), "exit_code": 1000}),
        message("finished", {**told(ENDED), "stdout_bytes": 10**400}),
        message("finished", {**told(ENDED), "run_ms": 10**400}),
        b"data: " + b"[" * 100_000 + b"\n\n",
    ],
)
async def test_what_no_service_sends(service: Remote, step: bytes) -> None:
    """What no service sends is an error, never output or a result; and the run is ended."""
    service.play = [STARTED, step, math.inf]
    found = await failure(service)
    assert type(found) is cloche.ProtocolError
    assert service.killed == ["run-1"]


async def test_endless_message(service: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message without an end is given up at a bound that leaves room for every artifact that may be kept."""
    monkeypatch.setattr(run, "MIN_MESSAGE_BYTES", 1000)
    service.play = [STARTED, b"data: ", *[b"x" * 1000] * 100, math.inf]
    found = await failure(service, max_artifact_bytes=10_000)
    assert type(found) is cloche.ProtocolError
    assert "more than 15000 bytes" in found.message
    service.play = [STARTED, Artifact("a", 10_000, b"x" * 10_000), replace(ENDED, stdout_bytes=0)]
    assert len((await result_of(service, max_artifact_bytes=10_000)).artifact("a").data) == 10_000


async def test_endless_output(service: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that tells of output without end costs no memory, and is left when its time is over."""
    monkeypatch.setattr(run, "MARGIN_S", 0.0)
    flood: list[Step] = [Output("stdout", i * 1000, b"x" * 1000) for i in range(2000)]
    service.play = [STARTED, *flood, math.inf]
    found = await failure(service, cloche.Spec(content="x", name="a.py", timeout=0.5), max_output_bytes=2048)
    assert type(found) is cloche.EngineLost
    assert "did not say in time" in found.message


@pytest.mark.parametrize("cut", [(), (STARTED,), (STARTED, HI), (STARTED, HI, b"event: finished\ndata: {")])
async def test_stream_that_ends_early(service: Remote, cut: tuple[Step, ...]) -> None:
    """A stream that ends without the run's end is a lost run that may be repeated; the service is told to end it."""
    service.play = cut
    found = await failure(service)
    assert (type(found), found.retryable) == (cloche.EngineLost, True)
    assert service.killed == ["run-1"]


@pytest.mark.parametrize(
    "word",
    [
        Raw(),
        Raw(EVENTS),
        Raw(EVENTS + b"ffff\r\n: half"),
        Raw(EVENTS + b"no chunk"),
        Raw(b"HTTP/1.1 200 OK\r\nContent-Ty"),
    ],
)
async def test_connection_that_breaks(service: Remote, word: Raw) -> None:
    """A connection that breaks is a lost run that may be repeated; it is not asked for twice."""
    service.engine.on(POST, word)
    found = await failure(service)
    assert (type(found), found.retryable) == (cloche.EngineLost, True)
    assert len(service.engine.asked(POST)) == 1
    assert service.killed == ["run-1"]


async def test_dead_peer(service: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that gives no sign of life any more is lost, whatever time the script has."""
    monkeypatch.setattr(client, "DEAD_S", 0.2)
    service.play = [STARTED, HI, math.inf]
    begin = time.monotonic()
    found = await failure(service)
    assert (type(found), found.retryable) == (cloche.EngineLost, True)
    assert time.monotonic() - begin < 3
    assert service.killed == ["run-1"]


async def test_service_that_vanishes(service: Remote) -> None:
    """A service that dies in a run is lost; the rest is not waited for."""
    service.play = NEVER
    async with cloche.Sandbox(service.settings()) as sandbox:
        events = sandbox.stream(SPEC)
        assert [type(await anext(events)).__name__ for _ in range(2)] == ["Started", "Output"]
        service.engine.vanish()
        with pytest.raises(cloche.EngineLost), anyio.fail_after(10):
            await anext(events)


async def test_service_that_is_gone(service: Remote) -> None:
    """A run for which there is no connection was not begun: it may be repeated."""
    async with cloche.Sandbox(service.settings()) as sandbox:
        service.engine.vanish()
        await anyio.sleep(0.05)  # for the end of the connection to arrive
        with pytest.raises(cloche.BackendUnavailable, match="can be reached") as caught:
            await sandbox.run(SPEC)
        assert caught.value.retryable


async def test_start_that_does_not_come(service: Remote) -> None:
    """A run that the service does not start in the time that both queues and its engine may take is given up."""
    service.play = [*signs_of_life(100)]
    found = await failure(service, queue_timeout=0.1, start_timeout=0.2)
    assert (type(found), found.retryable) == (cloche.StartTimeout, True)
    assert service.killed == ["run-1"]


async def test_end_that_does_not_come(service: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that lives and never says how the run ended is left some time after the script's time is over."""
    monkeypatch.setattr(run, "MARGIN_S", 0.2)
    service.play = [STARTED, *signs_of_life(200)]
    begin = time.monotonic()
    found = await failure(service, cloche.Spec(content="x", name="a.py", timeout=0.2))
    assert (type(found), found.retryable) == (cloche.EngineLost, True)
    assert 0.4 <= time.monotonic() - begin < 3
    assert service.killed == ["run-1"]


async def test_stream_that_stays_open(service: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that stays open behind its last event costs nobody his result."""
    monkeypatch.setattr(run, "DRAIN_S", 0.2)
    service.play = [STARTED, HI, ENDED, math.inf]
    async with cloche.Sandbox(service.settings()) as sandbox:
        with anyio.fail_after(5):
            assert (await sandbox.run(SPEC)).exit_code == 3
    assert not service.killed


# --- ending a run --------------------------------------------------------------------------------------------------


async def stopped(
    service: Remote, stop: Callable[[cloche.Sandbox], Any], when: Callable[[], object] | None = None, **settings: Any
) -> cloche.Result:
    """The result of a run that somebody ends by its id, once it runs."""
    results: list[cloche.Result] = []
    async with cloche.Sandbox(service.settings(**settings)) as sandbox:

        async def one() -> None:
            fold = sandbox.fold("run-1")
            async for event in sandbox.stream(SPEC, run_id="run-1"):
                fold.add(event)
                if isinstance(event, Output):
                    seen.set()
            results.append(fold.result())

        seen = anyio.Event()
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(one)
                await (seen.wait() if when is None else wait_until(when))
                answer = stop(sandbox)
                assert (answer if isinstance(answer, bool) else await answer) is True
    return results[0]


async def test_cancel(service: Remote) -> None:
    """A run that is cancelled is ended by the service, with what it left."""
    service.play = NEVER
    service.when_ended = [Artifact("a", 1, b"x"), replace(ENDED, outcome=Outcome.CANCELLED, exit_code=None)]
    result = await stopped(service, lambda sandbox: sandbox.cancel("run-1"))
    assert (result.outcome, result.stdout, result.artifact("a").data) == ("cancelled", "hi", b"x")
    assert (service.asked_to_end, service.killed) == (["run-1"], [])


async def test_cancel_a_deaf_service(service: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that does not heed that is left, and told to kill the run."""
    monkeypatch.setattr(run, "STOP_S", 0.2)
    service.play = [STARTED, HI, *signs_of_life(100)]
    result = await stopped(service, lambda sandbox: sandbox.cancel("run-1"))
    assert (result.outcome, result.stdout, result.stdout_bytes) == ("cancelled", "hi", 2)
    assert (service.asked_to_end, service.killed) == (["run-1"], ["run-1"])


@pytest.mark.parametrize("word", [Reply(500, b""), Raw(), Reply(401, b"")])
async def test_cancel_that_is_refused(service: Remote, word: Reply | Raw, caplog: pytest.LogCaptureFixture) -> None:
    """Where the service does not take the wish, the run is killed by leaving it."""
    service.play = NEVER
    service.engine.on(DELETE, word)
    with caplog.at_level(logging.WARNING, "cloche"):
        result = await stopped(service, lambda sandbox: sandbox.cancel("run-1"))
    assert result.outcome == "cancelled"
    assert service.left == ["run-1"]
    assert "could not be asked to stop" in caplog.text


async def test_kill(service: Remote) -> None:
    """A run that is killed ends at once; the service is left and told."""
    service.play = NEVER
    result = await stopped(service, lambda sandbox: sandbox.kill("run-1"))
    assert (result.outcome, result.stdout) == ("cancelled", "hi")
    assert (service.killed, service.left) == (["run-1"], ["run-1"])


async def test_cancel_before_it_is_accepted(service: Remote) -> None:
    """A run of which the service has said nothing yet is ended by leaving."""
    service.engine.on(POST, Raw(math.inf))
    result = await stopped(service, lambda sandbox: sandbox.cancel("run-1"), lambda: bool(service.engine.asked(POST)))
    assert (result.outcome, result.mode) == ("cancelled", "remote")
    assert service.killed == ["run-1"]


async def test_cancelled_caller(service: Remote) -> None:
    """A caller who gives up has his run killed before he goes on."""
    service.play = NEVER
    async with cloche.Sandbox(service.settings()) as sandbox:
        with anyio.move_on_after(5):
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: sandbox.run(SPEC, run_id="run-1"))
                await wait_until(lambda: service.running)
                group.cancel_scope.cancel()
        assert service.killed == ["run-1"]
        assert sandbox.load.taken == 0


async def test_generator_closed_early(service: Remote) -> None:
    """A stream that is closed before its end has the run killed."""
    service.play = NEVER
    async with cloche.Sandbox(service.settings()) as sandbox:
        events = sandbox.stream(SPEC, run_id="run-1")
        await anext(events)
        await events.aclose()
        assert (service.killed, service.left) == (["run-1"], ["run-1"])


async def test_close(service: Remote) -> None:
    """Closing the sandbox has everything killed that still runs."""
    service.play = NEVER
    results: list[cloche.Result] = []
    async with cloche.Sandbox(service.settings()) as sandbox, anyio.create_task_group() as group:

        async def one() -> None:
            results.append(await sandbox.run(SPEC))

        for _ in range(3):
            group.start_soon(one)
        await wait_until(lambda: len(service.running) == 3)
        await sandbox.close()
    assert [result.outcome for result in results] == ["cancelled"] * 3
    assert len(service.killed) == 3


async def test_a_service_that_does_not_take_the_kill(service: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gives up does not wait long for a service that does not answer."""
    monkeypatch.setattr(client, "END_S", 0.2)
    service.play = NEVER
    service.engine.on(DELETE, Raw(math.inf))
    begin = time.monotonic()
    async with cloche.Sandbox(service.settings()) as sandbox:
        events = sandbox.stream(SPEC)
        await anext(events)
        await events.aclose()
    assert time.monotonic() - begin < 3


async def test_nothing_in_the_log(service: Remote, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of the script, its arguments, its environment, its output or the token is logged."""
    service.play = [STARTED, Output("stdout", 0, b"SECRET"), replace(ENDED, stdout_bytes=6)]
    spec = cloche.Spec(content="SECRET", name="a.py", args=("SECRET",), env={"X": "SECRET"}, stdin=b"SECRET")
    with caplog.at_level(logging.DEBUG):
        await result_of(service, spec)
        service.play = [STARTED, b"data: SECRET\n\n"]
        await failure(service, spec)
    assert caplog.records
    assert "SECRET" not in caplog.text
    assert "a-token" not in caplog.text
