"""One pod, from its Job to its last byte.

The result is taken from the log, the moment its last frame is there: the pod's status says the same some tenths of a second
later, and the Job's some seconds. Nothing is asked for in a loop but the log, and that only once the pod's sandbox is ready.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from typing import Any

import anyio
from anyio import to_thread

from cloche._kit.http import HttpFailure, Stream, parse_json
from cloche.backends.contract import Fate, FateKind
from cloche.backends.kubernetes import diagnose, facts, manifest, names
from cloche.backends.kubernetes.client import KubernetesClient, Refused
from cloche.backends.kubernetes.facts import Pod
from cloche.backends.kubernetes.watch import Follower, Pods
from cloche.errors import EngineLost, WorkspaceTooLarge
from cloche.supervisor.bundle import Bundle

LOG_STEPS_S = (0.01, 0.01, 0.02, 0.02, 0.03, 0.05, 0.1, 0.2)
"""Between two requests for a log that is not there yet; the last one is repeated, and every news of the pod ends a step."""
UNSURE_S = (1.0, 2.0, 4.0)
"""A pod without news for so long is looked into, and again after longer; the last one is repeated."""
END_S = 8.0
"""For the node to have told the API server that a container whose log has ended has ended too; usually it takes one."""
PARALLEL = 4
"""ConfigMaps of a bundle on their way at a time."""
NO_LOG_S = 1.0
"""For the news that a pod has ended whose log has: both come from the node at about the same time."""
QUOTA_PAUSES_S = (0.1, 0.2, 0.5, 1.0)
_ERROR_BYTES = 64 * 1024
_FRAME = b"@c "

_log = logging.getLogger("cloche.kubernetes")


class KubernetesBox:
    """The pod of a Job. ``maps`` makes the bodies of the bundle's ConfigMaps; ``mend`` puts back what a pod may wait for."""

    def __init__(
        self,
        client: KubernetesClient,
        pods: Pods,
        follower: Follower,
        names: tuple[str, str, str],
        maps: Callable[[bytes], Iterable[Mapping[str, Any]]],
        mend: Callable[[], Awaitable[None]],
    ) -> None:
        self._client = client
        self._pods = pods
        self._follower = follower
        self._run_id, self._job, self._job_uid = names
        self._maps = maps
        self._mend = mend
        self._held: Fate | None = None
        """Why there is no pod yet, as far as the cluster said so."""
        self._ended = False

    async def feed(self, bundle: Bundle) -> None:
        """Hand the bundle in: its ConfigMaps, some at a time. The pod waits for them.

        Raises:
            ClocheError: they cannot be made.
        """
        data = b"".join(bundle.records())
        bodies = list(await to_thread.run_sync(self._maps, data) if len(data) > 2**16 else self._maps(data))
        if len(data) > len(bodies) * manifest.CHUNK_BYTES:
            raise WorkspaceTooLarge(f"The bundle has {len(data)} bytes, and the box was made for fewer.")
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

    async def _create_map(self, body: Mapping[str, Any]) -> None:
        """Where a quota forbids one more, others may go: the run waits until its start is overdue."""
        for pause in (*QUOTA_PAUSES_S, *[QUOTA_PAUSES_S[-1]] * 1000):
            try:
                await self._client.create_config_map(body)
            except Refused as exc:
                error = diagnose.refusal(exc, "make a ConfigMap")
                if error.code != "quota-exceeded":
                    raise error from exc
                self._held = Fate(FateKind.QUOTA, exc.message)
            except HttpFailure as exc:
                raise diagnose.unreachable(exc, "make a ConfigMap") from exc
            else:
                return
            await anyio.sleep(pause)

    async def output(self) -> AsyncGenerator[bytes, None]:
        """The log, from its first byte on, up to its end.

        Raises:
            EngineLost: the log cannot be read now, or it ended and the pod has not; it can be asked again.
            ClocheError: the cluster says that the box cannot start.
        """
        self._ended = False
        step = 0
        while (pod := await self._pod_with_log()) is not None:
            try:
                async with self._client.log(pod.name) as stream:
                    refused = await _refusal(stream) if stream.status != 200 else None
                    if refused is None:
                        async for chunk in _until_lost(stream):
                            yield chunk
            except HttpFailure as exc:
                raise EngineLost(f"The connection to the API server was lost: {exc}.", retryable=True) from exc
            if refused is None:
                await self._has_ended(pod, "it ended")
                break
            if refused.code != 400:
                # The server cannot reach the node, a node's kubelet has just begun, or the server itself, which then knows
                # neither pods nor our rights. That they were there, the probe has seen.
                await self._has_ended(pod, str(refused))
                break
            if self._follower.pod is not None and self._follower.pod.over:
                break
            await self._follower.news(LOG_STEPS_S[min(step, len(LOG_STEPS_S) - 1)])
            step += 1
        self._ended = True

    async def _has_ended(self, pod: Pod, why: str) -> None:
        """Wait a moment for the cluster to say that a pod without a log has ended too.

        Raises:
            EngineLost: it does not say so.
        """
        with anyio.move_on_after(NO_LOG_S):
            while not (self._follower.pod or pod).over:
                await self._follower.news(NO_LOG_S)
        if not (self._follower.pod or pod).over:
            raise EngineLost(f"The pod {pod.name} still runs, and its log cannot be read: {why}.", retryable=True)

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
                if pod.deleted:
                    return None
                # The condition is there from 1.29 on; a container that is past "waiting" says the same.
                if pod.sandbox_ready or pod.container in {"running", "terminated"}:
                    return pod
                if pod.over:
                    return None
            if await self._follower.news(UNSURE_S[min(looks, len(UNSURE_S) - 1)]):
                continue
            looks += 1
            await self._look_closer()
            if pod is not None and pod.scheduled and looks < len(UNSURE_S):
                await self._mend()

    async def _look_closer(self) -> None:
        """There were no news for a while: is there a pod at all, and if not, why?

        Raises:
            ClocheError: the cluster refuses to make one.
        """
        try:
            await self._pods.look(self._run_id, names.LABEL_RUN)
            if self._follower.pod is None:
                fate = diagnose.job_fate(await self._client.events(self._job_uid))
                if fate is not None and fate.kind is not FateKind.QUOTA:
                    raise diagnose.as_error(fate)
                self._held = fate or self._held
        except (Refused, HttpFailure) as exc:
            _log.debug("nothing can be found out about the pod of %s: %s", self._job, exc)

    async def stop(self) -> None:
        """Have the pod deleted: its supervisor gets SIGTERM, and reports the run as cancelled."""
        await self._client.delete_job(self._job)

    async def fate(self) -> Fate:
        """The cluster's word."""
        if self._ended:
            with anyio.move_on_after(END_S):
                while self._follower.pod is not None and not self._follower.pod.over:
                    await self._follower.news(END_S)
        try:
            await self._pods.look(self._run_id, names.LABEL_RUN)
            if self._follower.pod is None:
                return await self._without_pod()
            pod = self._follower.pod
            if not pod.deleted and await self._client.pod(pod.name) is None:
                return Fate(FateKind.DELETED, f"The pod {pod.name} was deleted.")
        except HttpFailure as exc:
            return Fate(FateKind.LOST, f"The API server cannot be reached: {exc}.")
        except Refused as exc:
            return Fate(FateKind.LOST, f"The API server cannot tell: {exc.message}.")
        return diagnose.pod_fate(pod)

    async def _without_pod(self) -> Fate:
        said = diagnose.job_fate(await self._client.events(self._job_uid)) or self._held
        return said or Fate(FateKind.LOST, f"The cluster has made no pod for the Job {self._job}.")


async def _refusal(stream: Stream) -> Refused:
    body = await stream.read(_ERROR_BYTES)
    try:
        return Refused(facts.parse_status(stream.status, parse_json(body)))
    except ValueError:
        return Refused(facts.Status(stream.status, message=facts.shortened(body.decode("utf-8", "replace"))))


async def _until_lost(stream: Stream) -> AsyncGenerator[bytes, None]:
    """The log; nothing where the kubelet says in its place that it has none any more (status 200, and a line of its own).

    What a box writes begins with a frame: nobody but its supervisor can write there.
    """
    begun = b""
    async for chunk in stream.chunks():
        if len(begun) < len(_FRAME):
            begun = (begun + chunk)[: len(_FRAME)]
            if not _FRAME.startswith(begun):
                _log.debug("instead of a log: %s", chunk[:200])
                return
        yield chunk
