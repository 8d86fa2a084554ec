"""The docker backend: joins address, client, images, the supervisor's volume, probe and boxes."""

from __future__ import annotations

import contextlib
import logging
import platform
import secrets
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import anyio
from anyio import to_thread

from cloche._kit.http import ConnectFailure, ConnectionLost, HttpFailure
from cloche.backends import shape
from cloche.backends.claims import Keeper
from cloche.backends.contract import Box, Capabilities, Examination, Leftover, Profile
from cloche.backends.docker import address, examine, leftovers, manifest, probe, trial
from cloche.backends.docker.address import Address
from cloche.backends.docker.box import DockerBox
from cloche.backends.docker.client import DockerClient, Refused
from cloche.backends.docker.facts import PODMAN
from cloche.backends.docker.manifest import Ground
from cloche.backends.docker.probe import Daemon
from cloche.backends.docker.store import Images
from cloche.backends.docker.volume import SupervisorVolume
from cloche.errors import BackendUnavailable, ClocheError, EngineLost, ImageUnavailable
from cloche.isolation import Check, Isolation, Posture, Verdict
from cloche.settings import Settings
from cloche.supervisor.binary import supervisor_path

CREATE_S = 60.0
"""Making a container is not interrupted: the daemon would finish it after we have looked for what to remove."""
REMOVE_S = 25.0
REMOVE_POLL_S = 0.02
END_BY_ITSELF_S = 0.3
REMOVE_AGAIN_S = (0.05, 0.1, 0.2, 0.5, 1.0)

log = logging.getLogger("cloche.docker")


@dataclass(frozen=True, slots=True)
class _Setup:
    """What the probe found out: how boxes are made on this daemon."""

    daemon: Daemon
    ground: Ground
    images: Images
    volume: SupervisorVolume
    posture: Posture
    where: Address
    tried: bool = True
    """Whether it is known if the runtime has a kernel of its own."""


