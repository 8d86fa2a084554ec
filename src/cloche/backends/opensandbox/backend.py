"""The opensandbox backend: joins address, client, probe and boxes."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from anyio import to_thread

from cloche._kit.http import ConnectFailure, HttpFailure, trusted_by_system
from cloche._kit.places import Place
from cloche._kit.steps import step
from cloche.backends.claims import Keeper
from cloche.backends.contract import Box, Capabilities, Examination, Leftover, Profile
from cloche.backends.opensandbox import address, diagnose, examine, leftovers, manifest, probe
from cloche.backends.opensandbox.allowed import Allowed
from cloche.backends.opensandbox.box import OpenSandboxBox, Service
from cloche.backends.opensandbox.client import OpenSandboxClient, Refused
from cloche.backends.opensandbox.execd import ACCESS_HEADER, Execd
from cloche.backends.opensandbox.facts import Sandbox
from cloche.backends.opensandbox.manifest import Made
from cloche.errors import BackendUnavailable, ClocheError, EngineLost, QuotaExceeded
from cloche.isolation import Isolation, Posture
from cloche.settings import Settings
from cloche.supervisor.binary import machine_name, supervisor_path

PATIENCE_S = 2.0
"""So long the answer to a request to make a sandbox is waited for when nobody wants the sandbox any more: the service makes it
all the same, and only the answer has its id."""
FIND_S, FIND_REFUSED_S, FIND_STEPS_S = 4.0, 0.5, (0.2, 0.5, 1.0)
"""For a sandbox whose answer was lost to be found by its metadata; the same, where somebody answered that it was not made; and
between two looks for it."""
UNANSWERED = frozenset({408, 499, 504})
"""Whoever stands before the service did not wait for its answer."""
REMOVE_S, REMOVE_PAUSE_S = 25.0, 1.0
HOPELESS = frozenset({400, 405, 422})
"""No repetition makes such a request to delete a better one."""
SWEEP_S = 60.0
STOP_S = 2.0
"""From asking execd to end a command to the supervisor's SIGTERM."""
QUOTA_PAUSES_S = (0.2, 0.5, 1.0, 2.0)
QUOTA_RESERVE_S = 1.0
"""Who waits for a quota says so this long before the start is overdue."""

_log = logging.getLogger("cloche.opensandbox")


@dataclass(frozen=True, slots=True)
class _Setup:
    """What the probe found out."""

    service: Service
    allowed: Allowed
    posture: Posture


