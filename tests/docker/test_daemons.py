"""Daemons that stop, die and come back in the middle of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from tests import daemons
from tests.docker.conftest import private
from tests.engines.docker import images
from tests.engines.docker.daemon import Daemon

import cloche
from cloche.testing.conformance import assert_exited, shell

pytestmark = pytest.mark.anyio

SLOW = "echo running; sleep 60"


def sandbox(daemon: Daemon, **overrides: str) -> cloche.Sandbox:
    settings = {
        "CLOCHE_MODE": "docker",
        "CLOCHE_FALLBACK": "false",
        "CLOCHE_DOCKER_HOST": daemon.host,
        "CLOCHE_IMAGE": images.SANDBOX.name,
        "CLOCHE_PULL": "never",
    }
    return cloche.Sandbox.from_env({**settings, **overrides})


async def ended_by(daemon: Daemon, act: Callable[[], None]) -> cloche.ClocheError:
    """The error of a run in the middle of which something happens to its daemon."""
    begin = 0.0
    async with sandbox(daemon) as opened:
        try:
            async for event in opened.stream(shell(SLOW, timeout=90)):
                if isinstance(event, cloche.Output):
                    begin = time.monotonic()
                    await to_thread.run_sync(act)
        except cloche.ClocheError as exc:
            assert time.monotonic() - begin < 40
            return exc
    raise AssertionError("the run went on as if nothing had happened")


async def runs_again(daemon: Daemon) -> None:
    """The daemon makes boxes again, and nothing of earlier ones is left."""
    async with sandbox(daemon) as opened:
        assert_exited(await opened.run(shell("true"), wait_cleanup=True))
    assert list(daemons.remains(daemon.host)) == []


async def test_stopped(daemon: Daemon) -> None:
    """A daemon that is stopped in the middle of a run ends it as ``engine-lost``; once it is back, nothing is left."""
    error = await ended_by(daemon, daemon.stop)
    assert error.code == "engine-lost"
    assert error.hint
    await to_thread.run_sync(daemon.start)
    await runs_again(daemon)


async def test_killed(daemon: Daemon) -> None:
    """A daemon that dies is ``engine-lost``, and retryable; the script ends with it, and once it is back nothing is left."""
    error = await ended_by(daemon, daemon.kill)
    assert error.code == "engine-lost"
    assert error.retryable
    await to_thread.run_sync(daemon.start)
    await runs_again(daemon)


async def test_restarted_under_living_containers(folder: Path) -> None:
    """With live-restore containers outlive the daemon: the run is ``engine-lost`` or has its own result; nothing is left."""
    daemon = private(Daemon("current", folder / "d", live_restore=True))
    try:
        daemon.add(images.SANDBOX)

        def restart() -> None:
            daemon.stop()
            daemon.start()

        error = await ended_by(daemon, restart)
        assert error.code == "engine-lost"
        await runs_again(daemon)
    finally:
        await to_thread.run_sync(daemon.close)


async def test_gone_between_two_runs(daemon: Daemon) -> None:
    """A sandbox outlives its daemon: while that is away runs are refused, retryably; when it is back they work."""
    async with sandbox(daemon) as opened:
        assert_exited(await opened.run(shell("true"), wait_cleanup=True))
        await to_thread.run_sync(daemon.stop)
        with pytest.raises(cloche.BackendUnavailable) as caught:
            await opened.run(shell("true"))
        assert caught.value.retryable
        await to_thread.run_sync(daemon.start)
        with anyio.fail_after(30):
            assert_exited(await opened.run(shell("true"), wait_cleanup=True))


async def test_two_clients_and_a_crash(daemon: Daemon) -> None:
    """After a crash of the daemon in the middle of several runs, each has ended, and nothing is left of any."""
    codes: list[str] = []
    up = anyio.Event()
    async with sandbox(daemon, CLOCHE_MAX_CONCURRENT="8") as opened:

        async def one() -> None:
            try:
                async for event in opened.stream(shell(SLOW, timeout=90)):
                    if isinstance(event, cloche.Output):
                        codes.append("up")
                        if codes.count("up") == 6:
                            up.set()
            except cloche.ClocheError as exc:
                codes.append(exc.code)

        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(one)
            await up.wait()
            await to_thread.run_sync(daemon.kill)
    assert codes.count("engine-lost") == 6
    await to_thread.run_sync(daemon.start)
    await runs_again(daemon)
