"""Drives a soak: all modes at once, each with clients of its own, and with whatever the plan lets happen to them."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import anyio
from anyio import to_thread
from tests.soak import inventory
from tests.soak.client import Client, ClientError, Measured
from tests.soak.kinds import OUTPUT_BYTES
from tests.soak.oracle import Told, judge
from tests.soak.places import Place
from tests.soak.plan import MORTAL, STEADY, Fault, Run, warm_up
from tests.soak.report import OfMode, Report

from cloche.testing.conformance import Target

AT_ONCE = 6
"""Runs of a mode that are asked for at once: more than its clients have places for, so that some wait."""
AWAY_RUNS = 3
"""Runs of a mode that are begun while its engine is away."""
PLACES = 2
"""Of each client."""
SETTINGS: Mapping[str, str] = {
    "CLOCHE_MAX_CONCURRENT": str(PLACES),
    "CLOCHE_MAX_OUTPUT_BYTES": str(OUTPUT_BYTES),
    "CLOCHE_START_TIMEOUT": "60",
    "CLOCHE_QUEUE_TIMEOUT": "300",
    "CLOCHE_SWEEP_EVERY": "10",
}
"""Living clients sweep beside each other, all the time."""
RECOVERY_S = 5.0
"""For so long after an engine's return its parts may still look for each other."""
BOX_S = 10.0
"""For so long a fault waits for the box that it is to kill."""
GONE_S = 20.0
"""For what goes late, after the last sweep."""
SWEEP_S = 180.0
SWEEP_AGAIN_S = 10.0


class Course:
    """One mode's part."""

    def __init__(
        self, place: Place, runs: Sequence[Run], folder: Path, of_mode: OfMode, told: Callable[[], object]
    ) -> None:
        self._place = place
        self._runs = runs
        self._folder = folder
        self._of_mode = of_mode
        self._told = told
        self._clients: dict[str, Client] = {}
        self._restarts: list[tuple[float, float]] = []
        self._restarting = anyio.Lock()
        self._back = anyio.Event()
        self._back.set()
        self._refused = 0
        self._boxes_killed: set[int] = set()
        self._clients_killed: dict[str, list[float]] = {name: [] for name in (STEADY, *MORTAL)}
        self._over: dict[int, anyio.Event] = {}

    async def drive(self) -> None:
        """All of it, until every client has ended. What is wrong stands in the report."""
        self._folder.mkdir()
        environ = {**self._place.target.command_environment(**SETTINGS), "TMPDIR": str(self._folder.parent / "tmp")}
        async with anyio.create_task_group() as tasks:
            self._clients = {
                name: Client(name, environ, self._folder, tasks, self._is_excused) for name in (STEADY, *MORTAL)
            }
            first = warm_up(len(self._runs))
            await self._all(self._runs[:first])
            warm = await self._measure()
            await self._all(self._runs[first : -len(MORTAL)])
            last = await self._measure()
            if warm is not None and last is not None:
                self._of_mode.measured(warm, last)
            await self._end(STEADY)  # which would sweep
            await self._all(self._runs[-len(MORTAL) :])
            for name in MORTAL:
                await self._end(name)
            self._of_mode.lives = sum(client.lives for client in self._clients.values())
            self._of_mode.owners = set().union(*(client.owners for client in self._clients.values()))

    async def _end(self, name: str) -> None:
        try:
            await self._clients[name].end()
        except ClientError as exc:
            self._of_mode.wrong.append(str(exc))

    async def _measure(self) -> Measured | None:
        try:
            return await self._clients[STEADY].measure()
        except ClientError as exc:
            self._of_mode.wrong.append(str(exc))
            return None

    async def _all(self, runs: Iterable[Run]) -> None:
        places = anyio.Semaphore(AT_ONCE)

        async def one(run: Run) -> None:
            try:
                await self._one(run)
            except ClientError as exc:
                self._of_mode.wrong.append(f"{run.word}: {exc}")
            finally:
                places.release()

        async with anyio.create_task_group() as tasks:
            for run in runs:
                await places.acquire()
                await self._hold_back()
                tasks.start_soon(one, run)

    async def _hold_back(self) -> None:
        """Where the engine is away, only some runs find that out: each is refused within milliseconds, and so all would be."""
        if not self._back.is_set():
            self._refused += 1
            if self._refused > AWAY_RUNS:
                await self._back.wait()

    async def _one(self, run: Run) -> None:
        begun = time.monotonic()
        over = self._over[run.number] = anyio.Event()
        async with anyio.create_task_group() as beside:
            if run.happens is not None:
                beside.start_soon(self._happen, run)
            told = await self._clients[run.client].ask(run)
            over.set()
        self._note(run, told, begun)

    def _note(self, run: Run, told: Told, begun: float) -> None:
        self._of_mode.runs += 1
        self._of_mode.outcomes[told.counted] += 1
        self._of_mode.ok += told.outcome == "exited" and told.exit_code == 0
        if complaint := judge(run, told, self._faults_of(run, begun)):
            self._of_mode.wrong.append(f"{run.word} ({run.kind}, {run.client}): {complaint}")
        self._told()

    def _faults_of(self, run: Run, begun: float) -> frozenset[Fault]:
        """Those that may have met a run, which has just ended."""
        now = time.monotonic()
        found = set()
        if run.number in self._boxes_killed:
            found.add(Fault.KILL_BOX)
        if any(begun <= at <= now for at in self._clients_killed[run.client]):
            found.add(Fault.KILL_CLIENT)
        if any(begun <= end + RECOVERY_S and begin <= now for begin, end in self._restarts):
            found.add(Fault.RESTART_ENGINE)
        return frozenset(found)

    def _is_excused(self) -> bool:
        return any(begin <= time.monotonic() <= end + RECOVERY_S for begin, end in self._restarts)

    async def _happen(self, run: Run) -> None:
        happens = run.happens
        assert happens is not None
        await anyio.sleep(happens.after_s)
        chance = random.Random(happens.chance)
        how = ""
        match happens.fault:
            case Fault.KILL_CLIENT:
                self._clients_killed[run.client].append(time.monotonic())
                how = "SIGKILL of a client" if self._clients[run.client].kill() else how
            case Fault.KILL_BOX:
                how = await self._kill_box(run, chance)
            case Fault.RESTART_ENGINE:
                how = await self._restart(chance)
        if how:
            self._of_mode.faults[how] += 1
        else:
            self._of_mode.missed += 1

    async def _kill_box(self, run: Run, chance: random.Random) -> str:
        end = time.monotonic() + BOX_S
        # Whoever is told of the end may be told before we are told that the box was killed.
        self._boxes_killed.add(run.number)
        while not self._over[run.number].is_set() and time.monotonic() < end:
            try:
                if how := await to_thread.run_sync(self._place.kill_box, run.run_id, run.word, chance):
                    return how
            except Exception:
                if not self._is_excused():
                    raise
            await anyio.sleep(0.05)
        self._boxes_killed.discard(run.number)
        return ""

    async def _restart(self, chance: random.Random) -> str:
        async with self._restarting:
            begun = time.monotonic()
            self._restarts.append((begun, float("inf")))
            self._back, self._refused = anyio.Event(), 0
            try:
                how = await to_thread.run_sync(self._place.restart, chance)
            finally:
                self._restarts[-1] = (begun, time.monotonic())
                self._back.set()
        return how