class OpenSandboxBackend:
    """A sandbox per run in the service that the settings name. ``owner`` names this process instance."""

    def __init__(self, settings: Settings, owner: str) -> None:
        self._settings = settings
        self._keeper = Keeper(owner, "")
        self._client: OpenSandboxClient | None = None
        self._setup: _Setup | None = None
        self._programs: dict[str, bytes] = {}
        self._tls: ssl.SSLContext | None = None
        self._tls_lock = anyio.Lock()

    def capabilities(self) -> Capabilities:
        """A command's output cannot be read a second time."""
        return Capabilities(mode="opensandbox", stop_s=STOP_S)

    async def probe(self) -> Posture:
        """Ask the service how it is, and whether it takes the key. Once."""
        if self._setup is None:
            try:
                self._setup = await self._set_up()
            except ClocheError as exc:
                await self._let_go()
                return Posture(
                    "opensandbox", available=False, isolation=Isolation.NONE, reason=exc.message, hint=exc.hint
                )
        return self._setup.posture

    async def _set_up(self) -> _Setup:
        """Raises: ClocheError."""
        settings = self._settings
        if settings.opensandbox_api_url is None:
            raise BackendUnavailable(
                "No OpenSandbox service is configured.",
                hint="Set CLOCHE_OPENSANDBOX_API_URL to its address, and CLOCHE_OPENSANDBOX_API_KEY to its key.",
            )
        place = address.api(settings.opensandbox_api_url)
        key = settings.opensandbox_api_key
        secret = None if key is None else key.get_secret_value().strip()
        if secret is not None and not (secret.isascii() and secret.isprintable()):
            raise BackendUnavailable(
                "The key of the OpenSandbox service is no text that can be sent.", hint=diagnose.KEY_HINT
            )
        client = self._client = OpenSandboxClient(place, secret, await self._tls_for(place))
        version = await probe.look(client)
        self._keeper.note = leftovers.note(place.base)
        await self._keeper.begin()
        posture = Posture(
            "opensandbox",
            available=True,
            isolation=Isolation.CONTAINER,
            engine=f"OpenSandbox {version}".rstrip(),
            guarantees=probe.guarantees(),
        )
        service = Service(client, self._program, proxied=settings.opensandbox_server_proxy)
        return _Setup(service, Allowed.of(place.host, settings.ssrf_whitelist), posture)

    async def _tls_for(self, place: Place) -> ssl.SSLContext | None:
        if place.scheme != "https":
            return None
        async with self._tls_lock:
            if self._tls is None:
                self._tls = await to_thread.run_sync(trusted_by_system)
        return self._tls

    async def tend(self) -> None:
        """Read the supervisor for this machine's architecture, which is mostly the service's too."""
        await self._program("")

    async def _program(self, machine: str) -> bytes:
        """The supervisor for an architecture; empty: this machine's.

        Raises:
            BackendUnavailable: there is none.
        """
        name = machine_name(machine or None)
        if name not in self._programs:
            self._programs[name] = await to_thread.run_sync(supervisor_path(name).read_bytes)
        return self._programs[name]

    @contextlib.asynccontextmanager
    async def open(self, profile: Profile) -> AsyncIterator[Box]:
        """Have a sandbox made.

        Raises (on entering):
            ClocheError: the service makes none.
        """
        posture = await self.probe()
        if self._setup is None:
            raise BackendUnavailable(posture.reason, hint=posture.hint)
        setup, client = self._setup, self._setup.service.client
        made = self._made(profile, client.server_time())
        image = profile.image or self._settings.image
        sandbox = await self._make(client, manifest.sandbox(profile, image, self._keeper.place, made))
        uid = random.SystemRandom().randint(*manifest.SCRIPT_UIDS)

        async def reach(place: Place, headers: Mapping[str, str]) -> Execd:
            # The service's word on what execd wants to see comes after ours.
            given = {ACCESS_HEADER: made.access_token, **{name.lower(): text for name, text in headers.items()}}
            given |= {name.lower(): text for name, text in client.headers_for(place).items()}
            return Execd(place, given, allowed=setup.allowed, tls=await self._tls_for(place))

        box = OpenSandboxBox(setup.service, sandbox.id, manifest.supervisor(profile, uid), reach)
        try:
            yield box
        finally:
            try:
                with anyio.CancelScope(shield=True):
                    await box.aclose()
            finally:
                await self._remove(client, sandbox.id)

    @staticmethod
    def _made(profile: Profile, now: float) -> Made:
        expires = profile.expires_at + now - time.time()
        return Made(secrets.token_hex(16), secrets.token_hex(32), expires, expires - now)

    async def _make(self, client: OpenSandboxClient, body: Mapping[str, Any]) -> Sandbox:
        """A sandbox. Where a quota forbids one more, others may go: it is tried until the start is overdue.

        Raises:
            ClocheError: none can be made.
        """
        until = anyio.current_time() + max(0.0, self._settings.start_timeout - QUOTA_RESERVE_S)
        tries = 0
        while True:
            try:
                return await self._create(client, body)
            except Refused as exc:
                error = diagnose.refusal(exc, "make a sandbox")
                pause = max(step(QUOTA_PAUSES_S, tries), exc.refusal.retry_after_s or 0.0)
                if not isinstance(error, QuotaExceeded) or anyio.current_time() + pause > until:
                    raise error from exc
            except HttpFailure as exc:
                raise diagnose.unreachable(exc, client.place, "make a sandbox") from exc
            tries += 1
            await anyio.sleep(pause)

    async def _create(self, client: OpenSandboxClient, body: Mapping[str, Any]) -> Sandbox:
        """One try, with nothing left behind where it fails.

        Raises:
            Refused, HttpFailure.
        """
        answers: list[Sandbox | Exception] = []
        asking = anyio.CancelScope(shield=True)

        async def ask() -> None:
            with asking:
                try:
                    answers.append(await client.create(body, self._settings.start_timeout))
                except (Refused, HttpFailure) as exc:
                    answers.append(exc)
            answered.set()

        answered = anyio.Event()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                try:
                    await answered.wait()
                except BaseException:
                    asking.deadline = anyio.current_time() + PATIENCE_S
                    raise
        except BaseException:
            await self._undo(client, body, answers)
            raise
        answer = answers[0]
        if isinstance(answer, Exception):
            await self._undo(client, body, answers)
            raise answer
        return answer

    async def _undo(
        self, client: OpenSandboxClient, body: Mapping[str, Any], answers: Sequence[Sandbox | Exception]
    ) -> None:
        """Remove what a request made whose sandbox nobody wants any more, or whose answer was lost."""
        match answers:
            case [Sandbox() as sandbox]:
                await self._remove_failed(client, sandbox.id)
            case [ConnectFailure()]:
                return  # nothing was asked for
            case [Refused() as refused] if _says_what_it_did(refused):
                return  # nothing was made
            case [Refused() as refused] if refused.status not in UNANSWERED:
                await self._remove_lost(client, body["metadata"][manifest.META_TRY], FIND_REFUSED_S)
            case _:
                await self._remove_lost(client, body["metadata"][manifest.META_TRY], FIND_S)

    async def _remove_lost(self, client: OpenSandboxClient, name: str, within_s: float) -> None:
        with anyio.move_on_after(within_s, shield=True):
            looks = 0
            while True:
                try:
                    found = [sandbox async for sandbox in client.sandboxes({manifest.META_TRY: name})]
                except (Refused, HttpFailure) as exc:
                    _log.debug("the service does not tell what it made: %s", exc)
                    found = []
                for sandbox in found:
                    await self._remove_failed(client, sandbox.id)
                if found:
                    return
                await anyio.sleep(step(FIND_STEPS_S, looks))
                looks += 1
        self._keeper.left = True
        _log.warning(
            "The service may still make a sandbox that nobody wants. It is left to sweep, and to its lifetime."
        )

    async def _remove_failed(self, client: OpenSandboxClient, name: str) -> None:
        """What went wrong before is what is to be told, not that this fails too."""
        try:
            await self._remove(client, name)
        except EngineLost as exc:
            _log.warning("%s It is left to sweep.", exc.message)

    async def _remove(self, client: OpenSandboxClient, name: str) -> None:
        """Delete a sandbox, whatever comes in between.

        Raises:
            EngineLost: it could not be deleted, and is left to its own lifetime, and to sweep.
        """
        problem: Exception | None = None
        with anyio.move_on_after(REMOVE_S, shield=True):
            while True:
                try:
                    await client.delete(name)
                except (Refused, HttpFailure) as exc:
                    problem = exc
                    _log.debug("%s is not deleted yet: %s", name, exc)
                    if isinstance(exc, Refused) and exc.status in HOPELESS:
                        break
                else:
                    return
                await anyio.sleep(REMOVE_PAUSE_S)
        self._keeper.left = True
        raise EngineLost(f"The sandbox {name} could not be deleted: {problem or 'it took too long'}.") from problem

    async def sweep(self, *, dry_run: bool = False) -> Sequence[Leftover]:
        """Remove what has expired by the service's clock, of any process, and what belongs to a dead one of this machine.

        Raises:
            BackendUnavailable: the service cannot be asked.
        """
        if self._setup is None:
            return ()
        client = self._setup.service.client
        try:
            with anyio.fail_after(SWEEP_S):
                return await leftovers.sweep(client, self._keeper, dry_run=dry_run)
        except TimeoutError:
            raise BackendUnavailable(
                f"The OpenSandbox service at {client.place.base} did not tell of leftovers within {SWEEP_S:g} s.",
                hint="Look at its load.",
                retryable=True,
            ) from None
        except Refused as exc:
            raise diagnose.refusal(exc, "tell of leftovers") from exc
        except HttpFailure as exc:
            raise diagnose.unreachable(exc, client.place, "tell of leftovers") from exc

    async def examine(self) -> Examination:
        """The service, its key, its version."""
        posture = await self.probe()
        where = "" if self._setup is None else self._setup.service.client.place.base
        return Examination(examine.checks(self._settings, posture, where))

    async def remains(self, run_ids: Collection[str]) -> Sequence[str] | None:
        """Sandboxes that carry their metadata."""
        if self._client is None:
            return None
        try:
            return await examine.remains(self._client, run_ids)
        except (Refused, HttpFailure) as exc:
            _log.info("the service does not tell what is left: %s", exc)
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


def _says_what_it_did(refused: Refused) -> bool:
    """Whether it is the service itself that refuses to make a sandbox, and not one who only stands before it."""
    return (400 <= refused.status < 500 and refused.status not in UNANSWERED) or "::" in refused.code
