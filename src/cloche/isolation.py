"""Isolation levels and the posture: what isolation a backend really gives, guarantee by guarantee."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import total_ordering


@total_ordering
class Isolation(StrEnum):
    """How far a box is kept from its host, weakest first.

    ``kernel`` means a guest kernel of its own (gVisor, Kata, a microVM). Levels compare by strength:
    ``Isolation.NAMESPACE < Isolation.CONTAINER``.
    """

    NONE = "none"
    PROCESS = "process"
    NAMESPACE = "namespace"
    CONTAINER = "container"
    KERNEL = "kernel"

    @property
    def rank(self) -> int:
        """Position in the order, 0 for ``none``."""
        return list(Isolation).index(self)

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Isolation):
            return NotImplemented
        return self.rank < other.rank

    # total_ordering does not replace what str already defines, so the others are spelled out.
    def __le__(self, other: object) -> bool:
        return self == other or self < other

    def __gt__(self, other: object) -> bool:
        return not self <= other

    def __ge__(self, other: object) -> bool:
        return not self < other


class State(StrEnum):
    """Whether a guarantee holds here."""

    IN_FORCE = "in-force"
    NOT_IN_FORCE = "not-in-force"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Guarantee:
    """One promise about the box, whether it holds, and how that is known.

    ``name`` is stable and kebab-case (``network``, ``memory-limit``); ``evidence`` is a sentence for people;
    ``advice`` says what to do when the guarantee does not hold.
    """

    name: str
    state: State
    evidence: str
    advice: str = ""
    needed: bool = True
    """Whether a run counts on it. Else it is one wall more than there must be, or a bound that this kind of engine does not
    have."""


class Verdict(StrEnum):
    """How a check of the way to a box ended."""

    OK = "ok"
    NOT_OK = "not-ok"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Check:
    """Something that has to be right before there can be a box (settings, an engine that answers, rights, an image), how it is,
    and how that is known. ``advice`` says what to do about it.
    """

    name: str
    verdict: Verdict
    evidence: str
    advice: str = ""
    needed: bool = True
    """Whether a run needs it to be right. Else it is worth to be told, and nothing fails over it."""


@dataclass(frozen=True, slots=True)
class Posture:
    """What a backend gives on this machine, or why it cannot be used.

    ``available`` is false when no box can be made; ``reason`` and ``hint`` then say why and what to do.
    ``isolation`` is the level that the evidence supports.
    """

    mode: str
    available: bool
    isolation: Isolation
    reason: str = ""
    hint: str = ""
    engine: str = ""
    """What does the work, with its version: ``bubblewrap 0.8.0``."""
    guarantees: tuple[Guarantee, ...] = ()
    proved: bool = False
    """Whether a script looked from inside of a box, and level and guarantees are what it found there."""

    @property
    def missing(self) -> tuple[Guarantee, ...]:
        """What a run counts on and does not have."""
        return tuple(g for g in self.guarantees if g.needed and g.state is State.NOT_IN_FORCE)
