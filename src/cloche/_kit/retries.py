"""Trying again what may be tried again."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

_T = TypeVar("_T")


async def repeat(
    attempt: Callable[[], Awaitable[_T]], pauses: Sequence[float], least_pause: Callable[[Exception], float | None]
) -> _T:
    """What ``attempt`` gives, tried again after each pause.

    Pauses are in seconds, and up to a quarter longer, so that not all who wait for the same come back at once. ``least_pause``
    tells how long an error has to be waited for at the least; None: it is raised at once.

    Raises:
        Exception: that of the last try.
    """
    for pause in pauses:
        try:
            return await attempt()
        except Exception as exc:
            least = least_pause(exc)
            if least is None:
                raise
        await anyio.sleep(max(pause, least) * random.uniform(1.0, 1.25))  # noqa: S311 - nobody's secret
    return await attempt()
