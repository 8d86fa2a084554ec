"""Where the service is, and the addresses that it tells us. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from cloche._kit.fields import field as member

EXECD_PORT = 44772
MAX_TEXT = 2048
MAX_HEADERS, MAX_HEADER_BYTES = 16, 4096
_ADDRESS = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<user>[^\s/?#@\\]+@)?(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?P<port>:[0-9]{1,5})?"
    r"(?P<path>/[!-\"$->@-\[\]-~]*)?"  # printable ASCII without ? # and backslash
)
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
_HEADER_TEXT = re.compile(r"([!-~]([ -~]*[!-~])?)?")
_PORTS = {"http": "80", "https": "443"}
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
    """Host and port, as they stand in a URL."""
    path: str
    """Without a slash at its end; empty, or begins with one."""
    user: str = field(default="", repr=False)
    """A user and a password as they stood in the URL, for whoever stands before a server and wants them (RFC 7617)."""

    @property
    def base(self) -> str:
        """As a URL, without user and password."""
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def origin(self) -> tuple[str, str, str]:
        """Scheme, host and port."""
        port = self.authority.rpartition("]")[2].rpartition(":")[2] if self._has_port else _PORTS[self.scheme]
        return self.scheme, self.host, port

    @property
    def _has_port(self) -> bool:
        return ":" in self.authority.rpartition("]")[2]


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
    authority, path = match["host"] + (match["port"] or ""), (match["path"] or "").rstrip("/")
    return Place(match["scheme"] or scheme, host, authority, path, (match["user"] or "").removesuffix("@"))


def api(text: str) -> Place:
    """The service's address as the settings have it: https where no scheme is said, and without the version that a user may
    have put at its end.

    Raises:
        ValueError: it is none.
    """
    place = parse(text, "https")
    return replace(place, path=place.path.removesuffix("/v1").rstrip("/"))


def endpoint(answer: object) -> Endpoint:
    """What the service says of where execd is.

    Raises:
        ValueError: that is no address, or it carries headers that no request can.
    """
    place = parse(member(answer, "endpoint", str, ""), "http")
    if place.user:
        raise ValueError("an address with a user")
    places = [place]
    # There the port is execd's own, and the suffix has it pass each request on to itself: one connection more for each, and a
    # few answers in a thousand cut off. Other services need the suffix.
    if place.path.endswith(suffix := f"/proxy/{EXECD_PORT}"):
        places.insert(0, replace(place, path=place.path.removesuffix(suffix).rstrip("/")))
    return Endpoint(tuple(places), _headers(answer))


def through_the_service(answer: object, service: Place, name: str) -> Endpoint:
    """Where execd of a sandbox is, by way of the service itself. Its answer has the headers; the address in it is what the
    service believes to be its own (``eip``), and we know that better.

    Raises:
        ValueError: it carries headers that no request can.
    """
    return Endpoint(
        (replace(service, path=f"{service.path}/v1/sandboxes/{name}/proxy/{EXECD_PORT}"),), _headers(answer)
    )


def _headers(answer: object) -> dict[str, str]:
    found = member(answer, "headers", dict, {})
    headers = {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}
    size = sum(len(name) + len(text) for name, text in headers.items())
    if len(headers) < len(found) or len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        raise ValueError("headers that are none, or too many")
    for name, text in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_TEXT.fullmatch(text) or name.lower() in _OURS:
            raise ValueError("a header that no request can carry")
    return headers
