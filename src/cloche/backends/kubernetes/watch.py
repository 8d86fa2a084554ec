"""One watch for all pods of a sandbox, and who waits for which.

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
from cloche._kit.steps import step
from cloche.backends.kubernetes import names
from cloche.backends.kubernetes.client import Expired, KubernetesClient, Refused
from cloche.backends.kubernetes.facts import Pod
from cloche.errors import ClocheError

PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Before each new try of a watch that broke; the last one is repeated."""
SHORT_S = 1.0
"""A watch that ends sooner than that broke, in whatever way."""
TOLD_AFTER = 3
"""Failures in a row after which it is told, once."""

_log = logging.getLogger("cloche.kubernetes")


class Follower:
    """What is known of one Job's pod, and a way to wait for news."""

    def __init__(self) -> None:
        self.pod: Pod | None = None
        self._owner = ""
        self._changed = anyio.Event()

    def belongs_to(self, job_uid: str) -> None:
        """From now on only a pod of that very Job counts: labels can be written by others."""
        self._owner = job_uid
        if self.pod is not None and self.pod.owner != job_uid:
            self.pod = None

    async def news(self, within_s: float) -> bool:
        """Wait for a change. False: there was none in time."""
        changed = self._changed
        with anyio.move_on_after(within_s):
            await changed.wait()
        return changed.is_set()

    def tell(self, pod: Pod) -> None:
        """Take a newer state of the pod. Of two pods, which a Job may make, the first one is it."""
        known = self.pod
        if self._owner and pod.owner != self._owner:
            return
        if known is not None and (known.uid != pod.uid or known.deleted or pod.older_than(known)):
            return
        if pod == known:
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
    def follow(self, job: str) -> Iterator[Follower]:
        """Hear of the pod of a Job, from before it is made."""
        follower = self._followers[job] = Follower()
        try:
            yield follower
        finally:
            del self._followers[job]

    async def look(self, job: str) -> None:
        """Ask once, past the watch, which may be stuck somewhere on its way."""
        pods, _ = await self._client.pods(f"{names.LABEL_JOB}={job}")
        for pod in pods:
            self._tell(pod)

    async def watch(self) -> NoReturn:
        """For ever."""
        version, failures = "", 0
        while True:
            begun, brought, problem = anyio.current_time(), False, "it ended at once"
            try:
                if not version:
                    version = await self._list()
                async with aclosing(self._client.watch_pods(self._selector, version)) as events:
                    async for kind, pod, at in events:
                        version, brought = at or version, True
                        if pod is not None:
                            self._tell(replace(pod, deleted=kind == "DELETED"))
            except Expired:
                version, problem = "", f"the API server has forgotten version {version}"
            except (HttpFailure, Refused, ClocheError) as exc:
                if isinstance(exc, Refused):
                    version = ""  # whatever it did not like, a list is a safe beginning
                problem = str(exc)
            if anyio.current_time() - begun > SHORT_S:
                failures = 0
                continue
            failures = 1 if brought else failures + 1
            _log.log(
                logging.WARNING if failures == TOLD_AFTER else logging.DEBUG, "the watch of pods broke: %s", problem
            )
            pause = step(PAUSES_S, failures - 1)
            await anyio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - so that not all come at once

    async def _list(self) -> str:
        # One that becomes known while the answer is on its way may not be in it.
        known = {job: follower.pod for job, follower in self._followers.items() if follower.pod is not None}
        pods, version = await self._client.pods(self._selector)
        there = {pod.uid for pod in pods}
        for job, pod in known.items():
            follower = self._followers.get(job)
            if follower is not None and follower.pod is not None and pod.uid not in there:
                follower.tell(replace(follower.pod, deleted=True))
        for pod in pods:
            self._tell(pod)
        return version

    def _tell(self, pod: Pod) -> None:
        if (follower := self._followers.get(pod.job)) is not None:
            follower.tell(pod)
