"""One pod, from its Job to its last byte.

The result is taken from the log, the moment its last frame is there: the pod's status says the same some tenths of a second
later, and the Job's some seconds. On the way of a run that goes well nothing is asked for twice but the log, and that only from
when the pod's sandbox is ready.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple

import anyio
from anyio import to_thread

from cloche._kit.http import HttpFailure, Stream
from cloche._kit.steps import step
from cloche.backends.contract import Fate, FateKind
from cloche.backends.kubernetes import diagnose, manifest
from cloche.backends.kubernetes.client import KubernetesClient, OtherContent, Refused
from cloche.backends.kubernetes.facts import Pod
from cloche.backends.kubernetes.watch import Follower, Pods
from cloche.errors import BackendUnavailable, ClocheError, EngineLost, QuotaExceeded, WorkspaceTooLarge
from cloche.supervisor.bundle import Bundle

LOG_STEPS_S = (0.01, 0.01, 0.02, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Between two requests for a log that is not there yet; the last one is repeated, and every news of the pod ends a step."""
NO_POD_S = 1.0
"""A Job that has no pod after so long is looked into: its controller makes one within some milliseconds, or may not."""
UNSURE_S = (4.0, 8.0)
"""So is a pod without news for so long, and again after longer; the last one is repeated."""
MENDS = 2
"""How often what a pod may wait for is put back."""
END_S = 8.0
"""For the node to have told the API server that a container whose log has ended has ended too; usually it takes one."""
NO_LOG_S = 1.0
"""For the news that a pod has ended whose log has: both come from the node at about the same time."""
PARALLEL = 4
"""ConfigMaps of a bundle on their way at a time."""
QUOTA_PAUSES_S = (0.1, 0.2, 0.5, 1.0)
_FRAME = b"@c "

_log = logging.getLogger("cloche.kubernetes")


class JobName(NamedTuple):
    """How a Job is known."""

    name: str
    uid: str


