"""Whole runs on a daemon that is played, and what they leave there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
import pytest
from tests.wire.docker import Docker

import cloche
from cloche.runtime.life import Counters

SPEC = cloche.Spec(content="pass", name="main.py", timeout=20)


OLD = {"cloche.made": "1000000000", "cloche.expires": "9999999999"}
"""The labels of a volume that was made long ago, and is trusted."""


async def prepared(docker: Docker, program_bytes: int | None = None) -> None:
    """Have the supervisor in its volume since long ago, so that all that comes next is of a run."""
    async with cloche.Sandbox(docker.settings()) as opened:
        await opened.run(SPEC)
    (name,) = docker.volumes
    docker.volumes[name] = OLD
    if program_bytes is not None:
        docker.program_bytes = program_bytes
    docker.made.clear()
    docker.removed.clear()
    docker.engine.requests.clear()


class Played(Protocol):
    """An engine that is played."""

    def settings(self, **more: Any) -> cloche.Settings:
        """Settings that lead to it."""


@dataclass
class Ended:
    """What became of a run, after its sandbox was left."""

    result: cloche.Result | None
    error: cloche.ClocheError | None
    counters: Counters


@asynccontextmanager
async def sandbox(docker: Docker, **settings: Any) -> AsyncIterator[cloche.Sandbox]:
    """A sandbox on the daemon, on which it leaves nothing."""
    async with cloche.Sandbox(docker.settings(**settings)) as opened:
        yield opened
    assert not docker.containers
    assert sorted(docker.removed) == sorted(made.name for made in docker.made)


async def run(docker: Docker, spec: cloche.Spec = SPEC, **settings: Any) -> cloche.Result:
    """The result of a run that leaves nothing."""
    async with sandbox(docker, **settings) as opened:
        return await opened.run(spec)


async def failure(docker: Docker, spec: cloche.Spec = SPEC, **settings: Any) -> cloche.ClocheError:
    """The error of a run that leaves nothing."""
    async with sandbox(docker, **settings) as opened:
        with pytest.raises(cloche.ClocheError) as caught:
            await opened.run(spec)
    return caught.value


async def ended(engine: Played, spec: cloche.Spec = SPEC, **settings: Any) -> Ended:
    """What becomes of a run of which something may be left."""
    result: cloche.Result | None = None
    error: cloche.ClocheError | None = None
    async with cloche.Sandbox(engine.settings(**settings)) as opened:
        try:
            result = await opened.run(spec)
        except cloche.ClocheError as exc:
            error = exc
    return Ended(result, error, opened.counters)


async def wait_until(condition: Callable[[], object]) -> None:
    """For what comes from somewhere else."""
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 (it is looked at from outside)
            await anyio.sleep(0.002)
