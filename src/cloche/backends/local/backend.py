"""The local backend: joins probe, manifest, cgroups and processes."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import secrets
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path

import anyio
from anyio import to_thread

from cloche.backends import owners, shape
from cloche.backends.contract import Box, Capabilities, Examination, Fate, FateKind, Leftover, Profile
from cloche.backends.local import cgroup, client, examine, interpreters, manifest, places, probe
from cloche.backends.local.manifest import Layout
from cloche.backends.local.probe import Bubblewrap
from cloche.errors import BackendUnavailable, ClocheError
from cloche.isolation import Isolation, Posture
from cloche.settings import Settings
from cloche.spec import Limits
from cloche.supervisor.binary import supervisor_path
from cloche.supervisor.bundle import Bundle
from cloche.supervisor.frames import Decoder, End, Fail, FrameError, Hardening

log = logging.getLogger("cloche.local")

TRIAL_TIMEOUT_S = 10.0
SCOPE_POLL_S = 0.002
"""systemd takes some 10 ms for a scope."""
REMEMBERED = 32
"""Of how many of its last runs a backend can tell what is left of them."""
FIRST_UID = 0x7000_0000
UIDS = 2**24
"""Host uids for the runs of a root cloche: above every range that distributions, systemd and container engines give out
(systemd.io/UIDS-GIDS), below 2**31."""


@dataclass(frozen=True, slots=True)
class _Ground:
    """What the trial showed: how boxes are made on this machine."""

    bubblewrap: Bubblewrap
    flavour: cgroup.Flavour
    layout: Layout
    posture: Posture


@dataclass(frozen=True, slots=True)
class _Launcher:
    """A launcher's process and the cgroup that it is in."""

    process: client.BoxProcess
    group: cgroup.Cgroup

    async def close(self) -> None:
        await self.process.close()
        for folder in await to_thread.run_sync(cgroup.remove, self.group.folders):
            log.warning("the cgroup %s could not be removed; it is left to sweep", folder)


def _launcher_vector(layout: Layout, group: cgroup.Cgroup) -> list[str]:
    return manifest.launcher(layout.supervisor, group.plan, os.getpid())


class LocalBox:
    """One box: its processes and its cgroup."""

    def __init__(self, process: client.BoxProcess, group: cgroup.Cgroup) -> None:
        self._process = process
        self._group = group
        self._answered = False

    async def feed(self, bundle: Bundle) -> None:
        """Hand the bundle in through the supervisor's stdin."""
        await self._process.feed(bundle.records())

    async def output(self) -> AsyncIterator[bytes]:
        """The supervisor's stdout."""
        async for data in self._process.output():
            self._answered = True
            yield data

    async def stop(self) -> None:
        """SIGTERM to the supervisor."""
        self._process.signal_supervisor(signal.SIGTERM)

    async def fate(self, *, ended: bool) -> Fate:
        """From the cgroup's own counter and bubblewrap's end."""
        # At once, since a scope takes its counter with it when its last process is gone; and when all is over.
        kills = await to_thread.run_sync(self._group.oom_kills)
        status = None
        with anyio.move_on_after(client.GONE_TIMEOUT_S if ended else 0):
            status = await self._process.wait()
        if kills + await to_thread.run_sync(self._group.oom_kills) > 0:
            return Fate(FateKind.OOM_KILLED, "The box ran out of memory.")
        message = await self._process.message() if status is not None else ""
        if not self._answered:
            return Fate(FateKind.NOT_STARTED, message or f"bubblewrap ended with status {status}.")
        return Fate(FateKind.EXITED, message or f"The box's first process ended with status {status}.")


