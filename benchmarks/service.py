"""What the HTTP service adds to a run, and how it bears a crowd.

    make bench
    python -m benchmarks.service --rounds 100 --clients 200

**library**: the run in a sandbox of this process. **service**: the same run by `cloche serve` in another process, asked with one
POST over a kept connection by a bare client of one socket. Both are in the mode local and take turns within one round. The goal
is a difference of at most 5 ms at p50.

**The crowd**: so many clients at once, each with a connection of its own and some runs one after the other, against a service
with 5 places. Fair means first come, first served: how long the slowest waited is compared with what a fair queue gives.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import psutil
from anyio.streams.buffered import BufferedByteReceiveStream
from benchmarks.contenders import Contender, by_cloche, summary, take_turns, write_json
from rich.console import Console
from rich.table import Table

import cloche

GOAL_OVER_LIBRARY_MS = 5.0
TOKEN = "only-for-the-benchmark"
SPEC = cloche.Spec(content="", name="main.sh", interpreter="true")
BODY = json.dumps({"content": "", "name": "main.sh", "interpreter": "true"}).encode()
PLACES = 5
ANSWER_BYTES = 2**20
RUNS_PER_CLIENT = 5
FLAT_BYTES = 16 * 2**20
"""How much more memory a service may have after a crowd than after the one before."""
START_S, END_S = 30.0, 30.0


class Service:
    """`cloche serve`, as a process."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = psutil.Process(process.pid)
        self.port = port

    @property
    def memory(self) -> int:
        """Bytes of its own, and of its helpers, that are in memory."""
        return sum(one.memory_info().rss for one in (self.process, *self.process.children(recursive=True)))


@asynccontextmanager
async def serving(**settings: str) -> AsyncIterator[Service]:
    """One that is there until the end."""
    environ = {
        **os.environ,
        "CLOCHE_MODE": "local",
        "CLOCHE_SERVE_TOKENS": f"bench:{TOKEN}",
        "CLOCHE_LOG": "info",
        **settings,
    }
    command = [sys.executable, "-m", "cloche", "serve", "--address", "127.0.0.1:0"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as process:  # noqa: ASYNC220
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(b"{") and json.loads(line)["event"] == "listening":
                    port = int(json.loads(line)["address"].rpartition(":")[2])
                    break
            else:
                raise SystemExit("the service did not start")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: anyio.to_thread.run_sync(_drop, process.stderr, abandon_on_cancel=True))
                yield Service(process, port)
                tasks.cancel_scope.cancel()
        finally:
            process.terminate()
            process.wait(END_S)


def _drop(log: Any) -> None:
    for _ in log:
        pass


