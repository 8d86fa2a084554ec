"""The volume that holds the supervisor: one for each version of it, filled once on each daemon.

Who fills it makes a container of a fixed name, never started, with the volume in it, and has the daemon unpack the program
there. The name is the lock: two cannot have it, and whoever waits for it looks at the program's size before he fills again.
A program that is cut short, because a filler died, is found out by that size while the volume is young, and later by a box
that does not start (:meth:`SupervisorVolume.doubt`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import tarfile
import time
from pathlib import Path

import anyio
from anyio import to_thread

from cloche._kit.http import HttpFailure
from cloche.backends import shape
from cloche.backends.docker import manifest
from cloche.backends.docker.client import DockerClient, Refused
from cloche.backends.docker.manifest import Ground
from cloche.errors import BackendUnavailable

LABEL_MADE = "cloche.made"
LABEL_SUPERVISOR = "cloche.supervisor"
YOUNG_S = 600.0
"""For so long after it was made, a volume is looked into before it is trusted."""
LIFE_S = 30 * 24 * 3600.0
"""After that sweep may remove it, if no container uses it; the next run makes it again."""
FILL_S = 60.0
FILLER_LIFE_S = 30.0
"""An older filler has died over its work."""

_log = logging.getLogger("cloche.docker")


class SupervisorVolume:
    """The volume for one supervisor on one daemon."""

    def __init__(self, client: DockerClient, program: Path) -> None:
        self._client = client
        self._data = program.read_bytes()
        digest = hashlib.sha256(self._data).hexdigest()[:16]
        self.name = f"cloche-supervisor-{digest}"
        self._filler = f"cloche-fill-{digest}"
        self._lock = anyio.Lock()
        self._trusted = self._doubted = False

    def doubt(self) -> None:
        """A box did not start as it should: look into the volume before the next one."""
        self._trusted, self._doubted = False, True

    async def ensure(self, ground: Ground, image: str) -> None:
        """Have the supervisor in the volume. ``image`` is any that the daemon has.

        Raises:
            BackendUnavailable: it cannot be had there.
            Refused, HttpFailure: from the daemon.
        """
        async with self._lock:
            if self._trusted:
                return
            if self._doubted or await self._is_young():
                self._doubted = False
                await self._fill(ground, image)
            self._trusted = True

    async def _is_young(self) -> bool:
        """Whether it was made lately, or not at all."""
        labels = await self._client.volume_labels(self.name)
        if labels is None:
            return True
        made = labels.get(LABEL_MADE, "")
        # Without the label: a container was made before the volume was there, and the daemon made an empty one.
        return not made.isdecimal() or await self._now() - int(made) < YOUNG_S

    async def _fill(self, ground: Ground, image: str) -> None:
        labels, now = await self._client.volume_labels(self.name), await self._now()
        if labels is not None and LABEL_MADE not in labels:
            # A container was made without it, and the daemon made an empty one that nobody would ever sweep.
            with contextlib.suppress(Refused):  # in use
                await self._client.remove_volume(self.name)
        made = {LABEL_SUPERVISOR: self.name, LABEL_MADE: str(int(now))}
        await self._client.create_volume(
            manifest.volume(self.name, {**made, manifest.LABEL_EXPIRES: str(int(now + LIFE_S))})
        )
        body = manifest.filler(ground, image, {**made, manifest.LABEL_EXPIRES: str(int(now + FILLER_LIFE_S))})
        with anyio.move_on_after(FILL_S):
            while not await self._try_fill(body):  # noqa: ASYNC110 - the other one tells nobody
                await anyio.sleep(0.05)
            return
        raise BackendUnavailable(
            f"The supervisor could not be put into the volume {self.name} within {FILL_S:g} s.",
            hint=f"Remove the container {self._filler} if it is there, and look at the daemon's log.",
            retryable=True,
        )

    async def _try_fill(self, body: dict[str, object]) -> bool:
        """False: somebody else is at it."""
        try:
            with anyio.CancelScope(shield=True):  # else it may be made after we have given up on it
                await self._client.create(self._filler, body)
        except Refused as exc:
            if exc.status != 409 and "in use" not in exc.message:
                raise
            await self._remove_dead_filler()
            return False
        try:
            size = await self._client.size_in(self._filler, shape.SUPERVISOR)
            if size != len(self._data):
                archive = await to_thread.run_sync(_archive, self._data)
                await self._client.put_archive(self._filler, shape.SUPERVISOR_FOLDER, archive)
                size = await self._client.size_in(self._filler, shape.SUPERVISOR)
        finally:
            await self._remove_filler()
        if size != len(self._data):
            raise BackendUnavailable(
                f"The daemon took the supervisor and then showed {size} bytes of its {len(self._data)}.",
                hint="Look at the daemon's log and the room on its disk.",
            )
        return True

    async def _remove_filler(self) -> None:
        """Failing is no reason for the run to fail: whoever fills next removes it when its time is up, and sweep does."""
        try:
            with anyio.move_on_after(FILLER_LIFE_S, shield=True):
                await self._client.remove(self._filler)
        except (HttpFailure, Refused) as exc:
            _log.warning("the container %s could not be removed: %s. It is left to sweep.", self._filler, exc)

    async def _remove_dead_filler(self) -> None:
        now = await self._now()
        for found in await self._client.containers(LABEL_SUPERVISOR):
            expires = found.labels.get(manifest.LABEL_EXPIRES, "")
            if found.labels.get(LABEL_SUPERVISOR) == self.name and expires.isdecimal() and int(expires) < now:
                _log.info("removing a container that should have filled %s and did not", self.name)
                await self._client.remove(found.name)

    async def _now(self) -> float:
        engine = await self._client.engine_time()
        return time.time() if engine is None else engine


def _archive(program: bytes) -> bytes:
    """A tar of the supervisor, readable and executable for all, owned by root."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(shape.SUPERVISOR.rpartition("/")[2])
        member.size = len(program)
        member.mode = 0o755
        archive.addfile(member, io.BytesIO(program))
    return out.getvalue()
