"""Many runs at once."""

from __future__ import annotations

import time

import anyio
from anyio import to_thread

import cloche
from cloche.testing.conformance.target import Suite, Target, assert_exited, python

RUNS = 50
PLACES = 8


EACH = """
import sys, time
number = sys.argv[1]
assert sys.stdin.read() == number
time.sleep(0.1)
with open("/output/number", "w") as file:
    file.write(number)
print(number)
sys.exit(int(number))
"""


class Crowd(Suite):
    """The concurrency limit."""

    async def test_fifty_at_once(self, target: Target) -> None:
        """50 runs at once with 8 places are all right, each with its own output, and there are never more than 8 boxes."""
        most = 0
        results: dict[int, cloche.Result] = {}
        intervals: list[tuple[float, float]] = []

        async def count() -> None:
            nonlocal most
            assert target.count_boxes is not None
            while True:
                most = max(most, await to_thread.run_sync(target.count_boxes))
                await anyio.sleep(0.005)

        async with target.sandbox(CLOCHE_MAX_CONCURRENT=str(PLACES)) as sandbox:

            async def one(i: int) -> None:
                spec = python(EACH, args=[str(i)], stdin=str(i).encode(), timeout=30)
                begin = time.monotonic()
                results[i] = await sandbox.run(spec)
                end = time.monotonic()
                queued = results[i].timings_ms["queued"]
                intervals.append((begin + (queued or 0) / 1000, end))

            async with anyio.create_task_group() as counting:
                if target.count_boxes is not None:
                    counting.start_soon(count)
                async with anyio.create_task_group() as tasks:
                    for i in range(RUNS):
                        tasks.start_soon(one, i)
                counting.cancel_scope.cancel()
        assert len(results) == RUNS
        for i, result in results.items():
            assert_exited(result, i)
            assert result.stdout == f"{i}\n"
            assert [a.data for a in result.artifacts] == [str(i).encode()]
        assert len({result.run_id for result in results.values()}) == RUNS
        overlap = max(sum(b <= begin < e for b, e in intervals) for begin, _ in intervals)
        assert overlap <= PLACES
        assert overlap > 1
        if target.count_boxes is not None:
            assert 1 < most <= PLACES
