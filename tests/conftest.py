"""What holds for every test: no task is left pending, the loop is never blocked, nothing stays on the machine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest
from blockbuster import blockbuster_ctx
from tests.leftovers import left_since, now
from tests.modes import MODES, ready

from cloche.testing.conformance import Target, must_work

TOOLS = frozenset({"compose", "helm"})
"""Programs that have tests of their own, by the names of CLOCHE_MUST_WORK."""
QUICK = {"os.stat", "os.unlink", "os.readlink", "os.access", "os.path.islink", "os.path.abspath"}
"""Looking a path up takes some microseconds; handing that to a thread takes a hundred."""


def _is_quick(file: object, *_: object) -> bool:
    """Reading a line from the kernel does not wait for any disk."""
    return str(getattr(file, "name", "")).startswith(("/proc/", "/sys/"))


def pytest_configure(config: pytest.Config) -> None:
    # Under nohup these are ignored, and so they would be by the clients that the tests start and then send them to.
    for number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    demanded = {name.strip() for name in os.environ.get("CLOCHE_MUST_WORK", "").split(",") if name.strip()}
    if unknown := demanded - MODES.keys() - TOOLS:
        raise pytest.UsageError(
            f"CLOCHE_MUST_WORK names no mode and no tool that the suites know: {', '.join(sorted(unknown))}"
        )


def pytest_report_header() -> str:
    return (
        f"modes: {', '.join(f'{mode} (must work)' if must_work(mode) else mode for mode in MODES)}; uid {os.geteuid()}"
    )


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def _targets() -> dict[str, Target]:
    return {}


@pytest.fixture(params=MODES)
def target(request: pytest.FixtureRequest, _targets: dict[str, Target]) -> Target:
    """Each mode in turn. One whose engine is absent is skipped, or fails under CLOCHE_MUST_WORK."""
    if request.param not in _targets:
        _targets[request.param] = ready(request.param)
    return _targets[request.param]


@pytest.fixture(autouse=True)
def _guards(request: pytest.FixtureRequest) -> None:
    """The guards of the loop, for tests that have one."""
    if "anyio_backend" in request.fixturenames and request.getfixturevalue("anyio_backend_name") == "asyncio":
        request.getfixturevalue("_no_pending_tasks")
        request.getfixturevalue("_no_blocked_loop")


@pytest.fixture
async def _no_pending_tasks(anyio_backend: object) -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    # The runner of anyio's pytest plugin lives in tasks of its own.
    pending = [task for task in asyncio.all_tasks() - before if "TestRunner" not in repr(task.get_coro())]
    assert not pending, f"tasks left behind: {pending}"


@pytest.fixture
def _no_blocked_loop() -> Iterator[None]:
    """A blocking call of cloche's own in the loop's thread is an error. Tests themselves may block for a moment."""
    with blockbuster_ctx("cloche", excluded_modules=["cloche.testing"]) as guard:
        for name, function in guard.functions.items():
            # Modules are loaded on first use: once per process.
            function.can_block_in("<frozen importlib._bootstrap>", "_find_and_load")
            # A program is started by vfork: the thread waits until it is executed, in whatever way it is started.
            function.can_block_in("subprocess.py", "_execute_child")
            function.deactivate()
            if name.startswith("io.") and name.endswith(".read"):
                function.can_block_predicate = _is_quick
            if name not in QUICK:
                function.activate()
        yield


@pytest.fixture(autouse=True, scope="module")
def _nothing_left() -> Iterator[None]:
    """A module of tests leaves no process, no cgroup and no folder of cloche's on the machine."""
    before = now()
    yield
    left = left_since(before)
    assert not left, "left behind:\n" + "\n".join(left)
