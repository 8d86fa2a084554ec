"""Whole runs on a cluster that is played, and what they leave there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.wire.kubernetes import Kubernetes
from tests.wire.runs import SPEC, Ended, wait_until

import cloche


def check_nothing_left(cluster: Kubernetes) -> None:
    """Of runs nothing is left; a supervisor may be."""
    assert not cluster.jobs
    assert not cluster.pods
    assert list(cluster.config_maps.values()) == cluster.supervisors


@asynccontextmanager
async def sandbox(cluster: Kubernetes, **settings: Any) -> AsyncIterator[cloche.Sandbox]:
    """A sandbox on the cluster, which watches it, and on which it leaves nothing."""
    async with cloche.Sandbox(cluster.settings(**settings)) as opened:
        await wait_until(lambda: cluster.watching)
        await wait_until(lambda: cluster.supervisors)
        yield opened
    check_nothing_left(cluster)


async def run(cluster: Kubernetes, spec: cloche.Spec = SPEC, **settings: Any) -> cloche.Result:
    """The result of a run that leaves nothing."""
    async with sandbox(cluster, **settings) as opened:
        return await opened.run(spec)


async def failure(cluster: Kubernetes, spec: cloche.Spec = SPEC, **settings: Any) -> cloche.ClocheError:
    """The error of a run that leaves nothing."""
    async with sandbox(cluster, **settings) as opened:
        with pytest.raises(cloche.ClocheError) as caught:
            await opened.run(spec)
    return caught.value


async def ended(cluster: Kubernetes, spec: cloche.Spec = SPEC, **settings: Any) -> Ended:
    """What becomes of a run of which something may be left."""
    result: cloche.Result | None = None
    error: cloche.ClocheError | None = None
    async with cloche.Sandbox(cluster.settings(**settings)) as opened:
        try:
            result = await opened.run(spec)
        except cloche.ClocheError as exc:
            error = exc
    return Ended(result, error, opened.counters)
