"""A real registry in an engine's network, where that engine reaches it as 127.0.0.1, which Docker takes without TLS."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.engines.docker import binaries, host, images
from tests.engines.docker.private import Private

PORT = 5000
START_S = 20.0
STOP_S = 20.0
READY = "listening on"
SALT_LETTERS = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
COST = "05"
"""The least that the registry's bcrypt takes is 4; a test's password is no secret."""


class Registry:
    """Beside an engine that is up, with its images in a folder. Given a user and a password it wants them from everyone."""

    def __init__(self, engine: Private, folder: Path, *, user: str = "", password: str = "", port: int = PORT) -> None:
        self.address = f"127.0.0.1:{port}"
        self._engine = engine
        self._folder = folder
        self._user = user
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens.

        Raises:
            RuntimeError: it does not start; the message has its log.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        program = binaries.REGISTRY.obtain() / "registry"
        log = self._folder / "registry.log"
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                self._engine.enter(str(program), "serve", str(self._configure())),
                env={"PATH": os.defpath, "OTEL_TRACES_EXPORTER": "none"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        end = time.monotonic() + START_S
        while READY not in log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the registry does not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it. Its images stay in the folder."""
        if self._process is not None:
            for child in host.children(self._process.pid):
                os.kill(child, signal.SIGKILL)
            self._process.wait(STOP_S)
            self._process = None

    def push(self, image: images.Image, name: str) -> str:
        """Put an image of the engine into it, and give the reference by which it can be had, for example
        ``127.0.0.1:5000/private/tiny:1`` for the name ``private/tiny:1``. The engine forgets that reference.
        """
        reference = f"{self.address}/{name}"
        self._engine.add(image)
        self._engine.engine.push(image.name, reference, user=self._user, password=self._password)
        self._engine.engine.ask("DELETE", f"/images/{reference}")
        return reference

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _configure(self) -> Path:
        options = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {"filesystem": {"rootdirectory": str(self._folder / "images")}, "delete": {"enabled": True}},
            "http": {"addr": self.address},
        }
        if self._user:
            users = self._folder / "htpasswd"
            users.write_text(f"{self._user}:{_bcrypt(self._password)}\n")
            options["auth"] = {"htpasswd": {"realm": "cloche tests", "path": str(users)}}
        config = self._folder / "config.json.yml"
        config.write_text(json.dumps(options))  # JSON is YAML
        return config


def _bcrypt(password: str) -> str:
    """A bcrypt hash from the system's libcrypt, which Python no longer has a module for.

    Raises:
        MissingError: there is no libcrypt, or it knows no bcrypt.
    """
    try:
        crypt = ctypes.CDLL("libcrypt.so.1").crypt
    except OSError as error:
        raise host.MissingError("missing: libcrypt.so.1; on Debian: apt-get install libcrypt1") from error
    crypt.restype = ctypes.c_char_p
    salt = "".join(SALT_LETTERS[byte % 64] for byte in os.urandom(21)) + "u"
    made: bytes | None = crypt(password.encode(), f"$2b${COST}${salt}".encode())
    if made is None or not made.startswith(b"$2b$"):
        raise host.MissingError("libcrypt on this machine knows no bcrypt, which the registry's passwords need")
    return made.decode()
