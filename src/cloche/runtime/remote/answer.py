"""What a service answers → cloche's values and errors. Pure; whoever answers may be no such service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cloche._kit.fields import field, parse_json, shortened
from cloche._kit.http import ConnectFailure, HttpFailure, TlsFailure, TooLarge
from cloche.errors import (
    BackendUnavailable,
    ClocheError,
    EngineError,
    EngineLost,
    InvalidSpec,
    ProtocolError,
    TooManyRuns,
    WorkspaceTooLarge,
)
from cloche.isolation import Guarantee, Isolation, Posture, State
from cloche.result import error_class
from cloche.settings import Mode

MAX_TEXT = 2000
MAX_GUARANTEES = 100
TOKEN_HINT = "Set CLOCHE_REMOTE_TOKEN to one of the service's tokens."  # noqa: S105 (what to do, not one)
URL_HINT = "Check CLOCHE_REMOTE_URL: it is where `cloche serve` listens, or what stands before it."
AWAY = frozenset({502, 503, 504})
"""What a proxy says for a service that is not there."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a service says of itself."""

    posture: Posture
    runs: bool
    fallback_from: str | None


def offer(found: object) -> Offer:
    """What a service says of itself, as the mode ``remote`` has it.

    Raises:
        ValueError: no service says this.
    """
    mode, level = field(found, "mode", str, ""), field(found, "isolation", str, "")
    available, runs = field(found, "available", bool, otherwise=False), field(found, "runs", bool, otherwise=True)
    if not mode or not isinstance(found, Mapping) or not isinstance(found.get("available"), bool):
        raise ValueError("no posture")
    engine = shortened(field(found, "engine", str, ""), 200)
    reason = shortened(field(found, "reason", str, ""), MAX_TEXT)
    instead = shortened(field(found, "fallback_from", str, ""), 64)
    posture = Posture(
        Mode.REMOTE,
        available=available,
        isolation=Isolation(level),
        reason=reason and f"the service says: {reason}",
        hint=shortened(field(found, "hint", str, ""), MAX_TEXT),
        engine=f"cloche service, {shortened(mode, 64)}" + (f", {engine}" if engine else ""),
        guarantees=tuple(_guarantees(field(found, "guarantees", list, []))),
        proved=field(found, "proved", bool, otherwise=False),
    )
    return Offer(posture, runs, instead or None)


def _guarantees(found: list[object]) -> list[Guarantee]:
    return [
        Guarantee(
            shortened(field(each, "name", str, ""), 64),
            State(field(each, "state", str, "")),
            shortened(field(each, "evidence", str, ""), MAX_TEXT),
            shortened(field(each, "advice", str, ""), MAX_TEXT),
            needed=field(each, "needed", bool, otherwise=True),
        )
        for each in found[:MAX_GUARANTEES]
    ]


def refusal(status: int, headers: Mapping[str, str], body: bytes, where: str) -> ClocheError:
    """The error that an answer is that is no success."""
    try:
        found = parse_json(body)
    except ValueError:
        found = None
    if status != 401 and (error := problem(found)) is not None:
        return error
    said = shortened(field(found, "detail", str, ""), MAX_TEXT).rstrip(".") or f"status {status}"
    if status in {401, 403}:
        return BackendUnavailable(f"The service at {where} does not take the token: {said}.", hint=TOKEN_HINT)
    if 300 <= status < 400:
        to = shortened(headers.get("location", ""), 200)
        return BackendUnavailable(f"What answers at {where} sends us elsewhere, to {to!r}.", hint=URL_HINT)
    if status == 429:
        return TooManyRuns(f"The service at {where} takes no more runs: {said}.")
    if status in AWAY:
        return BackendUnavailable(f"The service at {where} is away: {said}.", retryable=True)
    if status >= 500:
        return EngineLost(f"The service at {where} failed: {said}.")
    if status == 413:
        return WorkspaceTooLarge(
            f"What stands before the service at {where} does not take so large a request: {said}.",
            hint="Deliver less, or raise the bound there.",
        )
    return no_service(where, said)


def no_service(where: str, why: str) -> BackendUnavailable:
    """The error for whoever answers and is something else."""
    return BackendUnavailable(f"What answers at {where} is no cloche service: {why.rstrip('.')}.", hint=URL_HINT)


def problem(found: object) -> ClocheError | None:
    """The error that a problem is (RFC 9457, with cloche's own members). None: it is none that is known."""
    code, detail = field(found, "code", str, ""), shortened(field(found, "detail", str, ""), MAX_TEXT)
    hint = shortened(field(found, "hint", str, ""), MAX_TEXT) or None
    if not code or not detail:
        return None
    known = error_class(code)
    if known not in {ClocheError, EngineError}:
        return known(detail, hint=hint, retryable=field(found, "retryable", bool, known.default_retryable))
    match code:
        case "payload-too-large":
            return WorkspaceTooLarge(detail, hint=hint)
        case "run-exists":
            return InvalidSpec(detail, hint=hint or "Use each id once.")
        case "shutting-down":
            return BackendUnavailable(detail, hint=hint or "Run again: another one may be up.", retryable=True)
        case "internal-error":
            return EngineLost(detail, hint=hint)
        case "unsupported-media-type":
            return ProtocolError(f"The service does not understand the request: {detail}", hint=URL_HINT)
        case _:
            return None


def unreachable(exc: HttpFailure, where: str) -> ClocheError:
    """Why a service cannot be spoken to."""
    match exc:
        case TlsFailure():
            return BackendUnavailable(
                f"The service at {where} and cloche could not agree on TLS: {exc}.",
                hint="For a service without TLS let CLOCHE_REMOTE_URL begin with http://; for a certificate of an authority of"
                " your own, set SSL_CERT_FILE.",
            )
        case ConnectFailure():
            return BackendUnavailable(
                f"No cloche service can be reached at {where}: {exc}.",
                hint="Start it (cloche serve), or correct CLOCHE_REMOTE_URL.",
                retryable=True,
            )
        case TooLarge():
            return no_service(where, "it says too much")
        case _:
            return EngineLost(
                f"The connection to the service at {where} was lost: {exc}.",
                hint="Look at the service's own log; the script may have run in part.",
                retryable=True,
            )