class LocalBackend:
    """Boxes made with bubblewrap on this machine.

    ``owner`` names this process instance. What may be used of this machine, ``bubblewraps`` and ``flavours`` of cgroups,
    is found by looking; a test may offer less.
    """

    def __init__(
        self,
        settings: Settings,
        owner: str,
        *,
        bubblewraps: Callable[[], Iterable[Bubblewrap]] = probe.candidates,
        flavours: Callable[[], Iterable[cgroup.Flavour]] | None = None,
    ) -> None:
        self._settings = settings
        self._owner_name = owner
        self._bubblewraps = bubblewraps
        self._flavours = flavours or partial(places.flavours, owner)
        self._places: tuple[cgroup.Flavour, ...] = ()
        self._owner: owners.Owner | None = None
        self._ground: _Ground | None = None
        self._preparing = False
        self._standby: _Launcher | None = None
        """One launcher that waits for the next run: starting it and entering its cgroup are then off that run's path."""
        self._interpreters: dict[str, interpreters.Interpreter] = {}
        self._removed: deque[tuple[str, tuple[Path, ...]]] = deque(maxlen=REMEMBERED)
        """The cgroups of the last boxes, by their runs."""

    def capabilities(self) -> Capabilities:
        """A box's output cannot be read twice: it is a pipe."""
        return Capabilities(mode="local")

    async def probe(self) -> Posture:
        """Make one box that runs nothing but the supervisor's own version, and report what it had. Once per backend."""
        if self._ground is None:
            try:
                await self._find_ground()
            except ClocheError as exc:
                return Posture("local", available=False, isolation=Isolation.NONE, reason=exc.message, hint=exc.hint)
            except OSError as exc:
                return Posture("local", available=False, isolation=Isolation.NONE, reason=f"{exc}.", hint=_MACHINE)
        assert self._ground is not None
        return self._ground.posture

    async def _find_ground(self) -> None:
        """Raises: BackendUnavailable."""
        if (reason := probe.platform_reason()) is not None:
            raise BackendUnavailable(reason, hint="Use the docker, kubernetes, opensandbox or remote mode.")
        supervisor = str(supervisor_path())
        found = await to_thread.run_sync(lambda: list(self._bubblewraps()))
        if not found:
            raise BackendUnavailable("There is no bubblewrap on this machine.", hint="Install the bubblewrap package.")
        problem = ""
        with anyio.CancelScope(shield=True):  # else what the threads have made would be known to nobody
            if not self._places:
                self._places = await to_thread.run_sync(lambda: tuple(self._flavours()))
            if self._owner is None:
                self._owner = await to_thread.run_sync(self._become_owner)
        for bubblewrap in found:
            for flavour in self._places:
                layout = await to_thread.run_sync(self._layout, bubblewrap, supervisor)
                try:
                    hardening = await self._trial(layout, flavour)
                except (ClocheError, OSError) as exc:
                    problem = exc.message if isinstance(exc, ClocheError) else str(exc) or type(exc).__name__
                    log.info("%s with cgroup %s: %s", bubblewrap.name, flavour.kind, problem)
                    continue
                self._ground = self._settle(bubblewrap, flavour, layout, hardening)
                return
        raise BackendUnavailable(f"No box could be made with {found[-1].name}: {problem}", hint=probe.advice())

    def _become_owner(self) -> owners.Owner:
        owner = owners.Owner(owners.state_folder(), self._owner_name)
        for folder in {root for flavour in self._places for root in flavour.roots.values()}:
            owner.note(folder)
        return owner

    def _layout(self, bubblewrap: Bubblewrap, supervisor: str) -> Layout:
        """What is the same for all boxes of this process."""
        links, binds = [], []
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            path = Path("/", name)
            if path.is_symlink():
                links.append((str(path), str(path.readlink())))
            elif path.is_dir():
                binds.append(manifest.Bind(str(path), str(path)))
        shelf = None
        etc = str(resources.files("cloche.backends.local") / "etc")
        if probe.may_give_uids(FIRST_UID, UIDS):
            shelf = str(owners.own_folder(owners.state_folder() / "shelf", 0o755))
        return Layout(
            bwrap=bubblewrap.path,
            bwrap_folder=bubblewrap.folder,
            supervisor=supervisor,
            etc=etc,
            cgroup=manifest.CgroupPlan(),
            shelf=shelf,
            hidden=_hidden(supervisor, etc, bubblewrap.folder or bubblewrap.path) if shelf else frozenset(),
            root_links=tuple(links),
            binds=tuple(binds),
            private_nproc=probe.has_private_nproc(platform.release()),
        )

    async def _trial(self, layout: Layout, flavour: cgroup.Flavour) -> Hardening:
        """Raises: BackendUnavailable with what stood in the way."""
        limits = Limits(timeout_s=TRIAL_TIMEOUT_S, pids=16, output_bytes=4096)
        expiry = time.time() + TRIAL_TIMEOUT_S
        profile = Profile(
            run_id=f"trial{secrets.token_hex(4)}", owner=self._owner_name, expires_at=expiry, limits=limits
        )
        bundle = Bundle(argv=[shape.SUPERVISOR, "version"], env={}, limits=limits)
        decoder, last = Decoder(), None
        with anyio.fail_after(TRIAL_TIMEOUT_S):
            async with self._box(profile, layout, flavour) as box:
                await box.feed(bundle)
                try:
                    async for data in box.output():
                        last = [None, *decoder.feed(data)][-1] or last
                except FrameError as exc:
                    raise BackendUnavailable(f"The trial box gave no frames: {exc}.") from exc
                if isinstance(last, End) and last.exit_code == 0:
                    return last.hardening
                reason = last.message if isinstance(last, Fail) else (await box.fate(ended=True)).message
        raise BackendUnavailable(reason)

    def _settle(self, bubblewrap: Bubblewrap, flavour: cgroup.Flavour, layout: Layout, seen: Hardening) -> _Ground:
        posture = Posture(
            "local",
            available=True,
            isolation=Isolation.NAMESPACE,
            engine=bubblewrap.name,
            guarantees=probe.guarantees(seen, flavour, own_uid=layout.shelf is not None),
        )
        return _Ground(bubblewrap, flavour, layout, posture)

    async def tend(self) -> None:
        """Nothing takes long enough."""

    @contextlib.asynccontextmanager
    async def open(self, profile: Profile) -> AsyncIterator[Box]:
        """Make a box and start its supervisor.

        Raises (on entering):
            BackendUnavailable: no box can be made here.
            InterpreterMissing: the host does not have the profile's interpreter.
        """
        posture = await self.probe()
        if self._ground is None:
            raise BackendUnavailable(posture.reason, hint=posture.hint)
        layout = self._ground.layout
        if profile.interpreter is not None:
            found = self._interpreters.get(profile.interpreter)
            if found is None:
                try:
                    # Its answer may take long, and nothing is made by then.
                    found = await to_thread.run_sync(interpreters.find, profile.interpreter, abandon_on_cancel=True)
                except OSError as exc:
                    raise _no_room(exc) from exc
                self._interpreters[profile.interpreter] = found
            program = None if found.path is None else (found.name, found.path)
            hidden = layout.hidden
            if layout.shelf is not None:
                hidden |= _hidden(*(bind.source for bind in found.binds))
            layout = replace(layout, binds=layout.binds + found.binds, hidden=hidden, program=program)
        async with self._box(profile, layout, self._ground.flavour) as box:
            yield box

    @contextlib.asynccontextmanager
    async def _box(self, profile: Profile, layout: Layout, flavour: cgroup.Flavour) -> AsyncIterator[LocalBox]:
        try:
            launcher = await self._take_launcher(layout, flavour)
        except OSError as exc:
            raise _no_room(exc) from exc
        try:
            uid = FIRST_UID + secrets.randbelow(UIDS) if layout.shelf is not None else None
            layout = replace(layout, cgroup=launcher.group.plan, host_uid=uid)
            try:
                await launcher.process.go(manifest.argv(profile, layout, launcher.process.status_fd))
                await to_thread.run_sync(cgroup.limit, flavour, launcher.group, profile)
                await launcher.process.find_supervisor()
            except OSError as exc:
                raise _no_room(exc) from exc
            yield LocalBox(launcher.process, launcher.group)
        finally:
            with anyio.CancelScope(shield=True):
                await launcher.close()
                self._removed.append((profile.run_id, tuple(launcher.group.folders)))
                await self._stand_by()

    async def _stand_by(self) -> None:
        """Have one launcher ready for the next run. Failing is no harm: that run will try again, and say why."""
        ground = self._ground
        if ground is None or self._standby is not None or self._preparing:
            return
        self._preparing = True
        try:
            launcher = await self._new_launcher(ground.layout, ground.flavour)
            if self._ground is not ground:  # closed meanwhile
                await launcher.close()
            else:
                self._standby = launcher
        except OSError as exc:
            log.info("no launcher stands by: %s", exc)
        finally:
            self._preparing = False

    async def _take_launcher(self, layout: Layout, flavour: cgroup.Flavour) -> _Launcher:
        """The one that stands by, else a new one."""
        standby, self._standby = self._standby, None
        if standby is not None and standby.process.alive:
            return standby
        if standby is not None:
            with anyio.CancelScope(shield=True):
                await standby.close()
        return await self._new_launcher(layout, flavour)

    async def _new_launcher(self, layout: Layout, flavour: cgroup.Flavour) -> _Launcher:
        """A launcher in a cgroup of its own, standing by.

        Raises:
            OSError: kernel or systemd refused cgroup or process.
        """
        group = cgroup.NO_CGROUP
        if flavour.kind != "none":
            with anyio.CancelScope(shield=True):  # else what the thread has made would be known to nobody
                group = await to_thread.run_sync(cgroup.create, flavour, self._owner_name)
        try:
            # systemd-run has to find systemd; bubblewrap clears the environment for the box.
            env = places.manager_environment() if group.plan.prefix else {}
            launcher = _Launcher(client.BoxProcess(_launcher_vector(layout, group), env), group)
        except OSError:
            await to_thread.run_sync(cgroup.remove, group.folders)
            raise
        if group.plan.prefix:
            await self._until_scoped(launcher)
        return launcher

    @staticmethod
    async def _until_scoped(launcher: _Launcher) -> None:
        """Wait until systemd has made the scope. Killed before that, the launcher would leave an empty scope behind.

        Raises:
            OSError: systemd refused it, or did not answer.
        """
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(places.ANSWER_TIMEOUT_S):
                while launcher.process.alive and not launcher.group.is_there:  # noqa: ASYNC110 - systemd tells nobody
                    await anyio.sleep(SCOPE_POLL_S)
            if launcher.group.is_there:
                return
            launcher.process.kill()
            reason = await launcher.process.message()
            await to_thread.run_sync(places.stop_scopes, [folder.parent for folder in launcher.group.folders])
            await launcher.close()
        raise OSError(f"systemd made no scope for the box: {reason or 'it did not answer'}")

    async def sweep(self, *, dry_run: bool = False) -> Sequence[Leftover]:
        """Remove what dead owners left: cgroups, and the processes in them."""
        return await to_thread.run_sync(_find if dry_run else _sweep)

    async def examine(self) -> Examination:
        """Bubblewrap, user namespaces, cgroups; boxes run on this machine's own kernel."""
        posture = await self.probe()
        flavour = None if self._ground is None else self._ground.flavour
        checks = await to_thread.run_sync(examine.checks, posture, flavour, os.geteuid())
        return Examination(checks, here=True, kernel=platform.release(), machine=platform.machine())

    async def remains(self, run_ids: Collection[str]) -> Sequence[str] | None:
        """Their cgroups, in which everything was that they started. Without cgroups nothing bears their names."""
        folders = [folder for run_id, theirs in self._removed if run_id in run_ids for folder in theirs]
        if not folders:
            return None
        return await to_thread.run_sync(lambda: [f"the cgroup {folder}" for folder in folders if folder.exists()])

    async def aclose(self) -> None:
        """End the launcher that stands by, and give up the owner's lock."""
        self._ground = None
        if self._standby is not None:
            await self._standby.close()
            self._standby = None
        for flavour in self._places:
            await to_thread.run_sync(flavour.close)
        self._places = ()
        if self._owner is not None:
            self._owner.close()
            self._owner = None


