"""The kubernetes backend: joins credentials, client, watch, the supervisor's ConfigMap, probe and boxes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from anyio import to_thread

from cloche._kit.http import HttpFailure
from cloche._kit.steps import step
from cloche.backends.claims import Keeper
from cloche.backends.contract import Box, Capabilities, Examination, Leftover, Profile
from cloche.backends.kubernetes import diagnose, examine, kubeconfig, leftovers, manifest, names, probe
from cloche.backends.kubernetes.box import JobName, KubernetesBox
from cloche.backends.kubernetes.client import BUSY, KubernetesClient, OtherContent, Refused
from cloche.backends.kubernetes.kubeconfig import Access
from cloche.backends.kubernetes.manifest import Ground, Made
from cloche.backends.kubernetes.watch import Pods
from cloche.errors import BackendUnavailable, ClocheError, EngineLost, QuotaExceeded
from cloche.isolation import Check, Isolation, Posture, Verdict
from cloche.settings import Settings
from cloche.supervisor.binary import machine_name, supervisor_path

CREATE_S = 30.0
"""Making a Job is not interrupted: the API server would finish it after we have looked for what to remove."""
REMOVE_S, REMOVE_FAILED_S, REMOVE_PAUSE_S = 25.0, 5.0, 1.0
"""For a Job, and for one that may not have been made; a server that has just begun knows nobody's rights for a moment."""
STOP_S = 5.0
"""From deleting a Job to its container's SIGTERM: the garbage collector, the kubelet and the runtime come in between."""
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
    access: Access
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
        return Capabilities(mode="kubernetes", replayable=True, stop_s=STOP_S, max_bundle_bytes=MAX_BUNDLE_BYTES)

    async def probe(self) -> Posture:
        """Find the credentials, and ask the API server what they may do. Once."""
        if self._setup is None:
            try:
                self._setup = await self._set_up()
            except ClocheError as exc:
                await self._let_go()
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
        return _Setup(client, access, pods, ground, supervisor, posture)

    async def tend(self) -> None:
        """Have the supervisor in the namespace, then watch the pods for as long as the sandbox is open."""
        if self._setup is None:
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._setup.pods.watch)
            try:
                await self._have_supervisor(self._setup)
            except ClocheError as exc:
                _log.info("%s", exc.message)

    async def _have_supervisor(self, setup: _Setup) -> None:
        """Have the supervisor's ConfigMap in the namespace, with the right content.

        Raises:
            ClocheError: it cannot be had there.
        """
        async with self._making:
            if not self._there:
                await self._put_supervisor(setup, content=True)
                self._there = True

    async def _mend(self, setup: _Setup) -> None:
        """Put the supervisor back, if somebody deleted it under us.

        Raises:
            ClocheError: it cannot be had there.
        """
        async with self._making:
            if await self._put_supervisor(setup, content=False):
                _log.warning("the ConfigMap %s was deleted; it was made again", setup.ground.supervisor)

    @staticmethod
    async def _put_supervisor(setup: _Setup, *, content: bool) -> bool:
        """Whether it had to be made. Mostly it is there, and a quota that leaves no room for another one is no reason to do
        without it.
        """
        with _translated("make a ConfigMap", setup):
            if await setup.client.has_config_map(setup.supervisor, content=content):
                return False
            await setup.client.create_config_map(setup.supervisor)
            return True

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
        body = manifest.job(profile, setup.ground, made)
        with setup.pods.follow(made.name) as follower:
            uid = await self._make_job(client, body)
            follower.belongs_to(uid)
            maps = partial(manifest.bundle_maps, profile, setup.ground, made, uid)
            mend = partial(self._mend, setup)
            try:
                yield KubernetesBox(client, setup.pods, follower, JobName(made.name, uid), maps, mend)
            finally:
                await self._remove(client, made.name, REMOVE_S)

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
                return await self._create(client, body)
            except Refused as exc:
                error = diagnose.refusal(exc, "make a Job")
                pause = step(QUOTA_PAUSES_S, tries)
                if not isinstance(error, QuotaExceeded):
                    raise error from exc
                if anyio.current_time() + pause > until:
                    # A first try whose answer was lost may have taken the last place.
                    await self._remove_failed(client, body["metadata"]["name"])
                    raise error from exc
            tries += 1
            await anyio.sleep(pause)

    async def _create(self, client: KubernetesClient, body: Mapping[str, Any]) -> str:
        """One try, with nothing left behind where it fails.

        Raises:
            Refused: nothing was made.
            BackendUnavailable: the API server cannot be spoken to.
        """
        try:
            with anyio.fail_after(CREATE_S, shield=True):
                return await client.create_job(body)
        except Refused:
            raise
        except BaseException as exc:
            await self._remove_failed(client, body["metadata"]["name"])
            if isinstance(exc, HttpFailure):
                raise diagnose.unreachable(exc, "make a Job") from exc
            if isinstance(exc, TimeoutError):
                raise BackendUnavailable(
                    f"The API server made no Job within {CREATE_S:g} s.", hint="Look at its load.", retryable=True
                ) from None
            raise

    async def _remove_failed(self, client: KubernetesClient, name: str) -> None:
        """Remove what may have been made. What went wrong before is what is to be told, not that this fails too."""
        try:
            await self._remove(client, name, REMOVE_FAILED_S)
        except EngineLost as exc:
            _log.warning("%s It is left to sweep.", exc.message)

    async def _remove(self, client: KubernetesClient, name: str, within_s: float) -> None:
        """Delete a Job, whatever comes in between. Its pod and its ConfigMaps the cluster then removes by itself.

        Raises:
            EngineLost: it could not be deleted, and is left to its own deadline, and to sweep.
        """
        problem: Exception | None = None
        with anyio.move_on_after(within_s, shield=True):
            while True:
                try:
                    await client.delete_job(name)
                except Refused as exc:
                    problem = exc
                    if exc.code not in {401, 403, 409, *BUSY}:
                        break
                except (HttpFailure, ClocheError) as exc:
                    problem = exc
                else:
                    return
                await anyio.sleep(REMOVE_PAUSE_S)
        self._keeper.left = True
        raise EngineLost(f"The Job {name} could not be deleted: {problem or 'it took too long'}.") from problem

    async def sweep(self, *, dry_run: bool = False) -> Sequence[Leftover]:
        """Remove what has expired by the API server's clock, of any process, and what belongs to a dead one of this machine.

        Raises:
            BackendUnavailable: the API server cannot be asked.
        """
        if self._setup is None:
            return ()
        with _translated("look for leftovers", self._setup):
            return await leftovers.sweep(self._setup.client, self._keeper, dry_run=dry_run)

    async def examine(self) -> Examination:
        """The API server, the rights in the namespace: those that are there, those that are not, those that are too many."""
        posture = await self.probe()
        setup = self._setup
        if setup is None:
            return Examination((Check("cluster", Verdict.NOT_OK, posture.reason, posture.hint),))
        reached = Check("cluster", Verdict.OK, f"{posture.engine} at {setup.access.text}")
        rights = await examine.rights(setup.client, setup.ground.namespace)
        addresses = examine.addresses(setup.access)
        return Examination((reached, *rights), machine=setup.ground.machine, addresses=addresses)

    async def remains(self, run_ids: Collection[str]) -> Sequence[str] | None:
        """Jobs, pods and ConfigMaps that bear their labels."""
        if self._setup is None:
            return None
        try:
            return await examine.remains(self._setup.client, run_ids)
        except (Refused, HttpFailure, ClocheError) as exc:
            _log.info("the cluster does not tell what is left: %s", exc)
            return None

    async def aclose(self) -> None:
        """Close the connections, and give up the owner's lock."""
        self._setup = None
        try:
            await self._let_go()
        finally:
            self._keeper.close()

    async def _let_go(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


@contextlib.contextmanager
def _translated(what: str, setup: _Setup) -> Iterator[None]:
    """The client's errors become cloche's."""
    try:
        yield
    except OtherContent as exc:
        raise BackendUnavailable(
            f"The ConfigMap {exc} of the namespace {setup.ground.namespace} does not hold what it should.",
            hint=f"Find out who changed it; an administrator then deletes it: kubectl delete configmap {exc}.",
        ) from exc
    except Refused as exc:
        raise diagnose.refusal(exc, what) from exc
    except HttpFailure as exc:
        raise diagnose.unreachable(exc, what) from exc


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
