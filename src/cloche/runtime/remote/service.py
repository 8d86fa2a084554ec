"""A cloche service in the place of a backend."""

from __future__ import annotations

import ssl
from dataclasses import replace

from anyio import to_thread

from cloche._kit.http import trusted_by_system
from cloche._kit.places import Place, parse
from cloche.backends.contract import Capabilities
from cloche.errors import BackendUnavailable, ClocheError, EngineLost
from cloche.isolation import Isolation, Posture
from cloche.runtime.admission import Admission
from cloche.runtime.course import Course
from cloche.runtime.remote.answer import TOKEN_HINT, Offer
from cloche.runtime.remote.client import RemoteClient
from cloche.runtime.remote.run import RemoteRun
from cloche.runtime.service import Service
from cloche.settings import Mode, Settings
from cloche.spec import Spec


class RemoteService(Service):
    """The one of the settings."""

    def __init__(self, settings: Settings, owner: str) -> None:
        del owner  # the service has its own
        self._settings = settings
        self._client: RemoteClient | None = None
        self._offer: Offer | None = None

    @property
    def fallback_from(self) -> str | None:
        """As the service says."""
        return None if self._offer is None else self._offer.fallback_from

    def capabilities(self) -> Capabilities:
        """Its boxes are its own business; whether there are any it has said."""
        return Capabilities(mode=Mode.REMOTE, runs=self._offer is None or self._offer.runs)

    async def probe(self) -> Posture:
        """Ask the service what it gives, and whether it takes the token."""
        try:
            if self._client is None:
                self._client = await self._connected()
            self._offer = await self._client.offer()
        except ClocheError as exc:
            await self.aclose()
            hint = "Look at the service's own log." if isinstance(exc, EngineLost) else exc.hint
            return Posture(Mode.REMOTE, available=False, isolation=Isolation.NONE, reason=exc.message, hint=hint)
        return self._offer.posture

    async def prove(self) -> Posture:
        """Have the service look at its own boxes.

        Raises:
            ClocheError: it cannot, or cannot be asked.
        """
        assert self._client is not None
        self._offer = await self._client.offer(prove=True)
        return self._offer.posture

    async def _connected(self) -> RemoteClient:
        """Raises: BackendUnavailable: there is no address, or the token is none."""
        settings = self._settings
        if settings.remote_url is None:
            raise BackendUnavailable(
                "No cloche service is configured.",
                hint="Set CLOCHE_REMOTE_URL to its address, and CLOCHE_REMOTE_TOKEN to a token that it takes.",
            )
        place = _api(settings.remote_url)
        token = None if settings.remote_token is None else settings.remote_token.get_secret_value().strip()
        if token is not None and not (token.isascii() and token.isprintable()):
            raise BackendUnavailable("The token of the cloche service is no text that can be sent.", hint=TOKEN_HINT)
        tls: ssl.SSLContext | None = None
        if place.scheme == "https":
            tls = await to_thread.run_sync(trusted_by_system)
        return RemoteClient(place, token, tls)

    def course(self, spec: Spec, run_id: str, admission: Admission) -> Course:
        """A run, not yet begun."""
        assert self._client is not None
        return RemoteRun(self._client, self._settings, spec, run_id, admission)

    async def aclose(self) -> None:
        """Close all connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


def _api(text: str) -> Place:
    """The service's address: https where no scheme is said, and without the version that a user may have put at its end."""
    place = parse(text, "https")
    return replace(place, path=place.path.removesuffix("/v1").rstrip("/"))
