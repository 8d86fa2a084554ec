"""A ``cloche`` command on a terminal of its own, as a person has it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Makes stdin the controlling terminal of its session, and becomes the command."""


def command(*args: str) -> list[str]:
    """The argv of a ``cloche`` command, by the Python that runs the suite."""
    return [sys.executable, "-m", "cloche", *args]


@dataclass
class Terminal:
    """The person's side: what was shown, and keys."""

    process: subprocess.Popen[bytes]
    master: int
    slave: int
    shown: bytearray = field(default_factory=bytearray)

    def read(self, until: bytes | None, within_s: float) -> bytes:
        """Read on until the text was shown (None: until the command has ended). Gives all that was shown so far.

        Raises:
            TimeoutError: it did not happen in time.
        """
        end = time.monotonic() + within_s
        while until is None or until not in self.shown:
            ended = self.process.poll() is not None
            if select.select([self.master], [], [], 0 if ended else 0.05)[0]:
                self.shown += os.read(self.master, 65536)
            elif ended:
                if until is None:
                    break
                raise TimeoutError(f"the command ended with {self.process.returncode}, after {bytes(self.shown)!r}")
            if time.monotonic() > end:
                raise TimeoutError(f"after {within_s} s the terminal shows {bytes(self.shown)!r}")
        return bytes(self.shown)

    def press(self, keys: bytes) -> None:
        """Type; the byte 3 is Ctrl-C."""
        os.write(self.master, keys)

    def typed_ahead(self) -> bytes:
        """What lies in the terminal's input and was read by nobody: what an attacker typed in."""
        modes = termios.tcgetattr(self.slave)
        modes[3] &= ~termios.ICANON
        termios.tcsetattr(self.slave, termios.TCSANOW, modes)
        return os.read(self.slave, 4096) if select.select([self.slave], [], [], 0.2)[0] else b""


@contextmanager
def on_terminal(argv: Sequence[str], environ: Mapping[str, str]) -> Iterator[Terminal]:
    """The command in a new session with a new pseudo-terminal as its controlling one; killed at the end if need be."""
    master, slave = pty.openpty()

    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", TAKE_TERMINAL, *argv],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={"TERM": "xterm", **environ},
        start_new_session=True,
    )
    try:
        yield Terminal(process, master, slave)
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)
