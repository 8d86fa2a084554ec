"""The simple call: one run, from code that is not async."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypedDict, cast

import anyio
from typing_extensions import Unpack

from cloche.isolation import Isolation
from cloche.result import Result
from cloche.runtime.runtime import Sandbox
from cloche.settings import Settings
from cloche.spec import Network, Spec


class SpecFields(TypedDict, total=False):
    """The fields of :class:`cloche.Spec`, as ``cloche.run`` takes them."""

    content: str | None
    name: str | None
    interpreter: str | None
    args: Sequence[str]
    env: Mapping[str, str]
    stdin: bytes | str | None
    workspace: str | os.PathLike[str] | None
    timeout: float | None
    memory: int | str | None
    cpus: float | None
    pids: int | None
    network: Network | str
    image: str | None
    min_isolation: Isolation | str | None


def run(script: str | os.PathLike[str] | None = None, **fields: Unpack[SpecFields]) -> Result:
    """Run a script in isolation and give its result: ``cloche.run("report.py", args=["--month", "5"], timeout=10)``.

    Takes the fields of :class:`cloche.Spec`; the settings come from the environment. Returns when the box is removed.
    Also works where an event loop already runs, as in a notebook: it blocks that loop. In async code use
    :class:`cloche.Sandbox`.

    Raises:
        ClocheError: the run could not happen, or how it ended is not known.
    """
    spec = Spec(script=None if script is None else os.fspath(script), **cast("dict[str, Any]", fields))
    # An image of the spec's is the whole sandbox's, so that no other one is prepared.
    settings = Settings.from_env(None, **({} if spec.image is None else {"image": spec.image}))
    if _loop_runs_here():
        return _in_thread(spec, settings)
    return anyio.run(_run, spec, settings)


async def _run(spec: Spec, settings: Settings) -> Result:
    async with Sandbox(settings) as sandbox:
        return await sandbox.run(spec, wait_cleanup=True)


def _loop_runs_here() -> bool:
    try:
        anyio.get_cancelled_exc_class()
    except RuntimeError:
        return False
    return True


def _in_thread(spec: Spec, settings: Settings) -> Result:
    """The run in a thread of its own. An interrupt of this one cancels it."""
    ending: list[Result | BaseException] = []
    cancel: list[Callable[[], object]] = []

    async def cancellable() -> Result | None:
        with anyio.CancelScope() as scope:
            loop = asyncio.get_running_loop()
            cancel.append(lambda: loop.call_soon_threadsafe(scope.cancel))
            return await _run(spec, settings)
        return None

    def body() -> None:
        try:
            result = anyio.run(cancellable)
        except BaseException as exc:  # noqa: BLE001 (handed to the caller's thread)
            ending.append(exc)
        else:
            ending.extend([] if result is None else [result])

    thread = threading.Thread(target=body, name="cloche.run")
    thread.start()
    try:
        thread.join()
    except BaseException:
        for call in cancel:
            with suppress(RuntimeError):  # the loop has just ended
                call()
        thread.join()
        raise
    last = ending[0]
    if isinstance(last, BaseException):
        raise last
    return last
