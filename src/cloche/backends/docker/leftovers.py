"""What the dead left on the daemon, and removing it.

Everything that cloche makes there carries an absolute expiry, written when it was made, by the daemon's own clock: whoever
finds it expired may remove it, unless he can see that its owner lives. Earlier only with proof that the owner is dead, which
is a lock in a folder that both share: the lock's file is there, and nobody holds it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass

from anyio import to_thread

from cloche._kit.http import HttpFailure
from cloche.backends import owners
from cloche.backends.contract import Leftover
from cloche.backends.docker import manifest
from cloche.backends.docker.client import DockerClient, Refused
from cloche.backends.docker.facts import Labelled
from cloche.backends.docker.volume import LABEL_SUPERVISOR

MAX_DIGITS = 15
"""Of a label with a time; some millions of years have so many."""
NAME_PREFIX = "cloche-"

_log = logging.getLogger("cloche.docker")


@dataclass(frozen=True, slots=True)
class Keeper:
    """Who sweeps: his own name, the id of the folder of locks that he can see, and what a lock's file says of this daemon."""

    owner: str
    place: str | None
    note: str


def note(address: str) -> str:
    """What an owner with containers on a daemon writes into the file of his lock."""
    return f"docker {address}"


async def sweep(client: DockerClient, keeper: Keeper) -> list[Leftover]:
    """Remove it.

    Raises:
        Refused, HttpFailure: the daemon cannot be asked.
    """
    engine = await client.engine_time()
    now = time.time() if engine is None else engine
    containers = [found for found in await client.containers(manifest.LABEL_EXPIRES) if is_ours(found)]
    todo = [(c, reason) for c in containers if (reason := await _reason_to_remove(c, now, keeper))]
    left = [await _remove(client, "container", *thing) for thing in todo]
    if all(leftover is None or leftover.removed for leftover in left):
        await to_thread.run_sync(_forget_the_dead, keeper.note)
    try:
        volumes = await client.volumes(manifest.LABEL_EXPIRES)
    except Refused as exc:  # who guards the daemon may not let us look
        _log.info("volumes could not be looked for: %s", exc)
        volumes = []
    left += [await _remove(client, "volume", v, "it has expired") for v in volumes if is_ours(v) and expired(v, now)]
    return [leftover for leftover in left if leftover is not None]


def is_ours(found: Labelled) -> bool:
    """Whether cloche made it. Labels alone do not tell: those of an image are its containers' too."""
    labels = found.labels.keys()
    return found.name.startswith(NAME_PREFIX) and bool(labels & {manifest.LABEL_OWNER, LABEL_SUPERVISOR})


def expired(found: Labelled, now: float) -> bool:
    """Whether its time is over."""
    expires = found.labels.get(manifest.LABEL_EXPIRES, "")
    return expires.isdecimal() and len(expires) <= MAX_DIGITS and int(expires) < now


async def _reason_to_remove(found: Labelled, now: float, keeper: Keeper) -> str:
    """Empty: it may be a living run's."""
    owner = found.labels.get(manifest.LABEL_OWNER, "")
    if owner == keeper.owner:
        return ""
    alive = None
    if owner and keeper.place is not None and found.labels.get(manifest.LABEL_PLACE) == keeper.place:
        alive = await to_thread.run_sync(_is_alive, owner)
    if alive is False:
        return f"owner {owner} is dead"
    return "it has expired" if alive is None and expired(found, now) else ""


async def _remove(client: DockerClient, kind: str, found: Labelled, reason: str) -> Leftover | None:
    """None: it is in use after all."""
    try:
        if kind == "volume":
            await client.remove_volume(found.name)
        else:
            await client.remove(found.name)
    except Refused as exc:
        if kind == "volume" and exc.status == 409:
            return None
        return Leftover(kind, found.name, removed=False, reason=exc.message)
    except HttpFailure as exc:
        return Leftover(kind, found.name, removed=False, reason=str(exc))
    return Leftover(kind, found.name, removed=True, reason=reason)


def _is_alive(owner: str) -> bool | None:
    return owners.is_alive(owners.state_folder(), owner)


def _forget_the_dead(own_note: str) -> None:
    """Remove the locks of the dead that had nothing but containers on this daemon, which are gone now."""
    if not owners.SUPPORTED:
        return
    with contextlib.suppress(OSError):
        for owner in owners.dead(owners.state_folder()):
            elsewhere = any(line != own_note for line in owner.notes) and owner.age_s < owners.NOTE_LIFE_S
            owner.left |= bool(owner.folders) or elsewhere
