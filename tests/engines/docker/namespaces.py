"""A network, mounts and processes of their own for a daemon: all of it goes when their first process goes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.engines.docker import host

INIT = Path(__file__).with_name("init.py")
READY_S = 20.0
GONE_S = 20.0
CLONE_NEWNET = 0x40000000
"""linux/sched.h"""


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
        self._note.write_text(f"{first} {birth(first)}\n")

    @property
    def pid(self) -> int | None:
        """Their first process as seen from outside; None when it is gone."""
        try:
            pid, born = map(int, self._note.read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        return pid if birth(pid) == born else None

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

    def enter_network(self, *command: str) -> list[str]:
        """The same for the network and the processes alone: the command sees this machine's files.

        Raises:
            RuntimeError: there is no inside.
        """
        if (pid := self.pid) is None:
            raise RuntimeError("the daemon's namespaces are gone")
        return ["nsenter", "--target", str(pid), "--pid", *(["--net"] if self._network else []), "--", *command]

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of the network inside, for use by this process: it connects and listens there.

        Raises:
            RuntimeError: there is no inside.
        """
        if (pid := self.pid) is None:
            raise RuntimeError("the daemon's namespaces are gone")
        # A network is a thread's, and so this is the business of one that ends with it.
        with open(f"/proc/{pid}/ns/net", "rb") as network, ThreadPoolExecutor(1) as thread:
            return thread.submit(_socket_in, network.fileno(), family, kind).result()

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


def _socket_in(network: int, family: int, kind: int) -> socket.socket:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(network, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "setns")
    return socket.socket(family, kind)


def birth(pid: int) -> int | None:
    """When a process began, in clock ticks since boot: with its number this names it for good. None for one that is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