class Client:
    """A connection that is kept."""

    def __init__(self, stream: anyio.abc.SocketStream, body: bytes = BODY) -> None:
        self._stream = stream
        self._answers = BufferedByteReceiveStream(stream)
        self._request = (
            f"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    async def run(self) -> tuple[int, dict[str, Any]]:
        """One run: the status, and the answer."""
        await self._stream.send(self._request)
        head = (await self._answers.receive_until(b"\r\n\r\n", ANSWER_BYTES)).decode("latin-1").lower()
        length = next(int(line.partition(":")[2]) for line in head.split("\r\n") if line.startswith("content-length:"))
        return int(head.split()[1]), json.loads(await self._answers.receive_exactly(length))


@asynccontextmanager
async def connected(service: Service) -> AsyncIterator[Client]:
    """A client with a connection of its own."""
    async with await anyio.connect_tcp("127.0.0.1", service.port) as stream:
        yield Client(stream)


def by_service(client: Client) -> Contender:
    """A run by the service."""

    async def once() -> float:
        begun = time.perf_counter()
        status, answer = await client.run()
        taken = time.perf_counter() - begun
        if status != 200 or answer["exit_code"] != 0:
            raise SystemExit(f"the benchmark's own script failed: {status} {answer}")
        await anyio.sleep(0.01)  # as the library's contender does, for the removal
        return taken

    return once


async def compare(rounds: int) -> dict[str, Any]:
    """The service against the library."""
    async with AsyncExitStack() as stack:
        settings = cloche.Settings.from_env({"CLOCHE_MODE": "local"})
        sandbox = await stack.enter_async_context(cloche.Sandbox(settings))
        service = await stack.enter_async_context(serving())
        client = await stack.enter_async_context(connected(service))
        rows = await take_turns(
            {"library": by_cloche(sandbox, SPEC, whole=False, phases=[]), "service": by_service(client)},
            rounds,
            warm_up=10,
        )
    return {
        "rounds": rounds,
        "contenders": rows,
        "over_library_ms": round(rows["service"]["p50_ms"] - rows["library"]["p50_ms"], 2),
    }


async def crowd(clients: int) -> dict[str, Any]:
    """Many clients at once, three times: the last two show whether memory grows."""
    settings = {
        "CLOCHE_MAX_CONCURRENT": str(PLACES),
        "CLOCHE_SERVE_MAX_QUEUE": str(clients),
        "CLOCHE_QUEUE_TIMEOUT": "300",
        "CLOCHE_SERVE_KEEP_BYTES": "1Mi",  # full after the first round: what is kept of ended runs grows no more
    }
    async with serving(**settings) as service:
        rounds = [await _all_at_once(service, clients) for _ in range(3)]
        fds = service.process.num_fds()
    return {
        "clients": clients,
        "rounds": rounds,
        "memory_growth_bytes": rounds[-1]["memory_bytes"] - rounds[-2]["memory_bytes"],
        "descriptors_after": fds,
    }


async def _all_at_once(service: Service, clients: int) -> dict[str, Any]:
    waits: list[float] = []
    failures: dict[str, int] = {}

    async def one() -> None:
        async with connected(service) as client:
            for _ in range(RUNS_PER_CLIENT):
                begun = time.perf_counter()
                status, answer = await client.run()
                waits.append(time.perf_counter() - begun)
                if status != 200 or answer["exit_code"] != 0:
                    name = f"{status} {answer.get('code', answer.get('outcome'))}"
                    failures[name] = failures.get(name, 0) + 1

    begun = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(clients):
            tasks.start_soon(one)
    taken = time.perf_counter() - begun
    await anyio.sleep(1.0)
    return {
        "wait": summary(waits),
        "max_ms": round(max(waits) * 1000, 1),
        "runs_per_s": round(len(waits) / taken, 1),
        "fair_ms": round(taken / RUNS_PER_CLIENT * 1000, 1),
        "failures": failures,
        "memory_bytes": service.memory,
    }


async def flood(clients: int) -> dict[str, int]:
    """More clients than may wait, without patience: what fails first, and how."""
    ends: dict[str, int] = {}
    async with serving(
        CLOCHE_MAX_CONCURRENT=str(PLACES), CLOCHE_SERVE_MAX_QUEUE="50", CLOCHE_QUEUE_TIMEOUT="1"
    ) as service:

        async def one() -> None:
            async with connected(service) as client:
                status, answer = await client.run()
                name = str(answer.get("code", answer.get("outcome")))
                ends[f"{status} {name}"] = ends.get(f"{status} {name}", 0) + 1

        async with anyio.create_task_group() as tasks:
            for _ in range(clients):
                tasks.start_soon(one)
    return ends


async def measure(rounds: int, clients: int) -> dict[str, Any]:
    """Everything."""
    return {
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count()},
        "overhead": await compare(rounds),
        "crowd": await crowd(clients),
        "flood": await flood(clients),
    }


def show(found: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console()
    table = Table("", "p50 ms", "p90 ms", "p99 ms", title="one run of /bin/true, mode local", title_justify="left")
    for name, row in found["overhead"]["contenders"].items():
        table.add_row(name, *(f"{row[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")))
    console.print(table)
    over = found["overhead"]["over_library_ms"]
    verdict = "met" if over <= GOAL_OVER_LIBRARY_MS else "NOT met"
    console.print(
        f"the service over the library at p50: {over:.2f} ms (goal: at most {GOAL_OVER_LIBRARY_MS:g}; {verdict})\n"
    )
    many = found["crowd"]
    table = Table(
        "",
        "p50 ms",
        "p99 ms",
        "max ms",
        "fair ms",
        "runs/s",
        "MiB",
        "failed",
        title=f"{many['clients']} clients, {PLACES} places",
        title_justify="left",
    )
    for number, of in enumerate(many["rounds"], start=1):
        failed = ", ".join(f"{count} x {name}" for name, count in of["failures"].items()) or "none"
        table.add_row(
            f"round {number}",
            *(
                f"{value:.0f}"
                for value in (of["wait"]["p50_ms"], of["wait"]["p99_ms"], of["max_ms"], of["fair_ms"], of["runs_per_s"])
            ),
            f"{of['memory_bytes'] / 2**20:.0f}",
            failed,
        )
    console.print(table)
    console.print(f"memory from the second round to the third: {many['memory_growth_bytes'] / 2**20:+.1f} MiB")
    console.print(f"{many['clients']} clients where 50 may wait, for 1 s: {found['flood']}")


def main() -> int:
    """Exit status 1: memory grew, or a run of the crowd failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    found = anyio.run(measure, arguments.rounds, arguments.clients)
    show(found)
    if arguments.json:
        write_json(arguments.json, found)
    failed = any(of["failures"] for of in found["crowd"]["rounds"])
    return 1 if failed or found["crowd"]["memory_growth_bytes"] > FLAT_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
