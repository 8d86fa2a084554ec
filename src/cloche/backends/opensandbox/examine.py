"""The way to a sandbox, step by step, for those who want to know how it is."""

from __future__ import annotations

from collections.abc import Collection

import anyio

from cloche.backends.opensandbox.client import OpenSandboxClient
from cloche.backends.opensandbox.manifest import META_RUN
from cloche.isolation import Check, Posture, Verdict
from cloche.settings import Settings

GONE_S, GONE_PAUSE_S = 10.0, 0.3
"""A service may still list for a moment what it has removed."""


def checks(settings: Settings, posture: Posture, where: str) -> tuple[Check, ...]:
    """From what the probe found. Pure."""
    if not posture.available:
        return (Check("service", Verdict.NOT_OK, posture.reason, posture.hint),)
    key = (
        "it takes the key"
        if settings.opensandbox_api_key is not None
        else "it wants no key, and takes anybody's requests"
    )
    return (
        Check("service", Verdict.OK, f"{posture.engine} at {where} says that it is well"),
        Check("rights", Verdict.OK, key)
        if settings.opensandbox_api_key is not None
        else Check(
            "rights",
            Verdict.NOT_OK,
            key,
            "Give the service an api_key, and cloche the same in CLOCHE_OPENSANDBOX_API_KEY.",
            needed=False,
        ),
        Check(
            "image",
            Verdict.UNKNOWN,
            f"the service has {settings.image}, or does not: the first sandbox shows it",
            needed=False,
        ),
    )


async def remains(client: OpenSandboxClient, run_ids: Collection[str]) -> list[str]:
    """Sandboxes of these runs.

    Raises:
        Refused, HttpFailure.
    """
    left: list[str] = []
    with anyio.move_on_after(GONE_S):
        while left := await _there(client, run_ids):  # noqa: ASYNC110 - who removes it tells nobody
            await anyio.sleep(GONE_PAUSE_S)
    return left


async def _there(client: OpenSandboxClient, run_ids: Collection[str]) -> list[str]:
    return [
        f"the sandbox {sandbox.id}"
        for run_id in run_ids
        async for sandbox in client.sandboxes({META_RUN: run_id})
        if not sandbox.dead
    ]
