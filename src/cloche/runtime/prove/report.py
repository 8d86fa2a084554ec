"""What a doctor says of one mode: the way to a box, and what was found inside of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloche.errors import ClocheError, SandboxDisabled
from cloche.isolation import Check, Isolation, Posture, Verdict
from cloche.result import ErrorInfo
from cloche.runtime.choose import MODES, Factory, let_go
from cloche.runtime.runtime import Sandbox
from cloche.runtime.service import Service
from cloche.settings import Settings

OWNER = "odoctor"
"""Of a backend that is only asked how it is, and makes no box."""


@dataclass(frozen=True, slots=True)
class Report:
    """One mode, looked at. ``error``: why it could not be looked at from inside of a box."""

    mode: str
    required: Isolation
    checks: tuple[Check, ...] = ()
    posture: Posture | None = None
    error: ClocheError | None = None

    @property
    def level(self) -> Isolation:
        """What the evidence supports; ``none`` where there is none."""
        return Isolation.NONE if self.posture is None else self.posture.isolation

    @property
    def wrong(self) -> tuple[Check, ...]:
        """What has to be right on the way to a box, and is not."""
        return tuple(check for check in self.checks if check.needed and check.verdict is Verdict.NOT_OK)

    @property
    def ok(self) -> bool:
        """Whether everything that a run counts on was seen to be in force, and the level is what is required."""
        posture = self.posture
        if self.error is not None or posture is None or self.wrong:
            return False
        return posture.proved and not posture.missing and posture.isolation >= self.required

    def to_dict(self) -> dict[str, Any]:
        """For JSON. The names are a promise."""
        posture = self.posture
        return {
            "mode": self.mode,
            "engine": None if posture is None else posture.engine or None,
            "level": None if posture is None else str(posture.isolation),
            "required": str(self.required),
            "ok": self.ok,
            "proved": posture is not None and posture.proved,
            "checks": [
                {
                    "name": check.name,
                    "verdict": str(check.verdict),
                    "evidence": check.evidence,
                    "advice": check.advice,
                    "needed": check.needed,
                }
                for check in self.checks
            ],
            "guarantees": [
                {
                    "name": guarantee.name,
                    "state": str(guarantee.state),
                    "evidence": guarantee.evidence,
                    "advice": guarantee.advice,
                    "needed": guarantee.needed,
                }
                for guarantee in (() if posture is None else posture.guarantees)
            ],
            "error": None if self.error is None else ErrorInfo.of(self.error).model_dump(),
        }


async def examine(
    settings: Settings, required: Isolation | None = None, *, backends: Mapping[str, Factory] = MODES
) -> Report:
    """Look at the mode of the settings, and at no other one in its place. Raises nothing for what it finds.

    ``required`` is the least level (None: the isolation floor of the settings).
    """
    floor = settings.min_isolation if required is None else required
    # A floor would keep a sandbox from opening that is to show why it is below it.
    settings = settings.model_copy(update={"fallback": False, "min_isolation": Isolation.NONE, "prove": "off"})
    mode, checks = str(settings.mode), [Check("settings", Verdict.OK, f"they make sense; the mode is {settings.mode}")]
    posture, error = None, None
    sandbox = Sandbox(settings, backends=backends)
    try:
        async with sandbox:
            mode = sandbox.mode
            if sandbox.choice:
                checks.append(Check("mode", Verdict.OK, sandbox.choice))
            checks += await sandbox.examine()
            if not sandbox.runs:
                raise SandboxDisabled("Script execution is switched off here.")
            posture = await sandbox.posture(prove=True)
    except ClocheError as exc:
        error = exc
        if len(checks) == 1:
            checks += await _way(settings, backends)
    return Report(mode, floor, tuple(checks), posture, error)


async def _way(settings: Settings, backends: Mapping[str, Factory]) -> tuple[Check, ...]:
    """The checks of a backend that cannot be used: the sandbox has not kept it."""
    factory = backends.get(settings.mode)
    if factory is None:
        return ()
    backend = factory(settings, OWNER)
    try:
        return () if isinstance(backend, Service) else (await backend.examine()).checks
    finally:
        await let_go(backend)
