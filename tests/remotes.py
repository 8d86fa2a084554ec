"""A cloche service on this machine for the tests: `cloche serve`, started when it is first wanted, and gone when the tests are.

It descends from nobody here: what its boxes are is its own business, as it is that of a service on another machine, and what is
left of them this module tells.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cloche.testing.conformance.target import PASSED_ON

START_S = 30.0
END_S = 30.0
PLACES = 64
"""More than any test has runs at a time: their own bound is what is tested."""
_KEEPER = """
import os, signal, subprocess, sys
if os.fork():
    os._exit(0)
os.setsid()
service = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
with open(sys.argv[1], "w") as file:
    file.write(str(service.pid))
sys.stdin.buffer.read()  # until the tests are over, however they end
service.send_signal(signal.SIGTERM)
try:
    service.wait(20)
except subprocess.TimeoutExpired:
    service.kill()
"""


class AbsentError(Exception):
    """There is no service, and why."""


@dataclass(frozen=True)
class Remote:
    """The service."""

    url: str
    token: str
    pid: int
    folder: Path
    """Where it keeps what is sent to it."""

    def boxes(self) -> Iterator[int]:
        """Its boxes' first processes on this machine: the launchers that have become bubblewrap."""
        seen = {int(name): stat(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        guards = {pid for pid, (name, parent) in seen.items() if name == "cloche-guard" and parent == self.pid}
        for pid, (name, parent) in seen.items():
            # Looking takes a while; what is still there after it was all there at one moment.
            if name == "bwrap" and parent in guards and stat(pid) == seen[pid]:
                yield pid

    def remains(self) -> frozenset[str]:
        """What there is of runs: boxes, and folders that were sent."""
        sent = [path for path in self.folder.glob("cloche-serve-*/*") if path.name != "lock"]
        return frozenset([*(f"process {pid}, bwrap" for pid in self.boxes()), *(f"path {path}" for path in sent)])


def stat(pid: int) -> tuple[str, int]:
    """Name and parent of a process that lives; nobody's for others."""
    with contextlib.suppress(OSError):
        name, rest = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
        state, parent = rest.split()[:2]
        if state not in "ZX":
            return name, int(parent)
    return "", 0


@cache
def start() -> Remote:
    """The service, started once.

    Raises:
        AbsentError: it does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="remote-"))
    token = secrets.token_urlsafe(24)
    log = folder / "log"
    with log.open("wb") as stderr:
        keeper = subprocess.Popen(
            [sys.executable, "-c", _KEEPER, str(folder / "pid"), sys.executable, "-m", "cloche", "serve"],
            env=_environment(folder, token),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    keeper.wait(START_S)
    atexit.register(_end, keeper, folder)
    end = time.monotonic() + START_S
    while (url := _address(log)) is None:
        if time.monotonic() > end or (_pid(folder) and not stat(_pid(folder))[0]):
            raise AbsentError(f"cloche serve does not start: {log.read_text()[-2000:]}")
        time.sleep(0.05)
    return Remote(url, token, _pid(folder), folder)


def _environment(folder: Path, token: str) -> Mapping[str, str]:
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    ours = {
        "CLOCHE_MODE": "local",
        "CLOCHE_FALLBACK": "false",
        "CLOCHE_MAX_CONCURRENT": str(PLACES),
        "CLOCHE_SERVE_ADDRESS": "127.0.0.1:0",
        "CLOCHE_SERVE_NETWORK": "open",  # the suites ask for all that there is
        "CLOCHE_SERVE_IMAGES": "*",
        "CLOCHE_SERVE_MAX_MEMORY": "1024Gi",
        "CLOCHE_SERVE_MAX_CPUS": "1024",
        "CLOCHE_SERVE_MAX_PIDS": "100000",
        "CLOCHE_SERVE_MAX_TIMEOUT": "86400",
        "CLOCHE_SERVE_TOKENS": f"tests:{token}",
    }
    # Its folder is not one that stays: the tests look for those in the machine's own place for them.
    return {**passed, **ours, "TMPDIR": str(folder)}


def _address(log: Path) -> str | None:
    """What the log says of where it listens."""
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("event") == "listening":
                return str(record["address"])
    return None


def _pid(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "pid").read_text())
    return 0


def _end(keeper: subprocess.Popen[bytes], folder: Path) -> None:
    assert keeper.stdin is not None
    keeper.stdin.close()
    end = time.monotonic() + END_S
    while stat(_pid(folder))[0] and time.monotonic() < end:
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)
