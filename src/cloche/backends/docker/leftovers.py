"""What the dead left on the daemon, and removing it.

Everything that cloche makes there carries an absolute expiry, written when it was made, by the daemon's own clock: whoever
finds it expired may remove it. Earlier only with proof that its owner is dead, which is a lock in a folder that both share.
"""

from __future__ import annotations

import contextlib
import time

from anyio import to_thread

from cloche._kit.http import HttpFailure
from cloche.backends import owners
from cloche.backends.contract import Leftover
from cloche.backends.docker import manifest
from cloche.backends.docker.client import DockerClient, Refused
from cloche.backends.docker.facts import Labelled

MAX_DIGITS = 15
"""Of a label with a time; some millions of years have so many."""


async def sweep(client: DockerClient, *, owner: str, place: str | None) -> list[Leftover]:
    """Remove it. ``owner`` is who asks, ``place`` the id of the folder of locks that he can see.

    Raises:
        Refused, HttpFailure: the daemon cannot be asked.
    """
    engine = await client.engine_time()
    now = time.time() if engine is None else engine
    todo = [
        ("container", container.name, reason)
        for container in await client.containers(manifest.LABEL_EXPIRES)
        if (reason := await _reason_to_remove(container, now, owner, place))
    ]
    volumes = await client.volumes(manifest.LABEL_EXPIRES)
    todo += [("volume", volume.name, "it has expired") for volume in volumes if expired(volume, now)]
    found = [await _remove(client, *thing) for thing in todo]
    await to_thread.run_sync(_forget_the_dead)
    return [leftover for leftover in found if leftover is not None]


def expired(found: Labelled, now: float) -> bool:
    """Whether anybody may remove it. What does not say when it expires is not ours."""
    expires = found.labels.get(manifest.LABEL_EXPIRES, "")
    return expires.isdecimal() and len(expires) <= MAX_DIGITS and int(expires) < now


async def _reason_to_remove(found: Labelled, now: float, owner: str, place: str | None) -> str:
    """Empty: it may be a living run's."""
    theirs = found.labels.get(manifest.LABEL_OWNER, "")
    if theirs == owner:
        return ""
    if expired(found, now):
        return "it has expired"
    if place is None or found.labels.get(manifest.LABEL_PLACE) != place or not theirs:
        return ""
    return "" if await to_thread.run_sync(_is_alive, theirs) else f"owner {theirs} is dead"


async def _remove(client: DockerClient, kind: str, name: str, reason: str) -> Leftover | None:
    """None: it is in use after all."""
    try:
        if kind == "volume":
            await client.remove_volume(name)
        else:
            await client.remove(name)
    except Refused as exc:
        if kind == "volume" and exc.status == 409:
            return None
        return Leftover(kind, name, removed=False, reason=exc.message)
    except HttpFailure as exc:
        return Leftover(kind, name, removed=False, reason=str(exc))
    return Leftover(kind, name, removed=True, reason=reason)


def _is_alive(owner: str) -> bool:
    return owners.is_alive(owners.state_folder(), owner)


def _forget_the_dead() -> None:
    """Remove the locks of dead owners that noted no folder: theirs was nothing but containers."""
    if not owners.SUPPORTED:
        return
    with contextlib.suppress(OSError):
        for owner in owners.dead(owners.state_folder()):
            owner.left |= bool(owner.folders)
