"""The processes of one box: starts them, feeds them, reads them, signals them. The only room here that talks to the engine.

On plain pipes and a pidfd rather than the event loop's own subprocesses: those cost a thread and three transports a run
(measured: 0.9 ms against 0.2 ms to start a program, p50), and signals here must go by pidfd anyway.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import anyio

READ_BYTES = 64 * 1024
MESSAGE_BYTES = 4096
GONE_TIMEOUT_S = 5.0
"""For a killed box to be gone; a process in the middle of a system call may take a while."""


class BoxProcess:
    """A launcher that stands by, and what it becomes: bubblewrap, and in its box the supervisor. What is known here of the
    launcher is its guardian, which outlives the rest and leaves nothing of it.

    Raises:
        OSError: the launcher cannot be started.
    """

    def __init__(self, launcher: list[str], env: dict[str, str]) -> None:
        ours, theirs = [], []
        try:
            for inward in (True, False, False, False):  # stdin; stdout, stderr, and bubblewrap's status
                read, write = os.pipe2(os.O_CLOEXEC)
                ours.append(write if inward else read)
                theirs.append(read if inward else write)
            # From this thread, since the parent's death that ends the box is that of the thread which started it.
            self._process = subprocess.Popen(  # noqa: S603 - the vector is manifest's
                launcher,
                stdin=theirs[0],
                stdout=theirs[1],
                stderr=theirs[2],
                pass_fds=(theirs[3],),
                env=env,
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            _close(ours)
            raise
        finally:
            _close(theirs)
        self._stdin, self._stdout, self._stderr, self._status = ours
        try:
            for fd in ours:
                os.set_blocking(fd, False)
            self._exit = os.pidfd_open(self._process.pid)
        except BaseException:
            self._process.kill()
            self._process.wait()
            _close(ours)
            raise
        self._fds = {*ours, self._exit}
        self.status_fd = theirs[3]
        """The number under which the launcher, and so bubblewrap, has the status pipe."""
        self._supervisor: int | None = None
        """A pidfd, so that a signal can never reach a stranger with the same pid."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    async def go(self, vector: list[str]) -> None:
        """Tell the launcher the rest of its arguments: it becomes bubblewrap."""
        text = b"".join(os.fsencode(word) + b"\0" for word in vector)
        with contextlib.suppress(BrokenPipeError):  # it has died; its message tells why
            await _write(self._stdin, bytearray(len(text).to_bytes(4, "little") + text))

    async def find_supervisor(self) -> None:
        """Learn the supervisor's pid from bubblewrap, which writes it when the box's namespaces exist."""
        line = b""
        while not line.endswith(b"\n"):
            part = await _read(self._status, 512)
            if not part:
                return  # it died before: output and exit status tell why
            line += part
        pid = json.loads(line.splitlines()[0])["child-pid"]
        with contextlib.suppress(ProcessLookupError):
            self._supervisor = os.pidfd_open(pid)
        if self._supervisor is None:
            return
        self._fds.add(self._supervisor)
        if _parent(_parent(pid)) != self._process.pid:
            self._supervisor = None  # it has ended already, and the number belongs to somebody else

    async def feed(self, records: Iterable[bytes]) -> None:
        """Write all records to the supervisor's stdin and close it. A box that died meanwhile is no error here."""
        gathered = bytearray()
        with contextlib.suppress(BrokenPipeError):
            for record in records:
                gathered += record
                if len(gathered) >= READ_BYTES:
                    await _write(self._stdin, gathered)
                    gathered.clear()
            await _write(self._stdin, gathered)
        self._fds.discard(self._stdin)
        os.close(self._stdin)

    async def output(self) -> AsyncIterator[bytes]:
        """What the supervisor writes, until everybody who could write is gone."""
        while data := await _read(self._stdout, READ_BYTES):
            yield data

    def signal_supervisor(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor, if it is still there."""
        if self._supervisor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._supervisor, number)

    async def wait(self) -> int:
        """Exit status of bubblewrap (128 + n if a signal ended it), once the whole box is gone."""
        while (status := self._process.poll()) is None:
            await anyio.wait_readable(self._exit)
        return status

    async def message(self) -> str:
        """What launcher or bubblewrap had to say; empty when all went well. Call it after the end."""
        text = b""
        while len(text) < MESSAGE_BYTES and (part := await _read(self._stderr, MESSAGE_BYTES)):
            text += part
        return text.decode("utf-8", "replace").strip()

    def kill(self) -> None:
        """Kill what has not become a guardian yet."""
        self._process.kill()

    async def close(self) -> None:
        """Kill whatever still runs and wait until it is gone. Shielded by the caller."""
        if self._process.poll() is None:
            self.signal_supervisor(signal.SIGKILL)
            self._process.terminate()  # the guardian's order to end whatever there is
            with anyio.move_on_after(GONE_TIMEOUT_S):
                await self.wait()
            if self._process.poll() is None:
                self._process.kill()
                await self.wait()
        _close(self._fds)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


async def _read(fd: int, most: int) -> bytes:
    while True:
        try:
            return os.read(fd, most)
        except BlockingIOError:
            await anyio.wait_readable(fd)


async def _write(fd: int, data: bytearray) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            await anyio.wait_writable(fd)


def _parent(pid: int) -> int:
    """The parent of a process, 0 if there is no such process (any more)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(stat.rpartition(b")")[2].split()[1])
