"""Whole runs on a service that is played, and what they leave there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.wire.opensandbox import LIST, OpenSandbox, is_left
from tests.wire.runs import SPEC, wait_until

import cloche
from cloche.backends.opensandbox.client import OpenSandboxClient


def hurry(monkeypatch: pytest.MonkeyPatch, answer_s: float) -> None:
    """An answer of the service is waited for so long."""
    defaults = OpenSandboxClient._once.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "timeout_s", answer_s)


@asynccontextmanager
async def sandbox(service: OpenSandbox, **settings: Any) -> AsyncIterator[cloche.Sandbox]:
    """A sandbox on the service, on which it leaves nothing."""
    async with cloche.Sandbox(service.settings(**settings)) as opened:
        await wait_until(lambda: service.engine.asked(LIST))  # it has swept, so that what comes next is of a run
        yield opened
    assert not service.boxes
    assert not await is_left(opened.owner)


async def run(service: OpenSandbox, spec: cloche.Spec = SPEC, **settings: Any) -> cloche.Result:
    """The result of a run that leaves nothing."""
    async with sandbox(service, **settings) as opened:
        return await opened.run(spec)


async def failure(service: OpenSandbox, spec: cloche.Spec = SPEC, **settings: Any) -> cloche.ClocheError:
    """The error of a run that leaves nothing."""
    async with sandbox(service, **settings) as opened:
        with pytest.raises(cloche.ClocheError) as caught:
            await opened.run(spec)
    return caught.value
