"""What happens during a run, in order: ``Started``, then ``Output`` and ``Artifact``, then one ``Finished``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias

from cloche.isolation import Isolation

StreamName: TypeAlias = Literal["stdout", "stderr"]


class Outcome(StrEnum):
    """How the program ended. Known from the supervisor or the engine, never guessed from an exit code."""

    EXITED = "exited"
    SIGNALED = "signaled"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Started:
    """The script runs: its clock has started."""

    run_id: str
    mode: str
    isolation: Isolation
    fallback_from: str | None = None
    guarantees: tuple[str, ...] = ()
    """The names of those that are in force, as the sandbox's posture has them."""


@dataclass(frozen=True, slots=True)
class Output:
    """Some bytes of stdout or stderr. ``offset`` is the position of the first one in the whole stream.

    An offset larger than the end of the last Output means that the bytes between were left out (the stream is over its
    cap: its head and its tail are kept).
    """

    stream: StreamName
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Artifact:
    """A regular file that the script left in /output. ``size`` is the whole file's; ``data`` may be its beginning only."""

    path: str
    """Relative to /output, ``/`` between parts; never absolute, never with ``..``."""
    size: int
    data: bytes = field(repr=False)
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What the run used, as far as the engine lets it be known (None: not known)."""

    cpu_ms: float | None = None
    peak_memory_bytes: int | None = None
    oom_kills: int = 0
    """Processes of this box killed for want of memory; the main process may have survived them."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a run. ``signal`` is a name such as ``SIGKILL`` when the outcome is ``signaled``."""

    outcome: Outcome
    exit_code: int | None = None
    signal: str | None = None
    stdout_bytes: int = 0
    """Bytes that the script wrote, kept or not."""
    stderr_bytes: int = 0
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    artifacts_skipped: int = 0
    """Entries of /output that were not collected: links, devices, fifos, files over a bound."""
    run_ms: float = 0.0
    """Wall clock of the script."""
    usage: Usage = field(default_factory=Usage)
    timings_ms: dict[str, float | None] = field(default_factory=dict)
    """Phases, in milliseconds; see :class:`cloche.Result`. Filled in by the runtime."""


Event: TypeAlias = Started | Output | Artifact | Finished
