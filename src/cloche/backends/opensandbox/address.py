"""Where the service is, and the addresses that it tells us. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from cloche._kit.fields import field as member

EXECD_PORT = 44772
MAX_TEXT = 2048
MAX_HEADERS, MAX_HEADER_BYTES = 16, 4096
_ADDRESS = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<user>[^\s/?#@\\]+@)?(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?P<port>:[0-9]{1,5})?"
    r"(?P<path>/[!-\"$->@-\[\]-~]*)?"  # printable ASCII without ? # and backslash
)
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
_HEADER_TEXT = re.compile(r"[ -~]*")
_OURS = frozenset(
    {"host", "connection", "content-length", "content-type", "transfer-encoding", "te", "upgrade", "expect"}
)
"""Headers by which a request is told from the next one, and what only we know."""


@dataclass(frozen=True, slots=True)
class Place:
    """An address, taken apart."""

    scheme: str
    host: str
    """A name in lower case without a dot at its end, or an IP address without brackets."""
    authority: str
    """With user and port, as it stands in a URL."""
    path: str
    """Without a slash at its end; empty, or begins with one."""

    @property
    def base(self) -> str:
        """As a URL."""
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def shown(self) -> str:
        """The same for people, without a password."""
        return f"{self.scheme}://{self.authority.rpartition('@')[2]}{self.path}"

    @property
    def origin(self) -> tuple[str, str]:
        """Scheme, and host with port."""
        return self.scheme, self.authority.rpartition("@")[2].lower()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where execd of a sandbox is, in the order in which to try, and what each request has to carry."""

    places: tuple[Place, ...]
    headers: dict[str, str] = field(default_factory=dict, repr=False)


def parse(text: str, scheme: str) -> Place:
    """An address with or without a scheme.

    Raises:
        ValueError: it is none.
    """
    match = _ADDRESS.fullmatch(text) if len(text) <= MAX_TEXT else None
    port = 0 if match is None else int((match["port"] or ":1")[1:])
    if match is None or not 0 < port < 65536 or any(part in {".", ".."} for part in (match["path"] or "").split("/")):
        raise ValueError("no address")
    host = match["host"].strip("[]").lower().rstrip(".")
    if not host:
        raise ValueError("no host")
    authority = (match["user"] or "") + match["host"] + (match["port"] or "")
    return Place(match["scheme"] or scheme, host, authority, (match["path"] or "").rstrip("/"))


def api(text: str) -> Place:
    """The service's address as the settings have it: https where no scheme is said, and without the version that a user may
    have put at its end.

    Raises:
        ValueError: it is none.
    """
    place = parse(text, "https")
    return Place(place.scheme, place.host, place.authority, place.path.removesuffix("/v1").rstrip("/"))


def endpoint(answer: object, service: Place, *, proxied: bool) -> Endpoint:
    """What the service says of where execd is. ``proxied``: it leads through the service itself.

    Raises:
        ValueError: that is no address, or it carries headers that no request can.
    """
    place = parse(member(answer, "endpoint", str, ""), service.scheme if proxied else "http")
    if "@" in place.authority:
        raise ValueError("an address with a user")
    places = [place]
    # There the port is execd's own, and the suffix has it pass each request on to itself: one connection more for each, and a
    # few answers in a thousand cut off. Other services need the suffix.
    if not proxied and place.path.endswith(suffix := f"/proxy/{EXECD_PORT}"):
        path = place.path.removesuffix(suffix).rstrip("/")
        places.insert(0, Place(place.scheme, place.host, place.authority, path))
    return Endpoint(tuple(places), _headers(member(answer, "headers", dict, {})))


def _headers(found: dict[object, object]) -> dict[str, str]:
    headers = {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}
    size = sum(len(name) + len(text) for name, text in headers.items())
    if len(headers) < len(found) or len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        raise ValueError("headers that are none, or too many")
    for name, text in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_TEXT.fullmatch(text) or name.lower() in _OURS:
            raise ValueError("a header that no request can carry")
    return headers
