"""The mode under test, and what can be seen of it from outside."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

import cloche

PASSED_ON = ("PATH", "HOME", "LANG", "XDG_RUNTIME_DIR", "TMPDIR", "DBUS_SESSION_BUS_ADDRESS")
"""Variables of the suite's own environment that a command line under test gets as well."""
SETTLED_S = 2.0
"""An engine at which nothing has changed for so long has finished."""
SETTLE_WITHIN_S = 30.0


def must_work(mode: str) -> bool:
    """Whether ``CLOCHE_MUST_WORK`` (a comma-separated list of modes) demands that nothing of this mode is skipped."""
    return mode in {name.strip() for name in os.environ.get("CLOCHE_MUST_WORK", "").split(",")}


def absent(mode: str, reason: str) -> None:
    """Skip the test with its reason; under ``CLOCHE_MUST_WORK`` fail instead."""
    if must_work(mode):
        pytest.fail(f"CLOCHE_MUST_WORK names {mode}, but {reason}", pytrace=False)
    pytest.skip(f"{mode}: {reason}")


@dataclass(frozen=True)
class Target:
    """One mode, with the settings that make it work here."""

    mode: str
    environ: Mapping[str, str] = field(default_factory=dict)
    """Settings (``CLOCHE_…``) beside ``CLOCHE_MODE``."""
    interpreters: frozenset[str] = frozenset({"python3", "sh"})
    """What the box offers. Every box of the suite needs python3 and sh."""
    on_this_host: bool = True
    """Whether a process in a box is a process of this machine, to be found in /proc."""
    seals_workspace: bool = True
    """Whether modes and times of what is delivered are out of the script's reach too, as its contents are everywhere. Where an
    engine gives supervisor and script one uid, they are not."""
    bounds_disks: bool = True
    """Whether each writable place has a size. Where an engine cannot mount, /output and /tmp have that of its disk, and only a
    single file is bounded."""
    dies_with_client: bool = True
    """Whether the engine kills a box when its client is killed (else only sweep removes it)."""
    count_boxes: Callable[[], int] | None = None
    """How many boxes of this process exist now, seen from outside."""
    remains: Callable[[], frozenset[str]] | None = None
    """What of the engine's things (processes, folders, groups) belongs to this process or to nobody alive, as text."""

    def settings(self, **overrides: str) -> dict[str, str]:
        """The environment that chooses this mode, with some settings changed."""
        return {"CLOCHE_MODE": self.mode, "CLOCHE_FALLBACK": "false", **self.environ, **overrides}

    def sandbox(self, **overrides: str) -> cloche.Sandbox:
        """A sandbox of this mode, not yet open."""
        return cloche.Sandbox.from_env(self.settings(**overrides))

    def command_environment(self, **overrides: str) -> dict[str, str]:
        """The whole environment of a ``cloche`` command of this mode."""
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        return {**passed, **self.settings(**overrides)}

    @contextmanager
    def nothing_left(self, within_s: float = 5.0) -> Iterator[None]:
        """What is done inside leaves nothing on the machine. Blocks at the end while something is still there."""
        look = self.remains or frozenset
        before = look()
        yield
        left = look() - before
        end = time.monotonic() + within_s
        while left and time.monotonic() < end:
            time.sleep(0.05)
            left &= look()
        assert not left, "left behind:\n" + "\n".join(sorted(left))

    def settle(self) -> None:
        """Block until an engine has finished what clients that are dead had asked it for."""
        look = self.remains or frozenset
        seen, since, end = look(), time.monotonic(), time.monotonic() + SETTLE_WITHIN_S
        while time.monotonic() < min(since + SETTLED_S, end):
            time.sleep(0.05)
            if (now := look()) != seen:
                seen, since = now, time.monotonic()

    def need(self, *interpreters: str) -> None:
        """Skip the test (or fail it, see :func:`absent`) where the box lacks an interpreter."""
        for name in interpreters:
            if name not in self.interpreters:
                absent(self.mode, f"its boxes have no {name}")


def python(source: str, **fields: Any) -> cloche.Spec:
    """A run of a Python script given as text, indented as the caller likes."""
    return cloche.Spec(name="main.py", content=textwrap.dedent(source), **fields)


def shell(source: str, **fields: Any) -> cloche.Spec:
    """A run of a POSIX shell script given as text."""
    return cloche.Spec(name="main.sh", content=textwrap.dedent(source), interpreter="sh", **fields)


def assert_exited(result: cloche.Result, code: int = 0) -> None:
    """The script itself ended the run, with this exit code. A failure shows what it said."""
    ending = (result.outcome, result.exit_code, result.signal)
    said = f"stdout: {result.stdout[-2000:]!r}\nstderr: {result.stderr[-2000:]!r}"
    assert ending == (cloche.Outcome.EXITED, code, None), f"ended as {ending}\n{said}"


class Suite:
    """What every part of the suite stands on. A subclass gives the fixture ``target``."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    def anyio_backend(self) -> str:
        """The event loop that the tests run on."""
        return "asyncio"

    @pytest.fixture
    async def sandbox(self, target: Target) -> AsyncIterator[cloche.Sandbox]:
        """An open sandbox of the target's mode, for one test."""
        async with target.sandbox() as sandbox:
            yield sandbox

    @pytest.fixture
    def in_environment(self, target: Target, monkeypatch: pytest.MonkeyPatch) -> Target:
        """The target, with its settings in the environment of this process, for :func:`cloche.run`."""
        for name in [name for name in os.environ if name.startswith("CLOCHE_")]:
            monkeypatch.delenv(name)
        for name, value in target.settings().items():
            monkeypatch.setenv(name, value)
        return target
