"""The mode ``disabled``: no engine, and every run is refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NoReturn

from cloche.backends.contract import Box, Capabilities, Examination, Leftover, Profile
from cloche.errors import SandboxDisabled
from cloche.isolation import Isolation, Posture
from cloche.settings import Mode, Settings


def refuse() -> NoReturn:
    """Refuse a run.

    Raises:
        SandboxDisabled: always.
    """
    raise SandboxDisabled("Script execution is switched off here.")


class DisabledBackend:
    """Makes no boxes."""

    def __init__(self, settings: Settings, owner: str) -> None:
        del settings, owner

    def capabilities(self) -> Capabilities:
        """That nothing runs."""
        return Capabilities(mode=Mode.DISABLED, runs=False)

    async def probe(self) -> Posture:
        """Unavailable, on purpose."""
        return Posture(
            mode=Mode.DISABLED,
            available=False,
            isolation=Isolation.NONE,
            reason="script execution is switched off",
            hint=SandboxDisabled.default_hint,
        )

    async def tend(self) -> None:
        """There is nothing to prepare."""

    def open(self, profile: Profile) -> AbstractAsyncContextManager[Box]:
        """Refuse.

        Raises:
            SandboxDisabled: always.
        """
        del profile
        refuse()

    async def sweep(self, *, dry_run: bool = False) -> Sequence[Leftover]:  # noqa: ARG002 (the contract has it)
        """Nothing is ever left."""
        return ()

    async def examine(self) -> Examination:
        """There is nothing to look at."""
        return Examination()

    async def remains(self, run_ids: Collection[str]) -> Sequence[str]:  # noqa: ARG002 (the contract has it)
        """Nothing is ever left."""
        return ()

    async def aclose(self) -> None:
        """Nothing is held."""
