"""Who may use the service: bearer tokens with names."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cloche.errors import InvalidSettings
from cloche.settings import Settings

MAX_FILE_BYTES = 2**20
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
"""What may stand behind "Bearer" (RFC 6750, 2.1), and long enough not to be guessed."""
_LIMIT = re.compile(r"[1-9][0-9]{0,5}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. ``limit``: how many runs he may have at a time; None: as many as the service takes."""

    name: str
    limit: int | None = None


ANYBODY = Caller("anybody")
"""Whoever asks, where no tokens are set."""


class Doorkeeper:
    """Knows the tokens by their digests, so that the time to compare tells nothing about one."""

    def __init__(self, entries: Sequence[tuple[str, Caller]]) -> None:
        self._entries = [(_digest(token), caller) for token, caller in entries]

    @property
    def needs_tokens(self) -> bool:
        """Whether there are any."""
        return bool(self._entries)

    def who(self, authorization: str | None) -> Caller | None:
        """Who shows this ``Authorization`` header; None: nobody that is known."""
        if not self._entries:
            return ANYBODY
        scheme, _, token = (authorization or "").partition(" ")
        shown = _digest(token.strip())
        found = None
        for digest, caller in self._entries:  # all of them, whichever fits
            if hmac.compare_digest(digest, shown):
                found = caller
        return found if scheme.lower() == "bearer" else None


def doorkeeper(settings: Settings) -> Doorkeeper:
    """The one for the settings' tokens. Reads their file.

    Raises:
        InvalidSettings: the file cannot be read, or an entry is none.
    """
    entries: list[tuple[str, Caller]] = []
    if settings.serve_tokens is not None:
        entries += _entries(settings.serve_tokens.get_secret_value(), "CLOCHE_SERVE_TOKENS")
    if settings.serve_tokens_file is not None:
        entries += _entries(_read(settings.serve_tokens_file), settings.serve_tokens_file)
    for what, values in (("name", [caller.name for _, caller in entries]), ("token", [token for token, _ in entries])):
        if len(set(values)) < len(values):
            raise InvalidSettings(f"Two tokens of the service have one {what}.", hint=f"Give each a {what} of its own.")
    return Doorkeeper(entries)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise InvalidSettings(
            f"CLOCHE_SERVE_TOKENS_FILE cannot be read from {path!r}: {reason}.",
            hint="Check that the secret is there, with the right key, and that the service's user may read it.",
        ) from None
    if len(text) > MAX_FILE_BYTES:
        raise InvalidSettings(f"CLOCHE_SERVE_TOKENS_FILE, {path!r}, is larger than {MAX_FILE_BYTES} bytes.")
    return text


def _entries(text: str, source: str) -> list[tuple[str, Caller]]:
    found = list(_parse(text, source))
    if not found:
        raise InvalidSettings(f"There is no token in {source}.", hint="Put one in, as name:token, or unset it.")
    return found


def _parse(text: str, source: str) -> Iterator[tuple[str, Caller]]:
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    entries = (entry.strip() for line in lines for entry in line.split(","))
    for number, entry in enumerate(filter(None, entries), start=1):
        name, _, rest = entry.partition(":")
        token, colon, limit = rest.partition(":")
        if not _NAME.fullmatch(name) or not _TOKEN.fullmatch(token) or (colon and not _LIMIT.fullmatch(limit)):
            # The entry itself is not repeated: it may be a token without its name.
            raise InvalidSettings(
                f"Entry {number} of {source} is no token.",
                hint="Write name:token or name:token:limit. A name has small letters, digits and '-'; a token has 16 to 512 "
                "letters, digits and . _ ~ + / = -, such as `openssl rand -hex 24` makes one; a limit is a whole number.",
            )
        yield token, Caller(name, int(limit) if limit else None)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
