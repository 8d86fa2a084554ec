"""What came of a soak: collected while it goes on, shown to people, written for machines."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tests.crowds import FLAT_BYTES
from tests.soak.client import Measured
from tests.soak.plan import Run

KEPT_FDS = 20
"""Connections that a client keeps for the next run, on the engine that keeps most (see the tests of each)."""


@dataclass
class OfMode:
    """What came of one mode."""

    runs: int = 0
    ok: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    """Faults for which there was nothing any more, or not yet."""
    lives: int = 0
    """Processes that were clients."""
    owners: set[str] = field(default_factory=set)
    """By which names engines knew them."""
    swept: int = 0
    wrong: list[str] = field(default_factory=list)
    growth: list[str] = field(default_factory=list)
    warm: Measured | None = None
    last: Measured | None = None

    def measured(self, warm: Measured, last: Measured) -> None:
        """Compare what the steady client held after its warm-up with what it holds at the end."""
        self.warm, self.last = warm, last
        if (grown := last.rss - warm.rss) >= FLAT_BYTES:
            self.growth.append(f"its memory has grown by {grown / 2**20:.1f} MiB")
        if (grown := last.fds - warm.fds) > KEPT_FDS:
            self.growth.append(f"it has {grown} descriptors more")
        if last.runs:
            self.growth.append(f"{last.runs} runs of it have not ended")

    @property
    def failed(self) -> bool:
        """Whether something is wrong with it."""
        return bool(self.wrong or self.growth)


@dataclass
class Report:
    """What came of all."""

    seed: int
    mark: str
    modes: dict[str, OfMode] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Modes whose engine is not here, and why."""
    absent: list[str] = field(default_factory=list)
    """Those of them that must work."""
    left: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """Files of dead owners that a later sweep removes, where nobody had the patience to wait for it."""
    seconds: float = 0.0
    plan: list[Run] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether this soak has found something."""
        return bool(self.left or self.absent or not self.modes) or any(each.failed for each in self.modes.values())

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._as_json(), indent=1) + "\n")

    def _as_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "failed": self.failed,
            "seconds": round(self.seconds, 1),
            "modes": {mode: _json_of(each) for mode, each in self.modes.items()},
            "skipped": self.skipped,
            "absent": self.absent,
            "left": self.left,
            "waiting": self.waiting,
            "plan": [_planned(run) for run in self.plan],
        }

    def show(self, console: Console) -> None:
        """A table, and what is wrong in full."""
        table = Table(title=f"soak, seed {self.seed}: {self.seconds:.0f} s")
        for name in ("mode", "runs", "outcomes", "faults", "clients", "swept", "memory", "descriptors", "wrong"):
            table.add_column(name, justify="right" if name in {"runs", "clients", "swept", "wrong"} else "left")
        for mode, each in self.modes.items():
            table.add_row(
                mode,
                str(each.runs),
                _listed(each.outcomes),
                _listed(each.faults) + (f"\n{each.missed} too late or too early" if each.missed else ""),
                str(each.lives),
                str(each.swept),
                _change(each, "rss", 2**20, " MiB"),
                _change(each, "fds", 1, ""),
                str(len(each.wrong) + len(each.growth)),
                style="red" if each.failed else "",
            )
        console.print(table)
        for mode, why in self.skipped.items():
            console.print(f"skipped {mode}: {why}", markup=False)
        if self.waiting:
            console.print(f"{len(self.waiting)} files of dead owners wait for their engine; a later sweep removes them")
        for mode, each in self.modes.items():
            for complaint in (*each.wrong, *each.growth):
                console.print(f"WRONG {mode}: {complaint}", style="red", markup=False)
        for thing in self.left:
            console.print(f"LEFT {thing}", style="red", markup=False)
        for mode in self.absent:
            console.print(f"ABSENT {mode}, which CLOCHE_MUST_WORK names", style="red", markup=False)
        if not self.failed:
            console.print("nothing is left, nothing was wrong, nothing has grown", style="green")


def _planned(run: Run) -> str:
    words = [f"{run.word} {run.kind} for {run.client}"]
    if run.cancel is not None:
        words.append(f"cancelled by {run.cancel.by} after {run.cancel.after_s:.2f} s")
    if run.happens is not None:
        words.append(f"{run.happens.fault} after {run.happens.after_s:.2f} s")
    return ", ".join(words)


def _listed(counted: Counter[str]) -> str:
    return "\n".join(f"{number:3} {what}" for what, number in counted.most_common())


def _change(each: OfMode, what: str, unit: int, name: str) -> str:
    if each.warm is None or each.last is None:
        return "-"
    return f"{getattr(each.warm, what) / unit:.0f} → {getattr(each.last, what) / unit:.0f}{name}"


def _json_of(each: OfMode) -> dict[str, Any]:
    measured = {
        name: None if found is None else {"rss": found.rss, "fds": found.fds, "removals_failed": found.removals_failed}
        for name, found in (("warm", each.warm), ("last", each.last))
    }
    return {
        "runs": each.runs,
        "ok": each.ok,
        "outcomes": dict(each.outcomes),
        "faults": dict(each.faults),
        "missed": each.missed,
        "clients": each.lives,
        "swept": each.swept,
        "wrong": each.wrong,
        "growth": each.growth,
        **measured,
    }
