"""The daemon's images: which of them a box can be made from, and pulling those that are missing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread

from cloche._kit.http import HttpFailure
from cloche.backends.docker.client import DockerClient, Refused
from cloche.backends.docker.credentials import registry_auth
from cloche.backends.docker.facts import Image
from cloche.backends.docker.images import Reference, parse_reference
from cloche.backends.docker.pull import Progress
from cloche.errors import ImageUnavailable

WORDS_EVERY_S = 0.1
NO_NAME = frozenset({301, 307, 308, 400})
"""What a daemon answers to what is no name of an image; redirections to what looks like a path that climbs."""

_log = logging.getLogger("cloche.docker")
_progress = logging.getLogger("cloche.progress")
"""What takes long and is going well, a line at a time, for whoever shows such things."""


class Images:
    """Images of one daemon, looked at once each."""

    def __init__(self, client: DockerClient, config: Path, *, pull: str, arch: str) -> None:
        self._client = client
        self._config = config
        self._pull = pull
        self._arch = arch
        self._known: dict[str, Image] = {}
        self._locks: dict[str, anyio.Lock] = {}

    def forget(self, name: str) -> None:
        """It is not there any more: look again."""
        self._known.pop(name, None)

    async def ensure(self, name: str) -> Image:
        """The image, pulled if it is to be pulled. Two who want the same one wait for one pull.

        Raises:
            ImageUnavailable: it is not to be had, or cannot be run there.
            Refused, HttpFailure: from the daemon.
        """
        async with self._locks.setdefault(name, anyio.Lock()):
            if name not in self._known:
                self._known[name] = await self._find(name)
            return self._known[name]

    async def _find(self, name: str) -> Image:
        found = None if self._pull == "always" else await self._look(name)
        if found is None:
            if self._pull == "never":
                raise ImageUnavailable(
                    f"The daemon has no image {name!r}, and CLOCHE_PULL=never.",
                    hint=f"Pull it (docker pull {name}), choose another one with CLOCHE_IMAGE, or allow pulling.",
                )
            await self._fetch(name)
            found = await self._look(name)
        if found is None:
            raise ImageUnavailable(f"The daemon says that it pulled {name!r}, and does not have it.")
        if found.os not in {"", "linux"} or (found.arch and found.arch != self._arch):
            raise ImageUnavailable(
                f"The image {name!r} is for {found.os or 'linux'}/{found.arch}, and the daemon runs linux/{self._arch}.",
                hint=f"Pull or build it for linux/{self._arch}, or choose another one with CLOCHE_IMAGE.",
            )
        return found

    async def _look(self, name: str) -> Image | None:
        try:
            return await self._client.image(name)
        except Refused as exc:
            if exc.status in NO_NAME:
                raise ImageUnavailable(f"{name!r} is no name of an image: {exc.message}.") from None
            raise

    async def _fetch(self, name: str) -> None:
        reference = parse_reference(name)
        # A helper may wait for a person, and nothing is lost with its answer.
        auth = await to_thread.run_sync(registry_auth, self._config, reference.registry, abandon_on_cancel=True)
        _log.info("pulling %s", name)
        try:
            await self._follow(name, reference, auth)
        except (Refused, HttpFailure) as exc:
            why = exc.message if isinstance(exc, Refused) else str(exc)
            raise ImageUnavailable(
                f"The image {name!r} cannot be pulled: {why.rstrip('.')}.",
                hint=_advice(reference, authenticated=auth is not None),
                retryable=isinstance(exc, HttpFailure),
            ) from None
        finally:
            _progress.info("", extra={"done": True})

    async def _follow(self, name: str, reference: Reference, auth: str | None) -> None:
        progress, told_at = Progress(name), 0.0
        _progress.info("%s", progress.line())
        said: Mapping[str, Any]
        async with aclosing(self._client.pull(reference, auth)) as words:
            async for said in words:
                line, now = progress.add(said), anyio.current_time()
                if now - told_at >= WORDS_EVERY_S:
                    told_at = now
                    _progress.info("%s", line)


def _advice(reference: Reference, *, authenticated: bool) -> str:
    login = "" if authenticated else f" If it is a private one, docker login {reference.registry} first."
    return f"Check the name and the daemon's way to {reference.registry}, or choose another image with CLOCHE_IMAGE.{login}"
