"""Addresses of servers, as people and other servers write them. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_TEXT = 2048
_ADDRESS = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<user>[^\s/?#@\\]+@)?(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?P<port>:[0-9]{1,5})?"
    r"(?P<path>/[!-\"$->@-\[\]-~]*)?"  # printable ASCII without ? # and backslash
)
_PORTS = {"http": "80", "https": "443"}


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
