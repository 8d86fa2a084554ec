"""The contract between the runtime and an engine. Small enough to recite:

a :class:`Backend` is probed and tended, opens a :class:`Box` from a :class:`Profile`, and sweeps what the dead left; a box
is fed one bundle, gives out the supervisor's frames, and can tell its fate.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from cloche.isolation import Check, Posture
from cloche.spec import Limits, Network
from cloche.supervisor.bundle import Bundle


@dataclass(frozen=True, slots=True)
class Profile:
    """What a box is made from. Holds nothing of the script itself, so that a box can be started before its run is known."""

    run_id: str
    owner: str
    """The process instance that answers for the box."""
    expires_at: float
    """Unix time in seconds after which anybody may remove the box."""
    limits: Limits
    network: Network = Network.NONE
    image: str | None = None
    bundle_bytes: int = 0
    """How much workspace and stdin a bundle will bring, so that what holds it can be sized."""
    delivery_bytes: int = 0
    """How large that bundle is at most in the form in which it travels, arguments and names of files included."""
    interpreter: str | None = None
    """The program that the box must offer; ``local`` finds it on the host and shows it to the box."""
    sockets: bool = False
    """Leave internet sockets to the script even without a network, so that the engine's own wall is all that holds: for cloche's
    own prober, which shows whether there is one."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What is so of every box of a backend. Declared, never discovered."""

    mode: str
    replayable: bool = False
    """Whether ``Box.output()`` may be called again after it ended early, giving the frames from the first one on."""
    stop_s: float = 0.0
    """Seconds that the engine may take to tell a box to stop."""
    max_bundle_bytes: int | None = None
    """The engine's own bound, None where it has none."""
    runs: bool = True
    """False: script execution is switched off, and every run is refused with ``sandbox-disabled``."""


class FateKind(StrEnum):
    """What an engine can say of a box that ended without a last frame."""

    NOT_STARTED = "not-started"
    """The engine could not make the box; nothing of the script ran. The message says why."""
    EXITED = "exited"
    OOM_KILLED = "oom-killed"
    EVICTED = "evicted"
    DELETED = "deleted"
    IMAGE = "image-unavailable"
    UNSCHEDULABLE = "unschedulable"
    QUOTA = "quota-exceeded"
    DENIED = "permission-denied"
    """The engine's own rules forbid the box."""
    RUNNING = "running"
    """It still runs, by the engine's own word."""
    LOST = "lost"
    """The connection to the engine is gone: the box may still be there, and the run may be repeated."""


@dataclass(frozen=True, slots=True)
class Fate:
    """The engine's word on how a box ended, with its own message."""

    kind: FateKind
    message: str = ""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a dead owner left, whether it was removed, and why; or why not."""

    kind: str
    name: str
    removed: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """What is known of an engine before a script looks at a box of its from inside."""

    checks: tuple[Check, ...] = ()
    """What has to be right on the way to a box, in the order in which a run meets it."""
    here: bool = False
    """Whether boxes run on this machine: then its boot id, its namespaces and its own addresses tell something about them."""
    kernel: str = ""
    """The release of the kernel of the engine's own host, where the engine tells it."""
    machine: str | None = None
    """The architecture of the boxes, where it is known."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """What answers to cloche and must not to a box: ``kubernetes-api`` → ``10.0.0.1:443``. Numeric, not loopback."""


class Box(Protocol):
    """One isolated place made for one run."""

    async def feed(self, bundle: Bundle) -> None:
        """Hand the bundle in, once.

        A box that died before it took the whole is no error here: its output and fate tell.
        """
        ...

    def output(self) -> AsyncIterator[bytes]:
        """The supervisor's frames as bytes, cut anywhere, until the engine's stream ends."""
        ...

    async def stop(self) -> None:
        """Ask the supervisor (SIGTERM) to end the run now and to report it as cancelled. Returns at once."""
        ...

    async def fate(self, *, ended: bool) -> Fate:
        """The engine's word, asked for only when the output ended without a last frame, or does not come.

        ``ended``: the box has ended, by all that is known, so that an engine that does not know it yet soon will.
        """
        ...


class Backend(Protocol):
    """Makes boxes on one engine."""

    def capabilities(self) -> Capabilities:
        """What is so of all its boxes."""
        ...

    async def probe(self) -> Posture:
        """What works here. Raises nothing: that it cannot be used is a value with a reason."""
        ...

    async def tend(self) -> None:
        """What goes on beside the runs: first what they would have to wait for, such as pulling the image, then whatever
        serves all of them. Called once, after the probe; it may return, and is cancelled when the sandbox is closed.

        Raises:
            ClocheError: something cannot be done; a run that needs it will say so too.
        """
        ...

    def open(self, profile: Profile) -> AbstractAsyncContextManager[Box]:
        """Make a box and start its supervisor. Leaving the context removes everything, shielded and time-limited.

        Raises (on entering):
            EngineError: the box could not be made.
            InterpreterMissing: the profile's interpreter is not to be had.
        """
        ...

    async def sweep(self, *, dry_run: bool = False) -> Sequence[Leftover]:
        """Remove what the dead left; never a living run. ``dry_run``: only say what would be removed, and change nothing."""
        ...

    async def examine(self) -> Examination:
        """Look at each step of the way to a box, and say how it is. Raises nothing."""
        ...

    async def remains(self, run_ids: Collection[str]) -> Sequence[str] | None:
        """What is still there of these runs, whose boxes were removed, in words; what the engine is just removing is waited for.
        None: it cannot be told. Raises nothing.
        """
        ...

    async def aclose(self) -> None:
        """Give back what the backend itself holds (connections, locks). All its boxes are gone by then."""
        ...
