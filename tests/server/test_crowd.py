"""Many clients at once: each gets his own result, roughly in the order in which they came, and nothing stays."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import httpx2
import psutil
import pytest
from tests.server.serving import Served, events_of, serving, spec, until

CLIENTS = 60
FLAT_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def crowded(_nothing_left: None, _local: None) -> Iterator[Served]:
    with serving(CLOCHE_MAX_CONCURRENT="4", CLOCHE_QUEUE_TIMEOUT="170", CLOCHE_SERVE_KEEP_BYTES="1Mi") as found:
        yield found


async def crowd(served: Served, clients: int) -> list[int]:
    """So many clients; the numbers of their runs in the order in which they ended."""
    ended: list[int] = []

    async def one(number: int) -> None:
        headers = {"Accept": "text/event-stream"} if number % 3 == 0 else {}
        async with httpx2.AsyncClient(base_url=served.url, timeout=170, trust_env=False, headers=headers) as client:
            answer = await client.post("/v1/runs", json=spec(f"echo {number}; exit {number % 7}"))
        result = events_of(answer.text)[-1][1] if headers else answer.json()
        assert result["exit_code"] == number % 7
        assert headers or result["stdout"] == f"{number}\n"
        ended.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            tasks.start_soon(one, number)
            await anyio.sleep(0.005)
    return ended


async def test_crowd(crowded: Served) -> None:
    """Many clients at once all get their own results, in about the order in which they came; memory and descriptors stay flat."""
    await crowd(crowded, CLIENTS)
    process = psutil.Process(crowded.process.pid)
    until(lambda: len(process.net_connections()) == 1)
    rss, fds = crowded.rss(), process.num_fds()
    ended = await crowd(crowded, CLIENTS)
    assert sum(abs(place - number) for place, number in enumerate(ended)) / CLIENTS < 6
    until(lambda: process.num_fds() <= fds + 2)
    assert crowded.rss() - rss < FLAT_BYTES
    assert not [
        line for line in crowded.logged() if line["level"] in {"warning", "error"} and "tokens" not in line["event"]
    ]
