"""A client of the soak: is told of runs as JSON lines, and tells their results as such, when each is over.

It is a program of its own, as an application is that uses cloche: it can be killed with runs in the middle, and what it holds is
its own. It ends in order when nobody tells it anything any more.
"""

from __future__ import annotations

import base64
import ctypes
import gc
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import psutil

import cloche

IDLE_S = 45.0
"""For the removal of the last boxes."""


def say(**what: Any) -> None:
    """A line for who listens."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def main() -> None:
    """Serve until the input ends."""
    try:
        async with cloche.Sandbox.from_env() as sandbox:
            say(ready=sandbox.owner)
            async with anyio.create_task_group() as tasks, anyio.wrap_file(sys.stdin.buffer) as lines:
                while line := await lines.readline():
                    order = json.loads(line)
                    tasks.start_soon(measure if order.get("measure") else one, sandbox, order)
    except cloche.ClocheError as error:
        say(unavailable=str(error))
        raise SystemExit(3) from None


async def measure(sandbox: cloche.Sandbox, _: Mapping[str, Any]) -> None:
    """Say how much this process holds when no run of it is left."""
    with anyio.move_on_after(IDLE_S):
        while sandbox._runs:  # noqa: ASYNC110 (its tasks tell nobody)
            await anyio.sleep(0.05)
    gc.collect()
    # What was freed in the middle of the heap is no growth.
    ctypes.CDLL(None).malloc_trim(0)
    me, counters = psutil.Process(), sandbox.counters
    say(
        rss=me.memory_info().rss,
        fds=me.num_fds(),
        runs=len(sandbox._runs),
        removals_failed=counters.removals_failed,
        sweeps_failed=counters.sweeps_failed,
        swept=counters.swept,
    )


async def one(sandbox: cloche.Sandbox, order: Mapping[str, Any]) -> None:
    """A run, and somebody who may lose patience with it."""
    told: dict[str, Any] = {"outcome": "abandoned"}
    async with anyio.create_task_group() as beside:
        with anyio.CancelScope() as scope:
            if order["cancel"] is not None:
                beside.start_soon(lose_patience, sandbox, order, scope)
            told = await run(sandbox, order)
        beside.cancel_scope.cancel()
    say(number=order["number"], told=told)


async def lose_patience(sandbox: cloche.Sandbox, order: Mapping[str, Any], scope: anyio.CancelScope) -> None:
    """End a run after a while, in one of the ways that there are."""
    by, after_s = order["cancel"]
    await anyio.sleep(after_s)
    match by:
        case "task":
            scope.cancel()
        case "cancel":
            await sandbox.cancel(order["run_id"])
        case _:
            sandbox.kill(order["run_id"])


async def run(sandbox: cloche.Sandbox, order: Mapping[str, Any]) -> dict[str, Any]:
    """A result as JSON, with the exact bytes of the streams."""
    fold = sandbox.fold(order["run_id"])
    try:
        stdin = None if order["stdin"] is None else base64.b64decode(order["stdin"])
        workspace = None if order["workspace"] is None else Path(order["workspace"])
        spec = cloche.Spec(**order["spec"], stdin=stdin, workspace=workspace)
        async for event in sandbox.stream(spec, run_id=order["run_id"]):
            fold.add(event)
        result = fold.result()
    except cloche.ClocheError as error:
        result = fold.failed(error)
    except Exception:  # noqa: BLE001 (whatever it is, it is none of the errors that cloche promises)
        return {"outcome": "broken", "error": {"code": "none", "message": traceback.format_exc()}}
    raw = {"stdout_raw": result.stdout_raw, "stderr_raw": result.stderr_raw}
    return {
        **result.to_dict(),
        "stdout": None,
        "stderr": None,
        **{name: base64.b64encode(data).decode() for name, data in raw.items()},
    }


if __name__ == "__main__":
    anyio.run(main)
