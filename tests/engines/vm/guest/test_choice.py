"""Which way of bounding a box is chosen in this scene, and that it is a real one."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from tests.engines.vm.guest.stage import CHOSEN, OWN, SLOW, cgroups, none_left, note, python

import cloche
from cloche.isolation import State
from cloche.testing.conformance import observe

pytestmark = pytest.mark.anyio

SHOW = """
from pathlib import Path
for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max"):
    file = Path("/sys/fs/cgroup", name)
    print(name, file.read_text().strip() if file.exists() else "absent")
"""


@pytest.fixture
async def sandbox() -> AsyncIterator[cloche.Sandbox]:
    async with cloche.Sandbox.from_env({"CLOCHE_MODE": "local", "CLOCHE_FALLBACK": "false"}) as sandbox:
        yield sandbox


def test_the_scene_is_what_it_is_meant_to_be() -> None:
    """This process is in the cgroup that the scene is about, on a machine with cgroup v2 alone."""
    own = Path("/proc/self/cgroup").read_text().strip()
    assert re.fullmatch(f"0::{OWN}", own), own


async def test_what_the_posture_says(sandbox: cloche.Sandbox) -> None:
    """The posture names the way of bounding memory, processes and cpu, and says that it is in force, or honestly not."""
    held = {guarantee.name: guarantee for guarantee in (await sandbox.posture()).guarantees}
    names = ("memory-limit", "process-limit", "cpu-limit")
    if CHOSEN == "none":
        assert "watch" in held["memory-limit"].evidence or "supervisor" in held["memory-limit"].evidence
        assert "RLIMIT_NPROC" in held["process-limit"].evidence
        assert held["cpu-limit"].state is State.NOT_IN_FORCE
        assert held["cpu-limit"].advice
    else:
        for name in names:
            assert (held[name].state, f"cgroup ({CHOSEN})" in held[name].evidence) == (State.IN_FORCE, True), held[name]


async def test_the_limits_are_in_the_box(sandbox: cloche.Sandbox) -> None:
    """The limits of the run stand in the cgroup that the box sees as its own."""
    result = await sandbox.run(python(SHOW, memory="100Mi", pids=50, cpus=0.5))
    assert result.ok, result
    seen = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    if CHOSEN == "none":
        assert set(seen.values()) == {"absent"}
        return
    assert 100 * 2**20 <= int(seen["memory.max"]) <= 120 * 2**20
    assert seen["memory.swap.max"] in {"0", "absent"}
    assert 50 <= int(seen["pids.max"]) <= 52
    assert seen["cpu.max"] == "50000 100000"


async def test_nothing_is_left() -> None:
    """After runs one by one and eight at once, and after the sandbox is closed, no cgroup is left."""
    before = cgroups()
    settings = {"CLOCHE_MODE": "local", "CLOCHE_FALLBACK": "false", "CLOCHE_MAX_CONCURRENT": "8"}
    async with cloche.Sandbox.from_env(settings) as sandbox:
        assert (await sandbox.run(python("pass"))).ok
        if CHOSEN != "none":
            assert await to_thread.run_sync(observe.wait_until, lambda: bool(cgroups() - before), 5.0 * SLOW), (
                "no launcher stands by"
            )
        results: list[cloche.Result] = []

        async def one() -> None:
            results.append(await sandbox.run(python("import time; time.sleep(0.2)")))

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(one)
        assert [result.ok for result in results] == [True] * 8
    left = none_left(before)
    assert not left, left


async def test_others_stay_where_they_are(sandbox: cloche.Sandbox) -> None:
    """No process of anybody else is moved to another cgroup by opening a sandbox and running in it."""

    def homes() -> dict[str, str]:
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                started = process.joinpath("stat").read_text().rpartition(")")[2].split()[19]
                found[f"{process.name} {started}"] = process.joinpath("cgroup").read_text()
            except OSError:
                continue
        return found

    before = homes()
    async with cloche.Sandbox.from_env({"CLOCHE_MODE": "local"}) as another:
        assert (await another.run(python("pass"))).ok
    after = homes()
    moved = {name: (home, after[name]) for name, home in before.items() if after.get(name, home) != home}
    assert not moved


async def test_what_it_costs() -> None:
    """Runs in a row work; what they take, and bubblewrap alone beside them, is noted among the results."""
    bubblewrap = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--", "true"]
    script = cloche.Spec(name="t.sh", content="true", interpreter="sh")
    begin = time.perf_counter()
    async with cloche.Sandbox.from_env({"CLOCHE_MODE": "local"}) as sandbox:
        note("open_ms", 1000 * (time.perf_counter() - begin))
        took: dict[str, list[float]] = {"run_p50_ms": [], "bubblewrap_p50_ms": []}
        for _ in range(15):
            begin = time.perf_counter()
            assert (await sandbox.run(script)).ok
            took["run_p50_ms"].append(1000 * (time.perf_counter() - begin))
            begin = time.perf_counter()
            await anyio.run_process(bubblewrap)
            took["bubblewrap_p50_ms"].append(1000 * (time.perf_counter() - begin))
    for name, values in took.items():
        note(name, statistics.median(values))