class DockerBackend:
    """A container per run on the daemon that the settings name. ``owner`` names this process instance."""

    def __init__(self, settings: Settings, owner: str) -> None:
        self._settings = settings
        self._keeper = Keeper(owner, "")
        self._client: DockerClient | None = None
        self._setup: _Setup | None = None
        self._trial = anyio.Lock()

    def capabilities(self) -> Capabilities:
        """A box's output cannot be read twice: nothing keeps it."""
        return Capabilities(mode="docker")

    async def probe(self) -> Posture:
        """Ask the daemon what it offers; where its runtime may have a kernel of its own, make one box to see. Once."""
        if self._setup is None:
            try:
                await self._set_up()
            except ClocheError as exc:
                return Posture("docker", available=False, isolation=Isolation.NONE, reason=exc.message, hint=exc.hint)
        assert self._setup is not None
        return self._setup.posture

    async def tend(self) -> None:
        """Have the image and the supervisor on the daemon, before a run has to wait for them.

        Raises:
            ClocheError: they cannot be had. The first run will say so too.
        """
        if self._setup is not None:
            with _translated("prepared"):
                image = await self._setup.images.ensure(self._settings.image)
                await self._setup.volume.ensure(self._setup.ground, image.id)

    async def _set_up(self) -> None:
        """Raises: ClocheError."""
        found = await to_thread.run_sync(address.find, self._settings)
        self._keeper.note = leftovers.note(found.text)
        client = self._client = DockerClient(found.server)
        daemon = await probe.look(client, found)
        program = await to_thread.run_sync(supervisor_path, daemon.version.arch)
        volume = await to_thread.run_sync(SupervisorVolume, client, program)
        config = await to_thread.run_sync(address.config_folder, self._settings)
        images = Images(client, config, pull=self._settings.pull, arch=_image_arch(daemon.version.arch))
        await self._keeper.begin()
        ground = Ground(
            volume=volume.name,
            place=self._keeper.place,
            runtime=self._settings.docker_runtime,
            cpus=daemon.info.cpus,
            memory_limit=daemon.info.memory_limit,
            podman=daemon.version.product == PODMAN,
        )
        posture = Posture(
            "docker",
            available=True,
            isolation=Isolation.CONTAINER,
            engine=_engine(daemon, self._settings.docker_runtime),
            guarantees=probe.guarantees(daemon, None, guest=False),
        )
        setup = _Setup(daemon, ground, images, volume, posture, found)
        runtime = probe.runtime_in_force(self._settings.docker_runtime, daemon.info)
        self._setup = replace(setup, tried=runtime in probe.PLAIN_RUNTIMES)
        try:
            await self._tried(self._settings.image)
        except ImageUnavailable as exc:
            # No reason to be unavailable: a run may have another image. The first one tries the runtime with its own.
            self._setup = replace(
                self._setup, posture=replace(posture, reason=f"its runtime was not tried: {exc.message}")
            )
        except ClocheError:
            self._setup = None
            raise

    async def _tried(self, image: str) -> _Setup:
        """The set-up, with its runtime tried in a box of this image if it was not before.

        Raises:
            ImageUnavailable: it cannot be had.
            ClocheError: no box can be made with the runtime.
        """
        assert self._setup is not None
        async with self._trial:
            if not self._setup.tried:
                self._setup = await self._try_runtime(self._setup, image)
            return self._setup

    async def _try_runtime(self, setup: _Setup, image: str) -> _Setup:
        """Make one box, and see which kernel it has.

        Raises:
            ClocheError: no box can be made with it.
        """
        # As for a kernel of its own, until it is known: the bounds of the other kind could keep it from starting.
        ground = replace(setup.ground, guest_kernel=True)
        profile = trial.profile(self._keeper.owner, image, self._settings.start_timeout)
        with anyio.move_on_after(self._settings.start_timeout) as waiting:
            async with self._box(replace(setup, ground=ground), profile) as box:
                shown = await trial.run(box, profile)
        if waiting.cancelled_caught:
            raise BackendUnavailable(f"A trial box was not ready within {self._settings.start_timeout:g} s.")
        host = setup.daemon.version.kernel
        guest = bool(shown.kernel and host) and shown.kernel != host
        log.info("the runtime's kernel is %r, the engine's host has %r", shown.kernel, host)
        posture = replace(
            setup.posture,
            isolation=Isolation.KERNEL if guest else Isolation.CONTAINER,
            engine=f"{setup.posture.engine}, {'guest ' if guest else ''}kernel {shown.kernel or 'unknown'}",
            guarantees=probe.guarantees(setup.daemon, shown.hardening, guest=guest),
        )
        return replace(setup, ground=replace(ground, guest_kernel=guest), posture=posture, tried=True)

    @contextlib.asynccontextmanager
    async def open(self, profile: Profile) -> AsyncIterator[Box]:
        """Make a container and start its supervisor.

        Raises (on entering):
            BackendUnavailable: no container can be made.
            ImageUnavailable: the daemon cannot have the image.
        """
        posture = await self.probe()
        if self._setup is None:
            raise BackendUnavailable(posture.reason, hint=posture.hint)
        setup = await self._tried(profile.image or self._settings.image)
        async with self._box(setup, profile) as box:
            yield box

    @contextlib.asynccontextmanager
    async def _box(self, setup: _Setup, profile: Profile) -> AsyncIterator[DockerBox]:
        async with AsyncExitStack() as stack:
            with _translated("made"):
                box = await self._start_box(setup, profile, stack)
            yield box

    async def _start_box(self, setup: _Setup, profile: Profile, stack: AsyncExitStack) -> DockerBox:
        """A started container whose removal is on the stack. What was removed since we looked is looked for once more."""
        wanted = profile.image or self._settings.image
        try:
            return await self._attempt(setup, profile, stack)
        except Refused as exc:
            if exc.status == 404 and "image" in exc.message.lower():
                setup.images.forget(wanted)
            elif shape.SUPERVISOR in exc.message:
                log.info("the supervisor is not in its volume any more: %s", exc.message)
                setup.volume.doubt()
            else:
                raise
        return await self._attempt(setup, profile, stack)

    async def _attempt(self, setup: _Setup, profile: Profile, stack: AsyncExitStack) -> DockerBox:
        """Raises: Refused, HttpFailure, ClocheError; with nothing left behind."""
        assert self._client is not None
        image = await setup.images.ensure(profile.image or self._settings.image)
        await setup.volume.ensure(setup.ground, image.id)
        # By the daemon's clock, asked each time: either of the two may have been set since.
        expires = profile.expires_at + await self._client.clock_offset_s()
        labels = manifest.labels(profile, setup.ground, expires)
        name = f"cloche-{profile.run_id}-{secrets.token_hex(4)}"
        body = manifest.container(profile, setup.ground, image, labels)
        try:
            await self._create(name, body)
        except ConnectFailure:
            raise  # nothing was made
        except BaseException:
            await self._remove_failed(name)
            raise
        async with AsyncExitStack() as attempt:
            try:
                connection = await attempt.enter_async_context(self._client.attach(name))
                await self._client.start(name)
                if (pids := manifest.start_pids(profile, setup.ground)) is not None:
                    await self._client.update(name, {"PidsLimit": pids})
            except BaseException:
                await self._remove_failed(name)
                raise
            # Closed before the removal: a box whose client is gone ends itself.
            stack.push_async_callback(self._remove, name)
            stack.push_async_exit(attempt.pop_all())
        return DockerBox(self._client, name, connection, setup.volume.doubt, guest=setup.ground.guest_kernel)

    async def _remove_failed(self, name: str) -> None:
        """Remove what may have been made. What went wrong before is what is to be told, not that this fails too."""
        try:
            await self._remove(name)
        except EngineLost as exc:
            log.warning("%s It is left to sweep.", exc.message)

    async def _create(self, name: str, body: Mapping[str, Any]) -> None:
        assert self._client is not None
        try:
            with anyio.fail_after(CREATE_S, shield=True):
                await self._client.create(name, body)
        except TimeoutError:
            raise BackendUnavailable(
                f"The Docker daemon made no container within {CREATE_S:g} s.",
                hint="Look at its log and at the load of its host.",
                retryable=True,
            ) from None

    async def _remove(self, name: str) -> None:
        """Kill and remove a container, whatever comes in between.

        Raises:
            EngineLost: it could not be removed, and is left to sweep.
        """
        assert self._client is not None
        try:
            with anyio.fail_after(REMOVE_S, shield=True):
                await self._await_end(name)
                while not await self._ask_to_remove(name):  # noqa: ASYNC110 - somebody else removes it, and tells nobody
                    await anyio.sleep(REMOVE_POLL_S)
        except (HttpFailure, Refused, TimeoutError) as exc:
            self._keeper.left = True
            raise EngineLost(f"The container {name} could not be removed: {_why(exc)}.") from exc

    async def _await_end(self, name: str) -> None:
        """Leave a container a moment to end by itself: the daemon removes one that has ended sooner than it kills one that is
        just ending (moby 29: 29 to 33 against 36 to 40 ms in all, p50).
        """
        assert self._client is not None
        with anyio.move_on_after(END_BY_ITSELF_S), contextlib.suppress(HttpFailure, Refused):
            await self._client.wait(name)

    async def _ask_to_remove(self, name: str) -> bool:
        """Removing can be asked for again: whatever came of the first request, the second one says what is so now."""
        assert self._client is not None
        for pause in REMOVE_AGAIN_S:
            try:
                return await self._client.remove(name)
            except (ConnectionLost, Refused) as exc:
                # Podman answers 500 when a container ends just while it is to be ended.
                log.debug("%s is not removed yet: %s", name, exc)
                await anyio.sleep(pause)
        return await self._client.remove(name)

    async def sweep(self, *, dry_run: bool = False) -> Sequence[Leftover]:
        """Remove what has expired by the daemon's clock, and what belongs to a dead process of this machine.

        Raises:
            BackendUnavailable: the daemon cannot be asked.
        """
        if self._client is None or self._setup is None:
            return ()
        try:
            return await leftovers.sweep(self._client, self._keeper, dry_run=dry_run)
        except (Refused, HttpFailure) as exc:
            raise BackendUnavailable(f"The Docker daemon could not be asked for leftovers: {exc}.") from exc

    async def examine(self) -> Examination:
        """The daemon, its runtime, its limits, the image."""
        posture = await self.probe()
        setup = self._setup
        if setup is None:
            return Examination((Check("daemon", Verdict.NOT_OK, posture.reason, posture.hint),))
        version = setup.daemon.version
        checks = examine.daemon(setup.daemon, setup.where.text, self._settings.docker_runtime)
        return Examination(
            (*checks, await examine.image(setup.images, self._settings.image)),
            # A socket may lead into a virtual machine, which then has another kernel than this one.
            here=setup.where.server.socket is not None and version.kernel == platform.release(),
            kernel=version.kernel,
            machine=version.arch or None,
        )

    async def remains(self, run_ids: Collection[str]) -> Sequence[str] | None:
        """Containers that bear their labels."""
        if self._client is None:
            return None
        try:
            return [name for run_id in run_ids for name in await examine.remains(self._client, run_id)]
        except (Refused, HttpFailure) as exc:
            log.info("the daemon does not tell what is left: %s", exc)
            return None

    async def aclose(self) -> None:
        """Close the connections, and give up the owner's lock."""
        self._setup = None
        try:
            if self._client is not None:
                await self._client.aclose()
                self._client = None
        finally:
            self._keeper.close()


