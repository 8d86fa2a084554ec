"""What is to be judged: the observations of all probes, and what has to be known beside them to understand them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from errno import errorcode

from cloche.events import Outcome
from cloche.isolation import Guarantee, Posture, State
from cloche.runtime.prove.observe import Seen
from cloche.spec import Limits


@dataclass(frozen=True, slots=True)
class Host:
    """What is known of the machine that makes the boxes. ``here``: it is this one, so that boot id and namespaces can be
    compared; else at most its kernel's release is known, by the engine's word.
    """

    here: bool = False
    release: str = ""
    boot_id: str = ""
    namespaces: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MemoryRun:
    """How a script ended that took more memory than it may have."""

    limit_bytes: int
    asked_bytes: int
    outcome: Outcome
    signal: str | None
    seen: Seen


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that is known of a backend's boxes. None: that was not tried, or gave nothing."""

    declared: Posture
    """What the backend says of itself."""
    limits: Limits
    """Of the box in which was looked."""
    look: Seen
    host: Host = field(default_factory=Host)
    memory: MemoryRun | None = None
    sockets: Seen | None = None
    """What a box saw whose script may make sockets, so that the engine's own wall stands alone."""
    answering: frozenset[str] = frozenset()
    """Names of targets that are known to answer, from where cloche is."""
    remains: Sequence[str] | None = None
    """What is left of the boxes after they were removed."""

    def claims(self, name: str) -> Guarantee | None:
        """What the backend says of a guarantee."""
        return next((g for g in self.declared.guarantees if g.name == name), None)


def held(name: str, evidence: str, *, needed: bool = True) -> Guarantee:
    """It is in force."""
    return Guarantee(name, State.IN_FORCE, evidence, needed=needed)


def broken(name: str, evidence: str, advice: str = "", *, needed: bool = True) -> Guarantee:
    """It is not."""
    return Guarantee(name, State.NOT_IN_FORCE, evidence, advice, needed=needed)


def unclear(name: str, evidence: str, advice: str = "", *, needed: bool = True) -> Guarantee:
    """It may be or not: nothing was seen that would tell."""
    return Guarantee(name, State.UNKNOWN, evidence, advice, needed=needed)


def error_name(number: int) -> str:
    """``EPERM``."""
    return errorcode.get(number, f"error {number}")


def listed(items: Sequence[str], most: int = 5) -> str:
    """A list for a sentence, not longer than one reads."""
    shown = ", ".join(items[:most])
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown
