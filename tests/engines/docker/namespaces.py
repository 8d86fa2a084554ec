"""A network, mounts and processes of their own for a daemon: all of it goes when their first process goes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.engines.docker import host

INIT = Path(__file__).with_name("init.py")
READY_S = 20.0
GONE_S = 20.0


class Namespaces:
    """Made by :meth:`start`, entered with :meth:`enter`, gone with :meth:`stop`.

    Which process holds them is noted in a file, so that another program can end them. An ``owned`` one also ends with the
    program that started it, however that ends.
    """

    def __init__(self, note: Path, *, network: bool = True, owned: bool = True) -> None:
        self._note = note
        self._network = network
        self._owned = owned
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Make them.

        Raises:
            RuntimeError: they cannot be made here.
        """
        host.need("unshare", "nsenter", "ip")
        words = [word for word, wanted in (("network", self._network), ("owned", self._owned)) if wanted]
        kinds = ["--mount", "--pid", *(["--net"] if self._network else [])]
        command = [
            "unshare",
            *kinds,
            "--fork",
            "--kill-child",
            "--mount-proc",
            sys.executable,
            "-IS",
            str(INIT),
            *words,
        ]
        errors = self._note.with_suffix(".log")
        with open(errors, "wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if self._owned else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        stream = self._process.stdout
        assert stream is not None
        with stream:
            said = stream.readline() if select.select([stream], [], [], READY_S)[0] else b""
        if said != b"ready\n":
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"no namespaces for a daemon could be made here: {errors.read_text().strip()}")
        first = host.children(self._process.pid)[0]
        self._note.write_text(f"{first} {_birth(first)}\n")

    @property
    def pid(self) -> int | None:
        """Their first process as seen from outside; None when it is gone."""
        try:
            pid, birth = map(int, self._note.read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        return pid if _birth(pid) == birth else None

    def enter(self, *command: str) -> list[str]:
        """The command that runs a command inside.

        Not ``ip netns exec``: that mounts a new /sys, which hides the cgroups.

        Raises:
            RuntimeError: there is no inside.
        """
        if (pid := self.pid) is None:
            raise RuntimeError("the daemon's namespaces are gone")
        kinds = ["--mount", "--pid", *(["--net"] if self._network else [])]
        return ["nsenter", "--target", str(pid), *kinds, "--", *command]

    def stop(self) -> None:
        """End every process inside, and with them every mount and device."""
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + GONE_S
            while self.pid is not None and time.monotonic() < end:
                time.sleep(0.02)
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait(GONE_S)
            self._process = None
        self._note.unlink(missing_ok=True)


def _birth(pid: int) -> int | None:
    """When a process began, in clock ticks since boot: with its number this names it for good. None for one that is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
