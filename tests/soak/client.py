"""A client: a worker's process, that is told of runs, measured, killed, and started anew when it is gone."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import ByteReceiveStream, Process, TaskGroup
from tests.soak import worker
from tests.soak.oracle import DIED, Told
from tests.soak.plan import Run

START_S = 120.0
"""Three modes' clients start at once, on a machine on which engines are restarted."""
END_S = 90.0
RETRY_S = 0.5
"""Between two tries to open a sandbox on an engine that is being restarted."""


@dataclass(frozen=True)
class Measured:
    """What a client holds when no run of it is left."""

    rss: int
    fds: int
    runs: int
    removals_failed: int
    sweeps_failed: int
    swept: int


class ClientError(RuntimeError):
    """A client that does not start, or does not end as it should; the message is a complaint."""


class Client:
    """One at a time. ``excused`` says whether a sandbox that cannot be opened now has a reason that the soak knows."""

    def __init__(
        self, name: str, environ: Mapping[str, str], folder: Path, tasks: TaskGroup, excused: Callable[[], bool]
    ) -> None:
        self.name = name
        self._environ = environ
        self._folder = folder
        self._tasks = tasks
        self._excused = excused
        self._starting = anyio.Lock()
        self._process: Process | None = None
        self._waiting: dict[int | str, _Answer] = {}
        self._ready = False
        self._known = anyio.Event()
        """Whether it is ready."""
        self._gone = anyio.Event()
        self._unavailable = ""
        self._killed = False
        self.lives = 0
        self.owners: set[str] = set()
        """By which names its lives were known to engines."""

    async def ask(self, run: Run) -> Told:
        """What it tells of a run; ``died`` when it did before that."""
        order = {
            "number": run.number,
            "run_id": run.run_id,
            "spec": dict(run.made.spec),
            "stdin": None if run.made.stdin is None else base64.b64encode(run.made.stdin).decode(),
            "workspace": None if run.made.workspace is None else str(self._deliver(run)),
            "cancel": None if run.cancel is None else (run.cancel.by, run.cancel.after_s),
        }
        found = await self._send(run.number, order)
        return Told(DIED) if found is None else Told.from_json(found["told"])

    async def measure(self) -> Measured:
        """What it holds.

        Raises:
            ClientError: it died.
        """
        found = await self._send("measure", {"measure": True})
        if found is None:
            raise ClientError(f"the client {self.name} died")
        return Measured(**found)

    def kill(self) -> bool:
        """Kill it with what it runs. False: it does not live."""
        if self._process is None or self._process.returncode is not None:
            return False
        self._killed = True
        os.kill(self._process.pid, signal.SIGKILL)
        return True

    async def end(self) -> None:
        """Let it end in order.

        Raises:
            ClientError: it does not, or not well.
        """
        if self._process is None or self._killed:
            return
        assert self._process.stdin is not None
        await self._process.stdin.aclose()
        with anyio.move_on_after(END_S):
            await self._gone.wait()
            if (code := await self._process.wait()) != 0:
                raise ClientError(f"the client {self.name} ended with {code}:\n{self._said()}")
            return
        self._process.kill()
        raise ClientError(f"the client {self.name} did not end within {END_S:g} s:\n{self._said()}")

    async def _send(self, key: int | str, order: Mapping[str, Any]) -> Mapping[str, Any] | None:
        async with self._starting:
            await self._live()
            assert self._process is not None
            assert self._process.stdin is not None
            answer = self._waiting[key] = _Answer()
            # It may just have been killed, which the reader sees too.
            with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await self._process.stdin.send(json.dumps(order).encode() + b"\n")
        await answer.came.wait()
        return answer.what

    async def _live(self) -> None:
        """See that there is a process, with an open sandbox.

        Raises:
            ClientError: there is none in time, or for no reason that the soak knows.
        """
        with anyio.move_on_after(START_S):
            while self._process is None or self._gone.is_set() or self._killed:
                if self._process is not None:
                    await self._gone.wait()
                await self._start()
                await self._known.wait()
                if not self._ready and not self._killed:
                    if not self._excused():
                        raise ClientError(f"the client {self.name} does not start: {self._unavailable or self._said()}")
                    await anyio.sleep(RETRY_S)
            return
        raise ClientError(f"the client {self.name} was not ready within {START_S:g} s:\n{self._said()}")

    async def _start(self) -> None:
        self.lives += 1
        self._killed, self._ready, self._unavailable = False, False, ""
        self._known, self._gone = anyio.Event(), anyio.Event()
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = await anyio.open_process([sys.executable, worker.__file__], env=self._environ, stderr=log)
        self._tasks.start_soon(self._listen, self._process, self._known, self._gone)

    async def _listen(self, process: Process, known: anyio.Event, gone: anyio.Event) -> None:
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            found = json.loads(line)
            if "ready" in found:
                self._ready = True
                self.owners.add(found["ready"])
                known.set()
            elif "unavailable" in found:
                self._unavailable = found["unavailable"]
            elif (answer := self._waiting.pop(found.get("number", "measure"), None)) is not None:
                answer.give(found)
        await process.wait()
        for answer in self._waiting.values():
            answer.give(None)
        self._waiting.clear()
        gone.set()
        known.set()

    def _deliver(self, run: Run) -> Path:
        folder = self._folder / "workspaces" / run.word
        for path, data in (run.made.workspace or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder

    def _said(self) -> str:
        return (self._folder / f"{self.name}.log").read_text(errors="replace")[-3000:]


class _Answer:
    def __init__(self) -> None:
        self.came = anyio.Event()
        self.what: Mapping[str, Any] | None = None

    def give(self, what: Mapping[str, Any] | None) -> None:
        self.what = what
        self.came.set()


async def _lines(stream: ByteReceiveStream) -> AsyncIterator[bytes]:
    """Whole lines, however long; a killed process leaves half of one."""
    pieces: list[bytes] = []
    async for chunk in stream:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*pieces, line])
            pieces = []
        pieces.append(rest)