_MACHINE = "Make what the message names available to cloche, or free what is used up; then try again."


def _no_room(exc: OSError) -> BackendUnavailable:
    """The kernel (or systemd) refused one more process, descriptor or cgroup."""
    return BackendUnavailable(f"No box could be started: {exc}.", hint=_MACHINE, retryable=True)


def _hidden(*paths: str | None) -> frozenset[str]:
    """Those that a stranger's uid cannot reach: a folder on the way is closed, or the thing itself."""

    def is_open(path: str) -> bool:
        path = os.path.realpath(path)
        wanted = 0o5 if os.path.isdir(path) else 0o4
        folders = [str(folder) for folder in Path(path).parents]
        return os.stat(path).st_mode & wanted == wanted and all(os.stat(folder).st_mode & 0o1 for folder in folders)

    return frozenset(path for path in paths if path is not None and not is_open(path))


def _find() -> list[Leftover]:
    """What :func:`_sweep` would remove."""
    if probe.platform_reason() is not None:
        return []
    return [
        Leftover("cgroup", str(folder), removed=False, reason=f"owner {owner.name} is dead")
        for owner in owners.dead(owners.state_folder(), look_only=True)
        for root in owner.folders
        for folder in root.glob(f"{cgroup.name_prefix(owner.name)}*")
    ]


def _sweep() -> list[Leftover]:
    swept: list[Leftover] = []
    if probe.platform_reason() is not None:
        return swept
    for owner in owners.dead(owners.state_folder()):
        owner.left |= bool(owner.notes) and owner.age_s < owners.NOTE_LIFE_S  # another backend's
        for root in owner.folders:
            folders = list(root.glob(f"{cgroup.name_prefix(owner.name)}*"))
            places.stop_scopes(folders)
            left = set(cgroup.remove(folders))
            owner.left |= bool(left)
            swept += [
                Leftover("cgroup", str(f), removed=f not in left, reason=f"owner {owner.name} is dead") for f in folders
            ]
    return swept
