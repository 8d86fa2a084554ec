"""What the dead left on the daemon, and removing it. Times are by the daemon's own clock."""

from __future__ import annotations

import logging
import time

from cloche._kit.http import HttpFailure
from cloche.backends.claims import Claim, Keeper
from cloche.backends.contract import Leftover
from cloche.backends.docker import manifest
from cloche.backends.docker.client import DockerClient, Refused
from cloche.backends.docker.facts import Labelled
from cloche.backends.docker.volume import LABEL_SUPERVISOR

NAME_PREFIX = "cloche-"

_log = logging.getLogger("cloche.docker")


def note(address: str) -> str:
    """What an owner with containers on a daemon writes into the file of his lock."""
    return f"docker {address}"


async def sweep(client: DockerClient, keeper: Keeper, *, dry_run: bool = False) -> list[Leftover]:
    """Remove it; ``dry_run``: only tell of it.

    Raises:
        Refused, HttpFailure: the daemon cannot be asked.
    """
    engine = await client.engine_time()
    now = time.time() if engine is None else engine
    containers = [found for found in await client.containers(manifest.LABEL_EXPIRES) if is_ours(found)]
    todo = [(c, reason) for c in containers if (reason := await keeper.reason_to_remove(_claim(c), now))]
    remove = _would_remove if dry_run else _remove
    left = [await remove(client, "container", *thing) for thing in todo]
    if not dry_run and all(leftover is None or leftover.removed for leftover in left):
        await keeper.forget_the_dead()
    try:
        volumes = await client.volumes(manifest.LABEL_EXPIRES)
    except Refused as exc:  # who guards the daemon may not let us look
        _log.info("volumes could not be looked for: %s", exc)
        volumes = []
    left += [
        await remove(client, "volume", v, "it has expired") for v in volumes if is_ours(v) and _claim(v).expired(now)
    ]
    return [leftover for leftover in left if leftover is not None]


def is_ours(found: Labelled) -> bool:
    """Whether cloche made it. Labels alone do not tell: those of an image are its containers' too."""
    labels = found.labels.keys()
    return found.name.startswith(NAME_PREFIX) and bool(labels & {manifest.LABEL_OWNER, LABEL_SUPERVISOR})


def _claim(found: Labelled) -> Claim:
    labels = found.labels
    return Claim(
        labels.get(manifest.LABEL_OWNER, ""),
        labels.get(manifest.LABEL_PLACE, ""),
        labels.get(manifest.LABEL_EXPIRES, ""),
    )


async def _would_remove(_: DockerClient, kind: str, found: Labelled, reason: str) -> Leftover | None:
    return Leftover(kind, found.name, removed=False, reason=reason)


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
