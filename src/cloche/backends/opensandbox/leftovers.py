"""What the dead left at the service, and removing it. Times are by the service's clock.

It goes without us too: each sandbox was made with a lifetime, after which the service removes it.
"""

from __future__ import annotations

from cloche._kit.http import HttpFailure
from cloche.backends.claims import Claim, Keeper
from cloche.backends.contract import Leftover
from cloche.backends.opensandbox import manifest
from cloche.backends.opensandbox.client import OpenSandboxClient, Refused
from cloche.backends.opensandbox.facts import Sandbox


def note(base: str) -> str:
    """What an owner with sandboxes at a service writes into the file of his lock."""
    return f"opensandbox {base}"


async def sweep(client: OpenSandboxClient, keeper: Keeper, *, dry_run: bool = False) -> list[Leftover]:
    """Remove it; ``dry_run``: only tell of it.

    Raises:
        Refused, HttpFailure: the service cannot be asked.
    """
    todo = [
        (sandbox, reason)
        async for sandbox in client.sandboxes({manifest.META_KIND: manifest.KIND})
        if is_ours(sandbox) and (reason := await keeper.reason_to_remove(_claim(sandbox), client.server_time()))
    ]
    if dry_run:
        return [Leftover("sandbox", sandbox.id, removed=False, reason=reason) for sandbox, reason in todo]
    left = [await _remove(client, sandbox, reason) for sandbox, reason in todo]
    if all(leftover.removed for leftover in left):
        await keeper.forget_the_dead()
    return left


def is_ours(sandbox: Sandbox) -> bool:
    """Whether a run of cloche's made it. The labels of an image are its sandboxes' metadata too, and an image may have been made
    of a sandbox of ours: then what it says was over before the sandbox was made.
    """
    metadata = sandbox.metadata
    if not {manifest.META_RUN, manifest.META_OWNER, manifest.META_TRY} <= metadata.keys():
        return False
    return sandbox.created_at is None or not _claim(sandbox).expired(sandbox.created_at)


def _claim(sandbox: Sandbox) -> Claim:
    metadata = sandbox.metadata
    return Claim(
        metadata.get(manifest.META_OWNER, ""),
        metadata.get(manifest.META_PLACE, ""),
        metadata.get(manifest.META_EXPIRES, ""),
    )


async def _remove(client: OpenSandboxClient, sandbox: Sandbox, reason: str) -> Leftover:
    try:
        await client.delete(sandbox.id)
    except (Refused, HttpFailure) as exc:
        return Leftover("sandbox", sandbox.id, removed=False, reason=str(exc))
    return Leftover("sandbox", sandbox.id, removed=True, reason=reason)
