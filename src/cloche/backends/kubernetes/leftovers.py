"""What the dead left in the namespace, and removing it. Times are by the API server's clock.

Most of it goes without us: a Job ends at its deadline, is removed some minutes later, and what belongs to it with it.
"""

from __future__ import annotations

import anyio

from cloche._kit.http import HttpFailure
from cloche.backends.claims import Claim, Keeper
from cloche.backends.contract import Leftover
from cloche.backends.kubernetes import names
from cloche.backends.kubernetes.client import KubernetesClient, Refused
from cloche.backends.kubernetes.facts import Thing
from cloche.errors import ClocheError

PARALLEL = 8
"""Things that are removed at a time."""


def note(base: str, namespace: str) -> str:
    """What an owner with Jobs in a namespace writes into the file of his lock."""
    return f"kubernetes {base} {namespace}"


async def sweep(client: KubernetesClient, keeper: Keeper, *, dry_run: bool = False) -> list[Leftover]:
    """Remove it; ``dry_run``: only tell of it.

    Raises:
        Refused, HttpFailure, BackendUnavailable: the API server cannot be asked.
    """
    jobs = await client.jobs()
    # What a Job owns goes with it.
    there = {job.uid for job in jobs}
    things = [*jobs, *(thing for thing in await client.config_maps() if thing.owners.isdisjoint(there))]
    now = client.server_time()
    todo = [(t, reason) for t in things if is_ours(t) and (reason := await keeper.reason_to_remove(_claim(t), now))]
    if dry_run:
        return [Leftover(thing.kind, thing.name, removed=False, reason=reason) for thing, reason in todo]
    left: list[Leftover] = []
    limiter = anyio.CapacityLimiter(PARALLEL)

    async def remove(thing: Thing, reason: str) -> None:
        async with limiter:
            left.append(await _remove(client, thing, reason))

    async with anyio.create_task_group() as tasks:
        for thing, reason in todo:
            tasks.start_soon(remove, thing, reason)
    if all(leftover.removed for leftover in left):
        await keeper.forget_the_dead()
    return left


def is_ours(thing: Thing) -> bool:
    """Whether a run of cloche's made it. Labels alone do not tell: anybody's tools may have copied them."""
    return thing.name.startswith("cloche-") and names.LABEL_RUN in thing.labels


def _claim(thing: Thing) -> Claim:
    return Claim(
        thing.labels.get(names.LABEL_OWNER, ""),
        thing.annotations.get(names.PLACE, ""),
        thing.annotations.get(names.EXPIRES, ""),
    )


async def _remove(client: KubernetesClient, thing: Thing, reason: str) -> Leftover:
    try:
        remove = client.delete_job if thing.kind == "job" else client.delete_config_map
        await remove(thing.name)
    except Refused as exc:
        return Leftover(thing.kind, thing.name, removed=False, reason=exc.message)
    except (HttpFailure, ClocheError) as exc:
        return Leftover(thing.kind, thing.name, removed=False, reason=str(exc))
    return Leftover(thing.kind, thing.name, removed=True, reason=reason)