async def soak(
    places: Sequence[Place],
    runs: Mapping[str, Sequence[Run]],
    folder: Path,
    report: Report,
    told: Callable[[], object],
    patience_s: float = 0,
) -> None:
    """All modes at once. Then what the dead left is swept, and the machine looked at; ``report`` has what came of it.

    ``patience_s``: for how long, if need be, it is swept again and again, until no file tells of any dead owner.
    """
    begun = time.monotonic()
    temporary = folder / "tmp"
    temporary.mkdir()
    for place in places:
        # What is made once and for all: the supervisor's volume, its ConfigMap, the folder of locks.
        await to_thread.run_sync(_first_run, place, folder)
    look = functools.partial(inventory.take, places, (temporary, folder / "serve"), report.mark)
    before = await to_thread.run_sync(look)
    async with anyio.create_task_group() as tasks:
        for place in places:
            of_mode = report.modes[place.mode] = OfMode()
            course = Course(place, runs[place.mode], folder / place.mode, of_mode, told)
            tasks.start_soon(course.drive)
    await to_thread.run_sync(_end, places, report)
    report.left = await to_thread.run_sync(inventory.settled, look, before, GONE_S)
    await to_thread.run_sync(_wait, places, report, patience_s)
    report.seconds = time.monotonic() - begun


def _first_run(place: Place, folder: Path) -> None:
    script = folder / "first.sh"
    script.write_text("true\n")
    command = [
        sys.executable,
        "-m",
        "cloche",
        "run",
        "--timeout",
        "30",
        "--json",
        str(script),
    ]
    done = subprocess.run(command, env=place.target.command_environment(), capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the mode {place.mode} does not work here: {done.stdout.decode()}{done.stderr.decode()}")


def _end(places: Sequence[Place], report: Report) -> None:
    for place in places:
        place.target.settle()
        try:
            place.close()
        except RuntimeError as exc:
            report.modes[place.mode].wrong.append(str(exc))
    for place in places:
        sweep(place, report.modes[place.mode])


def _wait(places: Sequence[Place], report: Report, patience_s: float) -> None:
    """Until the files of dead owners are gone. Those that are not, in this time, are left."""
    owners = frozenset().union(*(each.owners for each in report.modes.values()))
    end = time.monotonic() + patience_s
    while (waiting := inventory.waiting(owners)) and time.monotonic() < end:
        time.sleep(SWEEP_AGAIN_S)
        for place in places:
            sweep(place, report.modes[place.mode])
    if patience_s:
        report.left += waiting
    else:
        report.waiting = waiting


def sweep(place: Place, of_mode: OfMode) -> None:
    """``cloche sweep``, which finds every dead owner, as his lock on this machine proves."""
    # A service sweeps its own engine, which here is this machine.
    mode = "local" if place.mode == "remote" else place.mode
    environ = (place.target if mode == place.mode else Target("local")).command_environment()
    command = [sys.executable, "-m", "cloche", "sweep", "--mode", mode, "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, check=False, timeout=SWEEP_S)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {"error": {"message": done.stderr.decode()}, "leftovers": []}
    if found["error"] is not None:
        of_mode.wrong.append(f"the sweep failed: {found['error']['message']}")
    for leftover in found["leftovers"]:
        of_mode.swept += leftover["removed"]
        if not leftover["removed"]:
            of_mode.wrong.append(
                f"the sweep did not remove the {leftover['kind']} {leftover['name']}: {leftover['reason']}"
            )
