"""The kubernetes backend: joins credentials, client, watch, the supervisor's ConfigMap, probe and boxes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from anyio import to_thread

from cloche._kit.http import HttpFailure
from cloche.backends.claims import Keeper
from cloche.backends.contract import Box, Capabilities, Leftover, Profile
from cloche.backends.kubernetes import diagnose, kubeconfig, leftovers, manifest, names, probe
from cloche.backends.kubernetes.box import KubernetesBox
from cloche.backends.kubernetes.client import KubernetesClient, Refused
from cloche.backends.kubernetes.manifest import Ground, Made
from cloche.backends.kubernetes.watch import Pods
from cloche.errors import BackendUnavailable, ClocheError, EngineLost, QuotaExceeded
from cloche.isolation import Isolation, Posture
from cloche.settings import Settings
from cloche.supervisor.binary import machine_name, supervisor_path

CREATE_S = 30.0
"""Making a Job is not interrupted: the API server would finish it after we have looked for what to remove."""
REMOVE_S, REMOVE_PAUSE_S = 25.0, 1.0
QUOTA_PAUSES_S = (0.2, 0.5, 1.0, 2.0)
QUOTA_RESERVE_S = 1.0
"""Who waits for a quota says so this long before the start is overdue."""
MAX_BUNDLE_BYTES = 48 * 2**20
MAX_INNER_UID = 65535
"""Of a pod's own user namespace (kubernetes.io, "User Namespaces")."""
INNER_UIDS = (1000, 65533)
"""Where the range of the settings does not fit into it."""

_log = logging.getLogger("cloche.kubernetes")


@dataclass(frozen=True, slots=True)
class _Setup:
    """What the probe found out."""

    client: KubernetesClient
    pods: Pods
    ground: Ground
    supervisor: Mapping[str, Any]
    """The body of its ConfigMap."""
    posture: Posture


