"""An engine whose network, mounts and processes are its own, with all its files in one folder: what Docker and podman share."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.engines.docker import api, cgroups, host, images
from tests.engines.docker.namespaces import Namespaces

START_S = 60.0
STOP_S = 60.0
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SOCKET_PATH_MAX = 107
"""Bytes in an address of a unix socket, without its final zero."""
MARK = "cloche-engine"
"""A file in a folder that is an engine's, and may be removed."""


@dataclass(frozen=True)
class Programs:
    """Where an engine's programs are, and libraries that the system may lack."""

    path: Sequence[Path]
    libraries: Sequence[Path] = field(default=())

    def find(self, name: str) -> Path:
        """One of the programs."""
        return next(folder / name for folder in self.path if (folder / name).exists())

    def environ(self) -> dict[str, str]:
        """The environment in which they find each other, and nothing of this user's."""
        found = {"PATH": ":".join([*map(str, self.path), SYSTEM_PATH]), "HOME": "/run"}
        if self.libraries:
            found["LD_LIBRARY_PATH"] = ":".join(map(str, self.libraries))
        return found


class Private(ABC):
    """Started, stopped, killed and started again as often as wanted, then closed; as a context manager started and closed.

    An ``owned`` one also ends with the program that made it, however that ends, and then leaves files alone.
    """

    name: str
    """What it calls itself in messages."""

    def __init__(self, folder: Path, socket: str, *, network: bool = True, owned: bool = True) -> None:
        self.folder = folder
        self.socket = folder / socket
        self.engine = api.Engine(self.socket)
        self._namespaces = Namespaces(folder / "init.pid", network=network, owned=owned)
        self._service: subprocess.Popen[bytes] | None = None
        self._others: list[subprocess.Popen[bytes]] = []
        if len(os.fsencode(self.socket)) > SOCKET_PATH_MAX:
            raise ValueError(f"{self.socket} is too long for a socket; give a shorter folder")

    @property
    def host(self) -> str:
        """What ``DOCKER_HOST`` would be."""
        return f"unix://{self.socket}"

    @property
    def cgroup(self) -> str:
        """A name for cgroups that only this engine has."""
        return f"cloche-engine-{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:12]}"

    @abstractmethod
    def _launch(self) -> subprocess.Popen[bytes]:
        """Start what of it is not running, and give the process that answers."""

    def start(self) -> None:
        """Start it, or what of it is not running, and wait until it answers.

        Raises:
            MissingError: this machine lacks something for it.
            RuntimeError: it does not start; the message has the end of its log.
        """
        host.need_root()
        if self._namespaces.pid is None:
            self.close()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.joinpath(MARK).touch()
            self._namespaces.start()
        self._service = self._launch()
        end = time.monotonic() + START_S
        while not self.engine.answers():
            if self._service.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name} does not start; its log ends so:\n{self.log()[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the service as a service manager would, with SIGTERM."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the service alone, as a crash does: what started the containers, and the containers, live on."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """End all of it, and remove what it left: processes, mounts, network, cgroups, and its folder."""
        self._namespaces.stop()
        for process in (self._service, *self._others):
            if process is not None:
                process.wait(STOP_S)
        self._service = None
        self._others.clear()
        cgroups.remove(self.cgroup)
        if self.folder.exists():
            if any(self.folder.iterdir()) and not self.folder.joinpath(MARK).exists():
                raise ValueError(f"{self.folder} has files that are no engine's; give an empty folder")
            shutil.rmtree(self.folder)

    def running(self) -> bool:
        """Whether it answers."""
        return self._namespaces.pid is not None and self.engine.answers()

    def log(self) -> str:
        """What the service has said so far."""
        return self.folder.joinpath("service.log").read_text(errors="replace")

    def enter(self, *command: str) -> list[str]:
        """The command that runs a command among the engine's own processes, mounts and network."""
        return self._namespaces.enter(*command)

    def add(self, *wanted: images.Image) -> None:
        """Give it images."""
        for image in wanted:
            self.engine.add(image)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, environ: dict[str, str], log: str, *command: str) -> subprocess.Popen[bytes]:
        with open(self.folder / log, "ab") as output:
            return subprocess.Popen(
                self.enter(*command),
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _end(self, number: signal.Signals) -> None:
        if self._service is None:
            raise RuntimeError("this object has not started a service")
        # nsenter waits for the service, which is its only child.
        for child in host.children(self._service.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        self._service.wait(STOP_S)
