"""Which runs there are, for which clients, and what happens to them: by chance, and the same again from the same seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from tests.soak import kinds
from tests.soak.kinds import Made

STEADY = "steady"
"""The client that lives as long as the soak, and whose memory and descriptors are watched."""
MORTAL = ("first", "second")
"""Clients that may be killed; another one takes the place of each."""
WARM_UP = 2 * len(kinds.KINDS)
"""Runs of the steady client, two of each kind, before it is measured for the first time."""
CANCELLED = 0.15
"""The part of the runs that somebody cancels."""
LATEST_S = (0.1, 1.0, 3.0)
"""Until when something happens to a run: while it waits or begins, in its middle, at its end; each engine has its own pace."""


class Fault(StrEnum):
    """What happens from outside."""

    KILL_CLIENT = "kill client"
    KILL_BOX = "kill box"
    RESTART_ENGINE = "restart engine"


RATES: Mapping[Fault, float] = {Fault.KILL_CLIENT: 0.05, Fault.KILL_BOX: 0.08, Fault.RESTART_ENGINE: 0.04}
"""Faults of each kind, as a part of the runs; at least one of each."""
CancelBy = Literal["task", "cancel", "kill"]
"""By cancelling the call, by asking the sandbox in order, or at once."""


@dataclass(frozen=True)
class Cancel:
    """Somebody loses patience."""

    by: CancelBy
    after_s: float


@dataclass(frozen=True)
class Happens:
    """A fault, so many seconds after the run was asked for. ``chance`` decides what the fault leaves open."""

    fault: Fault
    after_s: float
    chance: int


@dataclass(frozen=True)
class Run:
    """One run, and what happens to it."""

    number: int
    mode: str
    client: str
    kind: str
    word: str
    made: Made
    cancel: Cancel | None = None
    happens: Happens | None = None

    @property
    def run_id(self) -> str:
        """Its name for cloche and its engines."""
        return f"run-{self.word}"


def plan(seed: int, modes: Sequence[str], runs: int, mark: str, restartable: frozenset[str]) -> dict[str, list[Run]]:
    """The runs of each mode, in their order, each mode's share being the same but for one.

    ``mark`` stands in the word of each run; it is no part of the chance, so that the traces of two soaks are told apart.
    """
    shares = [runs // len(modes) + (i < runs % len(modes)) for i in range(len(modes))]
    return {
        mode: _of_mode(random.Random(f"{seed} {mode}"), mode, share, mark, restartable)
        for mode, share in zip(modes, shares, strict=True)
    }


def warm_up(runs: int) -> int:
    """How many of a mode's runs are the steady client's warm-up."""
    return min(WARM_UP, (runs - len(MORTAL)) // 2)


def _of_mode(chance: random.Random, mode: str, runs: int, mark: str, restartable: frozenset[str]) -> list[Run]:
    warm = warm_up(runs)
    faults = [fault for fault in Fault if fault is not Fault.RESTART_ENGINE or mode in restartable]
    happening: dict[int, Fault] = {}
    for fault in faults:
        free = [i for i in range(warm, runs - len(MORTAL)) if i not in happening]
        happening |= dict.fromkeys(chance.sample(free, min(len(free), max(1, round(runs * RATES[fault])))), fault)
    before = [_run(chance, mode, i, mark, happening.get(i), warm=i < warm) for i in range(runs - len(MORTAL))]
    return [*before, *_last(chance, mode, runs, mark)]


def _last(chance: random.Random, mode: str, runs: int, mark: str) -> Iterator[Run]:
    """One for each mortal client, in whose middle it is killed: what it leaves is left to a sweep that somebody asks for."""
    for number, client in enumerate(MORTAL, runs - len(MORTAL)):
        word = f"{mark}-{mode[:2]}{number}"
        happens = Happens(Fault.KILL_CLIENT, chance.uniform(0.3, 3.0), 0)
        yield Run(number, mode, client, "ticks", word, kinds.ticks(word, chance), None, happens)


def _run(chance: random.Random, mode: str, number: int, mark: str, fault: Fault | None, *, warm: bool) -> Run:
    names = list(kinds.KINDS)
    kind = names[number % len(names)] if warm else chance.choice(names)
    if fault is not None and chance.random() < 0.7:
        kind = "ticks"  # which is still going on then
    client = STEADY if warm else chance.choice([STEADY, *MORTAL])
    cancel = happens = None
    if fault is not None:
        if fault is Fault.KILL_CLIENT:
            client = chance.choice(MORTAL)
        happens = Happens(fault, _moment(chance), chance.getrandbits(32))
    elif not warm and chance.random() < CANCELLED:
        by: CancelBy = chance.choice(["task", "cancel", "kill"])
        cancel = Cancel(by, _moment(chance))
    word = f"{mark}-{mode[:2]}{number}"
    return Run(number, mode, client, kind, word, kinds.KINDS[kind](word, chance), cancel, happens)


def _moment(chance: random.Random) -> float:
    return chance.uniform(0.0, chance.choice(LATEST_S))