class KubernetesBackend:
    """A Job per run in the namespace that the settings name. ``owner`` names this process instance."""

    def __init__(self, settings: Settings, owner: str) -> None:
        self._settings = settings
        self._keeper = Keeper(owner, "")
        self._client: KubernetesClient | None = None
        self._setup: _Setup | None = None
        self._there = False
        """Whether the supervisor's ConfigMap is known to be in the namespace."""
        self._making = anyio.Lock()

    def capabilities(self) -> Capabilities:
        """A pod's log can be read again from its beginning for as long as the pod is there."""
        return Capabilities(mode="kubernetes", replayable=True, max_bundle_bytes=MAX_BUNDLE_BYTES)

    async def probe(self) -> Posture:
        """Find the credentials, and ask the API server what they may do. Once."""
        if self._setup is None:
            try:
                self._setup = await self._set_up()
            except ClocheError as exc:
                return Posture(
                    "kubernetes", available=False, isolation=Isolation.NONE, reason=exc.message, hint=exc.hint
                )
        return self._setup.posture

    async def _set_up(self) -> _Setup:
        """Raises: ClocheError."""
        settings = self._settings
        access = await to_thread.run_sync(kubeconfig.find, settings)
        client = self._client = KubernetesClient(access, settings.kube_namespace)
        version = await probe.look(client, access, settings.kube_namespace)
        machine = machine_name(settings.kube_arch)
        program = await to_thread.run_sync(_program, machine)
        supervisor = manifest.supervisor_map(_supervisor_name(program), program)
        self._keeper.note = leftovers.note(access.base, settings.kube_namespace)
        await self._keeper.begin()
        ground = Ground(
            namespace=settings.kube_namespace,
            supervisor=supervisor["metadata"]["name"],
            machine=machine,
            service_account=settings.kube_service_account,
            place=self._keeper.place,
            pull_policy={"missing": "IfNotPresent", "always": "Always", "never": "Never"}[settings.pull],
            cpu_request=settings.kube_cpu_request,
            memory_request=settings.kube_memory_request,
            host_users=settings.kube_host_users,
            runtime_class=settings.kube_runtime_class,
            priority_class=settings.kube_priority_class,
            node_selector=settings.kube_node_selector,
            tolerations=[t.model_dump(exclude_none=True) for t in settings.kube_tolerations],
            image_pull_secrets=settings.kube_image_pull_secrets,
            labels=settings.kube_labels,
            annotations=settings.kube_annotations,
        )
        engine = f"Kubernetes {version}".rstrip()
        if settings.kube_runtime_class:
            engine += f", runtime class {settings.kube_runtime_class}"
        posture = Posture(
            "kubernetes",
            available=True,
            isolation=Isolation.CONTAINER,
            engine=engine,
            guarantees=probe.guarantees(settings),
        )
        pods = Pods(client, f"{names.LABEL_OWNER}={self._keeper.owner}")
        return _Setup(client, pods, ground, supervisor, posture)

    async def tend(self) -> None:
        """Have the supervisor in the namespace, then watch the pods for as long as the sandbox is open.

        Raises:
            ClocheError: the supervisor cannot be put there. The first run will say so too.
        """
        if self._setup is None:
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._setup.pods.watch)
            with contextlib.suppress(ClocheError):
                await self._have_supervisor(self._setup)

    async def _have_supervisor(self, setup: _Setup, *, doubt: bool = False) -> None:
        """Have the supervisor's ConfigMap in the namespace, with the right content.

        Raises:
            ClocheError: it cannot be had there.
        """
        async with self._making:
            if self._there and not doubt:
                return
            name = setup.ground.supervisor
            try:
                await setup.client.create_config_map(setup.supervisor)
            except Refused as exc:
                if exc.code == 409:
                    raise BackendUnavailable(
                        f"The ConfigMap {name} of the namespace {setup.ground.namespace} does not hold what it should.",
                        hint=f"Find out who changed it, then delete it: kubectl delete configmap {name}.",
                    ) from exc
                raise diagnose.refusal(exc, "make a ConfigMap") from exc
            except HttpFailure as exc:
                raise diagnose.unreachable(exc, "make a ConfigMap") from exc
            self._there = True

    @contextlib.asynccontextmanager
    async def open(self, profile: Profile) -> AsyncIterator[Box]:
        """Make a Job. Its pod waits for the bundle.

        Raises (on entering):
            ClocheError: the cluster does not take it.
        """
        posture = await self.probe()
        if self._setup is None:
            raise BackendUnavailable(posture.reason, hint=posture.hint)
        setup, client = self._setup, self._setup.client
        await self._have_supervisor(setup)
        made = self._made(profile, client.server_time())
        with setup.pods.follow(profile.run_id) as follower:
            try:
                uid = await self._make_job(client, manifest.job(profile, setup.ground, made))
            except BaseException:
                await self._remove_failed(client, made.name)
                raise

            def maps(data: bytes) -> Iterable[Mapping[str, Any]]:
                return manifest.bundle_maps(profile, setup.ground, made, uid, data)

            mend = partial(self._have_supervisor, setup, doubt=True)
            try:
                yield KubernetesBox(client, setup.pods, follower, (profile.run_id, made.name, uid), maps, mend)
            finally:
                await self._remove(client, made.name)

    def _made(self, profile: Profile, now: float) -> Made:
        uid = random.SystemRandom().randint(*_uids(self._settings))
        offset_s = now - time.time()
        expires = profile.expires_at + offset_s
        return Made(f"cloche-{profile.run_id}-{secrets.token_hex(4)}", uid, expires, expires - now)

    async def _make_job(self, client: KubernetesClient, body: Mapping[str, Any]) -> str:
        """The Job's uid. Where a quota forbids one more Job, others may go: it is tried until the start is overdue.

        Raises:
            ClocheError: it cannot be made.
        """
        until = anyio.current_time() + max(0.0, self._settings.start_timeout - QUOTA_RESERVE_S)
        tries = 0
        while True:
            try:
                with anyio.fail_after(CREATE_S, shield=True):
                    return await client.create_job(body)
            except Refused as exc:
                error = diagnose.refusal(exc, "make a Job")
                pause = QUOTA_PAUSES_S[min(tries, len(QUOTA_PAUSES_S) - 1)]
                if not isinstance(error, QuotaExceeded) or anyio.current_time() + pause > until:
                    raise error from exc
            except HttpFailure as exc:
                raise diagnose.unreachable(exc, "make a Job") from exc
            except TimeoutError:
                raise BackendUnavailable(
                    f"The API server made no Job within {CREATE_S:g} s.", hint="Look at its load.", retryable=True
                ) from None
            tries += 1
            await anyio.sleep(pause)

    async def _remove_failed(self, client: KubernetesClient, name: str) -> None:
        """Remove what may have been made. What went wrong before is what is to be told, not that this fails too."""
        try:
            await self._remove(client, name)
        except EngineLost as exc:
            _log.warning("%s It is left to sweep.", exc.message)

    async def _remove(self, client: KubernetesClient, name: str) -> None:
        """Delete a Job, whatever comes in between. Its pod and its ConfigMaps the cluster then removes by itself.

        Raises:
            EngineLost: it could not be deleted, and is left to its own deadline, and to sweep.
        """
        try:
            with anyio.fail_after(REMOVE_S, shield=True):
                while not await self._ask_to_delete(client, name):  # noqa: ASYNC110 - an API server that is away tells nobody
                    await anyio.sleep(REMOVE_PAUSE_S)
        except (Refused, ClocheError, TimeoutError) as exc:
            self._keeper.left = True
            why = "it took too long" if isinstance(exc, TimeoutError) else str(exc)
            raise EngineLost(f"The Job {name} could not be deleted: {why}.") from exc

    @staticmethod
    async def _ask_to_delete(client: KubernetesClient, name: str) -> bool:
        """False: the API server did not answer."""
        try:
            await client.delete_job(name)
        except HttpFailure as exc:
            _log.debug("the Job %s is not deleted yet: %s", name, exc)
            return False
        return True

    async def sweep(self) -> Sequence[Leftover]:
        """Remove what has expired by the API server's clock, of any process, and what belongs to a dead one of this machine.

        Raises:
            BackendUnavailable: the API server cannot be asked.
        """
        if self._setup is None:
            return ()
        try:
            return await leftovers.sweep(self._setup.client, self._keeper)
        except Refused as exc:
            raise diagnose.refusal(exc, "look for leftovers") from exc
        except HttpFailure as exc:
            raise diagnose.unreachable(exc, "look for leftovers") from exc

    async def aclose(self) -> None:
        """Close the connections, and give up the owner's lock."""
        self._setup = None
        try:
            if self._client is not None:
                await self._client.aclose()
                self._client = None
        finally:
            self._keeper.close()


def _uids(settings: Settings) -> tuple[int, int]:
    """The first and the last uid that a box may get. In a user namespace of its own there are few."""
    first, last = settings.kube_run_as_user
    return (first, last) if settings.kube_host_users or last <= MAX_INNER_UID else INNER_UIDS


def _program(machine: str) -> bytes:
    """Raises: BackendUnavailable."""
    program = supervisor_path(machine).read_bytes()
    if len(program) > manifest.MAX_CONFIG_MAP_BYTES:
        raise BackendUnavailable(
            f"The supervisor of this installation has {len(program)} bytes, and a ConfigMap holds"
            f" {manifest.MAX_CONFIG_MAP_BYTES}.",
            hint="Install the published wheel, whose supervisor is smaller.",
        )
    return program


def _supervisor_name(program: bytes) -> str:
    return f"cloche-supervisor-{hashlib.sha256(program).hexdigest()[:16]}"
