"""What the service or execd says → cloche's errors. Pure."""

from __future__ import annotations

from cloche._kit.http import ConnectFailure, HttpFailure, NotAllowed, TimedOut, TlsFailure, TooLarge
from cloche._kit.places import Place
from cloche.backends.opensandbox.client import BUSY, Refused
from cloche.errors import (
    BackendUnavailable,
    ClocheError,
    ImageUnavailable,
    PermissionDenied,
    QuotaExceeded,
    StartTimeout,
)

KEY_HINT = "Set CLOCHE_OPENSANDBOX_API_KEY to a key that the service takes."
DOCS = "docs/backends/opensandbox.md"


def refusal(exc: Refused, what: str) -> ClocheError:
    """The service does not do what was asked for, such as "make a sandbox"."""
    said = f"The OpenSandbox service does not {what}: {exc}."
    code = exc.code.upper()
    if exc.status in {401, 403} and "QUOTA" not in code:
        return PermissionDenied(said, hint=KEY_HINT)
    if "IMAGE_PULL" in code:
        return ImageUnavailable(said)
    if "QUOTA" in code or "CAPACITY" in code or exc.status == 429:
        return QuotaExceeded(said)
    if "READY_TIMEOUT" in code:
        return StartTimeout(said)
    if exc.status in {400, 422}:
        return BackendUnavailable(
            said, hint="Compare the run's limits with those of the service (its longest lifetime, memory, CPUs)."
        )
    return BackendUnavailable(said, hint="Look at the service's own log.", retryable=exc.status in BUSY)


def unreachable(exc: HttpFailure, place: Place, what: str) -> BackendUnavailable:
    """The service cannot be spoken to."""
    where = place.base
    match exc:
        case TlsFailure():
            return BackendUnavailable(
                f"The OpenSandbox service at {where} and cloche could not agree on TLS: {exc}.",
                hint="For a service without TLS let CLOCHE_OPENSANDBOX_API_URL begin with http://; for a certificate of an"
                " authority of your own, set SSL_CERT_FILE.",
            )
        case ConnectFailure():
            return BackendUnavailable(
                f"No OpenSandbox service can be reached at {where}: {exc}.",
                hint="Start it, or correct CLOCHE_OPENSANDBOX_API_URL.",
                retryable=True,
            )
        case TooLarge():
            return BackendUnavailable(f"The OpenSandbox service at {where} did not {what}: {exc}")
        case TimedOut():
            return BackendUnavailable(
                f"The OpenSandbox service at {where} did not {what} in time.",
                hint="Look at its load.",
                retryable=True,
            )
        case _:
            return BackendUnavailable(
                f"The OpenSandbox service at {where} did not {what}: {exc}.",
                hint="Check that CLOCHE_OPENSANDBOX_API_URL is that of an OpenSandbox service.",
                retryable=True,
            )


def not_spoken_to(exc: TlsFailure, name: str, place: Place) -> BackendUnavailable:
    """execd of a sandbox wants TLS, or has none, or another name."""
    return BackendUnavailable(
        f"cloche and the address that the service tells of the sandbox {name}, {place.base}, could not agree on TLS: {exc}.",
        hint="Look at the service's eip, or set CLOCHE_OPENSANDBOX_SERVER_PROXY=true.",
    )


def not_allowed(exc: NotAllowed) -> PermissionDenied:
    """The service sends us to an address where we do not go."""
    return PermissionDenied(
        f"The OpenSandbox service says that the sandbox is at {exc.host} ({exc.address}), where cloche does not connect by"
        " itself.",
        hint=f"If that is right, add it to CLOCHE_SSRF_WHITELIST ({exc.host}), or set CLOCHE_OPENSANDBOX_SERVER_PROXY=true;"
        f" {DOCS} explains which.",
    )