class KubernetesBox:
    """The pod of a Job. ``maps`` makes the bodies of the bundle's ConfigMaps; ``mend`` puts back what a pod may wait for."""

    def __init__(
        self,
        client: KubernetesClient,
        pods: Pods,
        follower: Follower,
        job: JobName,
        maps: Callable[[bytes], Iterable[Mapping[str, Any]]],
        mend: Callable[[], Awaitable[None]],
    ) -> None:
        self._client = client
        self._pods = pods
        self._follower = follower
        self._job, self._job_uid = job
        self._maps = maps
        self._mend = mend
        self._held: Fate | None = None
        """Why there is no pod yet, as far as the cluster said so."""

    async def feed(self, bundle: Bundle) -> None:
        """Hand the bundle in: its ConfigMaps, some at a time. The pod waits for them.

        Raises:
            ClocheError: they cannot be made.
        """
        bodies = await to_thread.run_sync(self._bodies, bundle)
        limiter = anyio.CapacityLimiter(PARALLEL)
        failed: list[Exception] = []

        async def create(body: Mapping[str, Any]) -> None:
            try:
                async with limiter:
                    await self._create_map(body)
            except Exception as exc:  # noqa: BLE001 - told as itself, not in a group
                failed.append(exc)
                tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            for body in bodies:
                tasks.start_soon(create, body)
        if failed:
            raise failed[0]

    def _bodies(self, bundle: Bundle) -> list[Mapping[str, Any]]:
        data = b"".join(bundle.records())
        bodies = list(self._maps(data))
        if len(data) > len(bodies) * manifest.CHUNK_BYTES:
            raise WorkspaceTooLarge(f"The bundle has {len(data)} bytes, and the box was made for fewer.")
        return bodies

    async def _create_map(self, body: Mapping[str, Any]) -> None:
        """Where a quota forbids one more, others may go: the run waits until its start is overdue."""
        tries = 0
        while True:
            try:
                await self._client.create_config_map(body)
            except Refused as exc:
                error = diagnose.refusal(exc, "make a ConfigMap")
                if not isinstance(error, QuotaExceeded):
                    raise error from exc
                self._held = Fate(FateKind.QUOTA, exc.message)
            except OtherContent as exc:
                raise BackendUnavailable(
                    f"Somebody else made the ConfigMap {exc}.", hint="Run again.", retryable=True
                ) from exc
            except HttpFailure as exc:
                raise diagnose.unreachable(exc, "make a ConfigMap") from exc
            else:
                self._held = None
                return
            await anyio.sleep(step(QUOTA_PAUSES_S, tries))
            tries += 1

    async def output(self) -> AsyncGenerator[bytes, None]:
        """The log, from its first byte on, up to its end.

        Raises:
            EngineLost: the log cannot be read now, or it ended and the pod has not; it can be asked again.
            ClocheError: the cluster says that the box cannot start.
        """
        looks = 0
        while (pod := await self._pod_with_log()) is not None:
            refused: Refused | None = None
            try:
                async with self._client.log(pod.name) as log:
                    if isinstance(log, Refused):
                        refused = log
                    else:
                        async with aclosing(_until_lost(log)) as chunks:
                            async for chunk in chunks:
                                yield chunk
            except (HttpFailure, BackendUnavailable) as exc:
                raise EngineLost(f"The connection to the API server was lost: {exc}.", retryable=True) from exc
            if refused is None or refused.code != 400:
                # A refusal: the server cannot reach the node, a node's kubelet has just begun, or the server itself, which
                # then knows neither pods nor our rights. That we have them, the probe has seen.
                await self._has_ended(pod, "it ended" if refused is None else str(refused))
                return
            if self._follower.pod is not None and self._follower.pod.over:
                return
            await self._follower.news(step(LOG_STEPS_S, looks))
            looks += 1

    async def _has_ended(self, pod: Pod, why: str) -> None:
        """Wait a moment for the cluster to say that a pod without a log has ended too.

        Raises:
            EngineLost: it does not say so.
        """
        with anyio.move_on_after(NO_LOG_S):
            await self._until_over()
        if not (await self._now(pod)).over:
            raise EngineLost(f"The pod {pod.name} still runs, and its log cannot be read: {why}.", retryable=True)

    async def _until_over(self) -> None:
        while self._follower.pod is not None and not self._follower.pod.over:
            await self._follower.news(END_S)

    async def _now(self, known: Pod) -> Pod:
        """The pod's state, asked for where it is not known that it has ended.

        Raises:
            EngineLost: nobody tells.
        """
        known = self._follower.pod or known
        if known.over:
            return known
        try:
            found = await self._client.pod(known.name)
        except (HttpFailure, Refused, BackendUnavailable) as exc:
            raise EngineLost(
                f"The API server cannot tell what became of the pod {known.name}: {exc}.", retryable=True
            ) from exc
        return replace(known, deleted=True) if found is None or found.uid != known.uid else found

    async def _pod_with_log(self) -> Pod | None:
        """The pod, as soon as it can have a log. None: it is gone, or ended without one.

        Raises:
            ClocheError: it cannot start.
        """
        looks = 0
        while True:
            pod = self._follower.pod
            if pod is not None:
                if (trouble := diagnose.pod_trouble(pod)) is not None:
                    raise diagnose.as_error(trouble)
                # The condition is there from 1.29 on; a container that is past "waiting" says the same.
                if not pod.deleted and (pod.sandbox_ready or pod.container in {"running", "terminated"}):
                    return pod
                if pod.over:
                    return None
            within_s = NO_POD_S if pod is None and looks == 0 else step(UNSURE_S, looks)
            if not await self._follower.news(within_s):
                looks += 1
                await self._look_closer(mend=looks <= MENDS)

    async def _look_closer(self, *, mend: bool) -> None:
        """There were no news for a while: is there a pod at all, and if not, why? News end it.

        Raises:
            ClocheError: the cluster refuses to make one.
        """
        refused: ClocheError | None = None

        async def look() -> None:
            nonlocal refused
            try:
                await self._pods.look(self._job)
                pod = self._follower.pod
                if pod is None:
                    fate = diagnose.job_fate(await self._client.events(self._job_uid))
                    self._held = fate or self._held
                    if fate is not None and fate.kind is not FateKind.QUOTA:
                        refused = diagnose.as_error(fate)
                elif mend and pod.scheduled:
                    await self._mend()
            except (Refused, HttpFailure, ClocheError) as exc:
                _log.debug("nothing can be found out about the pod of %s: %s", self._job, exc)
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            await self._follower.news(math.inf)
            tasks.cancel_scope.cancel()
        if refused is not None:
            raise refused

    async def stop(self) -> None:
        """Have the pod deleted: its supervisor gets SIGTERM, and reports the run as cancelled."""
        await self._client.delete_job(self._job)

    async def fate(self, *, ended: bool) -> Fate:
        """The cluster's word."""
        if ended:
            with anyio.move_on_after(END_S):
                await self._until_over()
        try:
            if self._follower.pod is None:
                await self._pods.look(self._job)
            if self._follower.pod is None:
                said = diagnose.job_fate(await self._client.events(self._job_uid)) or self._held
                return said or Fate(FateKind.LOST, f"The cluster has made no pod for the Job {self._job}.")
            pod = await self._now(self._follower.pod)
        except HttpFailure as exc:
            return Fate(FateKind.LOST, f"The API server cannot be reached: {exc}.")
        except Refused as exc:
            return Fate(FateKind.LOST, f"The API server cannot tell: {exc.message}.")
        except ClocheError as exc:
            return Fate(FateKind.LOST, exc.message)
        fate = diagnose.pod_fate(pod)
        # A pod that waits for its ConfigMap does not know why there is none.
        return self._held if fate.kind is FateKind.LOST and self._held is not None else fate


async def _until_lost(stream: Stream) -> AsyncGenerator[bytes, None]:
    """The log; nothing where the kubelet says in its place that it has none any more (status 200, and a line of its own).

    What a box writes begins with a frame: nobody but its supervisor can write there.
    """
    begun = b""
    async with aclosing(stream.chunks()) as chunks:
        async for chunk in chunks:
            if len(begun) < len(_FRAME):
                begun = (begun + chunk)[: len(_FRAME)]
                if not _FRAME.startswith(begun):
                    _log.debug("instead of a log: %s", chunk[:200])
                    return
            yield chunk
