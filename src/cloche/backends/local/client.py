"""The processes of one box: starts them, feeds them, reads them, signals them. The only room here that talks to the engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import anyio
from anyio.abc import Process

READ_BYTES = 64 * 1024
MESSAGE_BYTES = 4096
GONE_TIMEOUT_S = 5.0
"""For a killed box to be gone; a process in the middle of a system call may take a while."""


class BoxProcess:
    """bubblewrap's outer process, and through it the supervisor. Made by :func:`start`."""

    def __init__(self, process: Process, status_fd: int) -> None:
        self._process = process
        self._status_fd = status_fd
        self._supervisor: int | None = None
        """A pidfd, so that a signal can never reach a stranger with the same pid."""
        self.supervisor_pid: int | None = None
        """None: the box died before there was one."""

    async def find_supervisor(self) -> None:
        """Learn the supervisor's pid from bubblewrap, which writes it when the box's namespaces exist."""
        line = b""
        while not line.endswith(b"\n"):
            await anyio.wait_readable(self._status_fd)
            part = os.read(self._status_fd, 512)
            if not part:
                return  # it died before: output and exit status tell why
            line += part
        pid = json.loads(line.splitlines()[0])["child-pid"]
        with contextlib.suppress(ProcessLookupError):
            self._supervisor = os.pidfd_open(pid)
        if self._supervisor is not None and not _is_child(pid, self._process.pid):
            os.close(self._supervisor)  # it has ended already, and the number belongs to somebody else
            self._supervisor = None
        self.supervisor_pid = pid if self._supervisor is not None else None

    async def feed(self, records: Iterable[bytes]) -> None:
        """Write all records to the supervisor's stdin and close it. A box that died meanwhile is no error here."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            gathered = bytearray()
            for record in records:
                gathered += record
                if len(gathered) >= READ_BYTES:
                    await stdin.send(bytes(gathered))
                    gathered.clear()
            if gathered:
                await stdin.send(bytes(gathered))
        with contextlib.suppress(anyio.BrokenResourceError, BrokenPipeError, ConnectionResetError):
            await stdin.aclose()

    async def output(self) -> AsyncIterator[bytes]:
        """What the supervisor writes, until everybody who could write is gone."""
        stdout = self._process.stdout
        assert stdout is not None
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                yield await stdout.receive(READ_BYTES)

    def signal_supervisor(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor, if it is still there."""
        if self._supervisor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._supervisor, number)

    async def wait(self) -> int:
        """Exit status of bubblewrap, once the whole box is gone."""
        return await self._process.wait()

    async def message(self) -> str:
        """What launcher or bubblewrap had to say; empty when all went well. Call it after the end."""
        stderr = self._process.stderr
        assert stderr is not None
        text = b""
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while len(text) < MESSAGE_BYTES:
                text += await stderr.receive(MESSAGE_BYTES)
        return text.decode("utf-8", "replace").strip()

    async def close(self) -> None:
        """Kill whatever still runs and wait until it is gone. Shielded by the caller."""
        if self._process.returncode is None:
            self.signal_supervisor(signal.SIGKILL)
            if self._supervisor is None:
                # Not there yet: bubblewrap's own death takes the rest with it (--die-with-parent).
                self._process.kill()
            with anyio.move_on_after(GONE_TIMEOUT_S):
                await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        for fd in (self._supervisor, self._status_fd):
            if fd is not None:
                os.close(fd)
        self._supervisor = None
        await self._process.aclose()


def _is_child(pid: int, parent: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return int(stat.rpartition(b")")[2].split()[1]) == parent


@contextlib.asynccontextmanager
async def start(argv_for: Callable[[int], list[str]], env: dict[str, str]) -> AsyncIterator[BoxProcess]:
    """Start a box. ``argv_for`` makes the argument vector from the number of the status descriptor.

    Raises (on entering):
        OSError: the first program cannot be started.
    """
    status_read, status_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        process = await anyio.open_process(
            argv_for(status_write), pass_fds=(status_write,), env=env, cwd="/", start_new_session=True
        )
    except BaseException:
        os.close(status_read)
        raise
    finally:
        os.close(status_write)
    box = BoxProcess(process, status_read)
    try:
        await box.find_supervisor()
        yield box
    finally:
        with anyio.CancelScope(shield=True):
            await box.close()
