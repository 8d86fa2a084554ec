"""What a sandbox holds where it has no backend: a service that runs scripts itself. It brings events, not frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from cloche.backends.contract import Capabilities, Leftover
from cloche.isolation import Posture
from cloche.runtime.admission import Admission
from cloche.runtime.course import Course
from cloche.spec import Spec


class Service(ABC):
    """Runs scripts somewhere else. But for how a run goes it is as a backend is (see ``cloche.backends.contract``)."""

    @property
    @abstractmethod
    def fallback_from(self) -> str | None:
        """The mode in whose place the service's own engine is, by its last answer."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What is so of all its runs, by its last answer."""

    @abstractmethod
    async def probe(self) -> Posture:
        """What it gives. Raises nothing: that it cannot be used is a value with a reason."""

    @abstractmethod
    async def prove(self) -> Posture:
        """What it gives, looked at from inside of one of its boxes.

        Raises:
            ClocheError: it cannot be looked at.
        """

    @abstractmethod
    def course(self, spec: Spec, run_id: str, admission: Admission) -> Course:
        """A run, not yet begun."""

    async def tend(self) -> None:  # noqa: B027 (not every service has something to do)
        """Nothing: its engine is its own business."""

    async def sweep(self, *, dry_run: bool = False) -> Sequence[Leftover]:  # noqa: ARG002 (the contract has it)
        """Nothing is left here: what is left there, it sweeps itself."""
        return ()

    @abstractmethod
    async def aclose(self) -> None:
        """Give back what is held."""
