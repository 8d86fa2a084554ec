"""Where the service is, and the addresses that it tells us. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from cloche._kit.fields import field as member
from cloche._kit.places import Place, parse

EXECD_PORT = 44772
MAX_HEADERS, MAX_HEADER_BYTES = 16, 4096
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
_HEADER_TEXT = re.compile(r"([!-~]([ -~]*[!-~])?)?")
_OURS = frozenset(
    {"host", "connection", "content-length", "content-type", "transfer-encoding", "te", "upgrade", "expect"}
)
"""Headers by which a request is told from the next one, and what only we know."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where execd of a sandbox is, in the order in which to try, and what each request has to carry."""

    places: tuple[Place, ...]
    headers: dict[str, str] = field(default_factory=dict, repr=False)


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
