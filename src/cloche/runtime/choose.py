"""Which backend runs the scripts: the one of the settings, the one that ``auto`` finds, or ``local`` in its place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

import anyio

from cloche.backends import TABLE, BackendFactory
from cloche.backends.contract import Backend, Capabilities
from cloche.errors import BackendUnavailable, ClocheError, IsolationUnavailable
from cloche.isolation import Isolation, Posture, State
from cloche.runtime.auto import candidates
from cloche.runtime.service import Service
from cloche.settings import Mode, Settings

CLOSE_S = 5.0
"""How long a backend may take to give back what it holds."""
LOOK_S = 30.0
"""How long an engine that is asked anew may take. A backend bounds each of its requests; this is for all of them."""

Factory: TypeAlias = BackendFactory | Callable[[Settings, str], Service]
"""Makes a backend, or what stands in the place of one."""

_log = logging.getLogger("cloche.runtime")


def _remote(settings: Settings, owner: str) -> Service:
    from cloche.runtime.remote.service import RemoteService

    return RemoteService(settings, owner)


MODES: Mapping[str, Factory] = MappingProxyType({**TABLE, Mode.REMOTE: _remote})
"""The modes of this version; ``auto`` is none, but chooses one."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The backend in use, what it gives here, and whose place it takes."""

    backend: Backend | Service
    capabilities: Capabilities
    posture: Posture
    factory: Factory
    """Makes another one like it."""
    fallback_from: str | None = None
    choice: str = ""
    """How ``auto`` came to it, in words; empty where the settings name it."""

    @property
    def in_force(self) -> tuple[str, ...]:
        """The names of the guarantees that hold."""
        return tuple(each.name for each in self.posture.guarantees if each.state is State.IN_FORCE)


async def choose(settings: Settings, owner: str, table: Mapping[str, Factory]) -> Chosen:
    """Probe the chosen mode's backend; where it is unavailable, take ``local``, as far as the settings allow it.
    With ``auto`` take the first one that can be used.

    Raises:
        BackendUnavailable: the mode's engine cannot be used, and nothing may take its place.
        IsolationUnavailable: what could take its place is below the isolation floor.
    """
    mode = settings.mode
    if mode is Mode.AUTO:
        return await _first(settings, owner, table)
    if mode not in table:
        raise BackendUnavailable(
            f"This version of cloche has no mode {mode}.",
            hint=f"Set CLOCHE_MODE to one of those that it has: {', '.join(table)}.",
        )
    chosen = await _probe(settings, owner, table[mode])
    if chosen.posture.available or not chosen.capabilities.runs:
        return chosen
    await let_go(chosen.backend)
    return await _in_its_place(settings, owner, table, chosen.posture)


async def look_again(settings: Settings, owner: str, chosen: Chosen) -> Posture:
    """What the engine of the chosen backend offers now. Raises nothing, and leaves the chosen backend alone.

    A backend keeps what its probe found, for its boxes stand on that; so it is another one that asks. ``owner`` is that one's.
    """
    mode = chosen.posture.mode
    try:
        with anyio.fail_after(LOOK_S):
            again = await _probe(settings, owner, chosen.factory)
    except TimeoutError:
        return _unavailable(mode, f"it gave no answer within {LOOK_S:g} s")
    except Exception as exc:  # noqa: BLE001 (an engine may fail in any way)
        _log.exception("the engine of the mode %s cannot be looked at", mode)
        return _unavailable(mode, repr(exc))
    await let_go(again.backend)
    return again.posture


def _unavailable(mode: str, reason: str) -> Posture:
    return Posture(mode, available=False, isolation=Isolation.NONE, reason=reason, hint=BackendUnavailable.default_hint)


async def tend(backend: Backend | Service) -> None:
    """Have a backend look after its engine. What goes wrong is logged: a run that needs it fails with it."""
    try:
        await backend.tend()
    except ClocheError as exc:
        _log.info("%s", exc.message)
    except Exception:  # noqa: BLE001 (an engine may fail in any way; nobody waits for this)
        _log.exception(
            "the backend of the mode %s does not look after its engine any more", backend.capabilities().mode
        )


async def let_go(backend: Backend | Service) -> None:
    """Close a backend that makes no more boxes. What goes wrong is logged."""
    with anyio.move_on_after(CLOSE_S, shield=True):
        try:
            await backend.aclose()
        except Exception:  # noqa: BLE001 (an engine may fail in any way; nobody waits for this)
            _log.exception("the backend of the mode %s could not be closed", backend.capabilities().mode)


async def _first(settings: Settings, owner: str, table: Mapping[str, Factory]) -> Chosen:
    """The first of the modes that ``auto`` knows that can be used and gives enough isolation."""
    floor = settings.min_isolation
    others: list[str] = []
    for candidate in candidates(settings):
        mode = candidate.mode
        if mode not in table:
            continue
        why_not = candidate.why_not
        if not why_not:
            found = await _probe(settings, owner, table[mode])
            posture = found.posture
            if posture.available and posture.isolation >= floor:
                no_others = f" (not {'; not '.join(others)})" if others else ""
                choice = f"auto: {mode}, because {candidate.why}{no_others}"
                _log.info("%s", choice)
                return replace(found, choice=choice)
            await let_go(found.backend)
            why_not = _below(posture, floor) if posture.available else posture.reason
        others.append(f"{mode}: {why_not.rstrip('. ')}")
    raise BackendUnavailable(
        f"The mode auto finds nothing to run scripts with. {'; '.join(others)}.",
        hint="Repair one of these, or name a mode with CLOCHE_MODE to hear what it needs.",
    )


async def _in_its_place(settings: Settings, owner: str, table: Mapping[str, Factory], posture: Posture) -> Chosen:
    mode = settings.mode
    reason = f"The mode {mode} is unavailable: {_sentence(posture.reason)}"
    if not settings.fallback or mode is Mode.LOCAL or Mode.LOCAL not in table:
        raise BackendUnavailable(reason, hint=posture.hint or None)
    instead = await _probe(settings, owner, table[Mode.LOCAL])
    local = instead.posture
    if not local.available or local.isolation < settings.min_isolation:
        await let_go(instead.backend)
        if local.available:
            raise IsolationUnavailable(f"{reason} {_below(local, settings.min_isolation)}", hint=posture.hint or None)
        raise BackendUnavailable(
            f"{reason} The fallback, local, is unavailable too: {_sentence(local.reason)}", hint=posture.hint or None
        )
    _log.warning("%s Scripts run in the mode local instead.", reason)
    return replace(instead, fallback_from=str(mode))


def check_floor(posture: Posture, floor: Isolation) -> None:
    """Refuse a run that would get less isolation than it must have.

    Raises:
        IsolationUnavailable: the level is below ``floor``.
    """
    if posture.isolation < floor:
        raise IsolationUnavailable(_below(posture, floor), hint=posture.hint or None)


async def _probe(settings: Settings, owner: str, factory: Factory) -> Chosen:
    backend = factory(settings, owner)
    try:
        posture = await backend.probe()
        instead_of = backend.fallback_from if isinstance(backend, Service) else None
        return Chosen(backend, backend.capabilities(), posture, factory, instead_of)
    except BaseException:  # cancelled: what the backend already holds must not stay
        await let_go(backend)
        raise


def _below(posture: Posture, floor: Isolation) -> str:
    why = f": {_sentence(posture.reason)}" if posture.reason else "."
    return f"The mode {posture.mode} gives the isolation {posture.isolation} here, and {floor} is required{why}"


def _sentence(text: str) -> str:
    return text.rstrip(". ") + "."