def _why(exc: Exception) -> str:
    return "it took too long" if isinstance(exc, TimeoutError) else str(exc)


def _image_arch(machine: str) -> str:
    """An architecture as images name it (Go's names), which daemons mostly use too."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _engine(daemon: Daemon, runtime: str | None) -> str:
    name = daemon.version.name
    return f"{name}, runtime {runtime}" if runtime else name


@contextlib.contextmanager
def _translated(done: str) -> Iterator[None]:
    """The client's two kinds of error become cloche's: by then nothing of the script has run."""
    try:
        yield
    except Refused as exc:
        raise _refused(exc, done) from exc
    except HttpFailure as exc:
        raise BackendUnavailable(
            f"The Docker daemon was lost while a container was being {done}: {exc}.",
            hint="Look at the daemon's log, then try again.",
            retryable=True,
        ) from exc


_ABOUT_TO_END = ("context canceled", "client connection is closing", "connection refused", "error reading from server")
"""What a daemon says that is being ended, or whose containerd is (seen with Docker 29): another one will do what it did not."""


def _refused(exc: Refused, done: str) -> ClocheError:
    message, words = exc.message.rstrip("."), exc.message.lower()
    if "runtime" in words and ("unknown" in words or "invalid" in words) and "oci" not in words:
        return BackendUnavailable(
            f"The Docker daemon does not have the runtime: {message}.",
            hint="Set CLOCHE_DOCKER_RUNTIME to one that `docker info` lists, or add it to the daemon's configuration.",
        )
    if exc.status == 404 and "image" in message.lower():
        return ImageUnavailable(f"The image was removed from the daemon: {message}.", retryable=True)
    return BackendUnavailable(
        f"The Docker daemon refused: no container was {done}: {message}.",
        hint="Look at the daemon's log.",
        retryable=exc.status >= 500 and any(word in words for word in _ABOUT_TO_END),
    )
