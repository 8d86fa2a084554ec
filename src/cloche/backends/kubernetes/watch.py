"""One watch for all pods of this process, and who waits for which.

It begins with a list, goes on from that list's version, from connection to connection, and begins anew when the server has
forgotten what happened since (410). Nobody polls for the state of a pod.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import NoReturn

import anyio

from cloche._kit.http import HttpFailure
from cloche.backends.kubernetes.client import Expired, KubernetesClient, Refused
from cloche.backends.kubernetes.facts import Pod
from cloche.errors import ClocheError

PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Before each new try of a watch that broke; the last one is repeated."""

_log = logging.getLogger("cloche.kubernetes")


class Follower:
    """What is known of one run's pod, and a way to wait for news."""

    def __init__(self) -> None:
        self.pod: Pod | None = None
        self._changed = anyio.Event()

    async def news(self, within_s: float) -> bool:
        """Wait for a change. False: there was none in time."""
        changed = self._changed
        with anyio.move_on_after(within_s):
            await changed.wait()
        return changed.is_set()

    def tell(self, pod: Pod) -> None:
        """Take a newer state of the pod. Of two pods of a run, which a Job may make, the first one is it."""
        if self.pod is not None and self.pod.uid != pod.uid:
            return
        if self.pod is not None and self.pod.deleted:
            return
        self.pod = pod
        self._changed.set()
        self._changed = anyio.Event()


class Pods:
    """The pods that a selector chooses. ``watch`` has to run for followers to hear anything."""

    def __init__(self, client: KubernetesClient, selector: str) -> None:
        self._client = client
        self._selector = selector
        self._followers: dict[str, Follower] = {}

    @contextmanager
    def follow(self, run_id: str) -> Iterator[Follower]:
        """Hear of the pod of a run, from before it is made."""
        follower = self._followers[run_id] = Follower()
        try:
            yield follower
        finally:
            del self._followers[run_id]

    async def look(self, run_id: str, label: str) -> None:
        """Ask once, past the watch, which may be stuck somewhere on its way."""
        pods, _ = await self._client.pods(f"{label}={run_id}")
        for pod in pods:
            self._tell(pod)

    async def watch(self) -> NoReturn:
        """For ever."""
        version, failures = "", 0
        while True:
            try:
                if not version:
                    version = await self._list()
                async with aclosing(self._client.watch_pods(self._selector, version)) as events:
                    async for kind, pod, at in events:
                        version, failures = at or version, 0
                        if pod is not None:
                            self._tell(replace(pod, deleted=kind == "DELETED"))
            except Expired:
                _log.debug("the watch begins anew: the API server has forgotten version %s", version)
                version = ""
            except (HttpFailure, Refused, ClocheError) as exc:
                if isinstance(exc, Refused):
                    version = ""  # whatever it did not like, a list is a safe beginning
                pause = PAUSES_S[min(failures, len(PAUSES_S) - 1)]
                failures += 1
                _log.log(logging.DEBUG if failures < 3 else logging.WARNING, "the watch of pods broke: %s", exc)
                await anyio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - so that not all come at once

    async def _list(self) -> str:
        pods, version = await self._client.pods(self._selector)
        there = {pod.uid for pod in pods}
        for follower in self._followers.values():
            if follower.pod is not None and follower.pod.uid not in there:
                follower.tell(replace(follower.pod, deleted=True))
        for pod in pods:
            self._tell(pod)
        return version

    def _tell(self, pod: Pod) -> None:
        if (follower := self._followers.get(pod.run)) is not None:
            follower.tell(pod)
