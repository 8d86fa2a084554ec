"""Whose a thing on an engine is, and who may remove it.

Everything that cloche makes on an engine carries its owner's name and an absolute expiry, written when it was made: whoever
finds it expired may remove it, unless he can see that its owner lives. Earlier only with proof that the owner is dead, which
is a lock in a folder that both share (:mod:`cloche.backends.owners`): the lock's file is there, and nobody holds it.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

import anyio
from anyio import to_thread

from cloche.backends import owners

MAX_DIGITS = 15
"""Of a time that something carries; some millions of years have so many."""

_log = logging.getLogger("cloche.backends")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a thing says of itself; all of it may be missing or nonsense."""

    owner: str = ""
    place: str = ""
    expires: str = ""
    """Unix time in seconds, by the engine's clock."""

    def expired(self, now: float) -> bool:
        """Whether its time is over."""
        return (
            self.expires.isascii()
            and self.expires.isdecimal()
            and len(self.expires) <= MAX_DIGITS
            and int(self.expires) < now
        )


class Keeper:
    """Who makes and sweeps things on an engine: his name, the id of the folder with his lock, and what his file says of the
    engine.
    """

    def __init__(self, owner: str, note: str) -> None:
        self.owner = owner
        self.note = note
        self.place: str | None = None
        """None: no lock tells that he lives. His things then go when they expire, not before."""
        self.left = False
        """Whether something of his could not be removed."""
        self._lock: owners.Owner | None = None

    async def begin(self) -> None:
        """Take the lock, where this system has such locks and a folder for them."""

        def become() -> tuple[owners.Owner, str] | None:
            if not owners.SUPPORTED:
                return None
            folder = owners.state_folder()
            place, owner = owners.place_id(folder), owners.Owner(folder, self.owner)
            owner.note(self.note)
            return owner, place

        try:
            with anyio.CancelScope(shield=True):  # else what the thread has made would be known to nobody
                found = await to_thread.run_sync(become)
        except OSError as exc:
            _log.info("no lock says that this process lives: %s", exc)
            return
        if found is not None:
            self._lock, self.place = found

    def close(self) -> None:
        """Give the lock up."""
        if self._lock is not None:
            self._lock.close(left=self.left)
            self._lock = None

    async def reason_to_remove(self, claim: Claim, now: float) -> str:
        """Empty: it may be a living run's."""
        if claim.owner == self.owner:
            return ""
        alive = None
        if claim.owner and self.place is not None and claim.place == self.place:
            alive = await to_thread.run_sync(_is_alive, claim.owner)
        if alive is False:
            return f"owner {claim.owner} is dead"
        return "it has expired" if alive is None and claim.expired(now) else ""

    async def forget_the_dead(self) -> None:
        """Remove the locks of the dead that had nothing but things on this engine: these are gone now, and the engine has had the
        time to finish what they had asked it for.
        """
        await to_thread.run_sync(_forget_the_dead, self.note)


def _is_alive(owner: str) -> bool | None:
    return owners.is_alive(owners.state_folder(), owner)


def _forget_the_dead(own_note: str) -> None:
    if not owners.SUPPORTED:
        return
    with contextlib.suppress(OSError):
        for owner in owners.dead(owners.state_folder()):
            elsewhere = any(line != own_note for line in owner.notes) and owner.age_s < owners.NOTE_LIFE_S
            unfinished = bool(owner.notes) and owner.found_s < owners.FINISH_S
            owner.left |= bool(owner.folders) or elsewhere or unfinished
