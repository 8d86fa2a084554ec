"""Whether to connect where a service sends us. Pure.

Who runs the service, or has broken into it, chooses the address that execd is said to have. Followed blindly it would lead
into whatever network this process can reach, with our headers and the script: server-side request forgery.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
METADATA = frozenset({ipaddress.ip_address("168.63.129.16"), ipaddress.ip_address("192.0.0.192")})
"""Services of clouds that give secrets to their machines, at addresses that are not private: Microsoft's, and Oracle's, which is
public to a Python with CVE-2024-4032. All others are link-local or private."""
_UNICAST = ipaddress.ip_network("2000::/3")
"""What IANA hands out of IPv6. ``is_global`` is true of more: site-local addresses, IPv4 in forms that nobody uses any more, and
up to that CVE what NAT64 has at home (64:ff9b:1::/48, RFC 8215)."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Allowed:
    """The service's own host, and the allow-list of the settings.

    ================== ================================================================================================
    entry              what it allows
    ================== ================================================================================================
    ``box.example``    that host, whatever its address
    ``*.example``      every host below it, as long as its address is a public one
    ``10.1.2.3``       that address, under whatever name
    ``10.1.0.0/16``    these addresses, under whatever name
    ================== ================================================================================================
    """

    own: str
    names: frozenset[str]
    suffixes: tuple[str, ...]
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]

    @classmethod
    def of(cls, own: str, entries: Iterable[str]) -> Allowed:
        """From the host of the service's API, and the entries of the settings.

        Raises:
            ValueError: an entry is none.
        """
        names, suffixes, networks = set[str](), list[str](), list[ipaddress.IPv4Network | ipaddress.IPv6Network]()
        for entry in entries:
            text = entry.lower().strip("[]").rstrip(".")
            if text.startswith("*"):
                suffixes.append(text.removeprefix("*"))
                continue
            try:
                networks.append(ipaddress.ip_network(text, strict=False))
            except ValueError:
                if "/" in text:
                    raise
                names.add(text)
        return cls(_spelled(own), frozenset(names), tuple(suffixes), tuple(networks))

    def __call__(self, host: str, address: IPAddress) -> bool:
        """Whether to connect to ``host`` at ``address``."""
        host, meant = _spelled(host.lower().rstrip(".")), _meant(address)
        if host == self.own or host in self.names:
            return True
        if any(meant in network or address in network for network in self.networks):
            return True
        return any(map(host.endswith, self.suffixes)) and _is_public(meant)


def _is_public(address: IPAddress) -> bool:
    unicast = isinstance(address, ipaddress.IPv4Address) or address in _UNICAST
    return unicast and address.is_global and address not in METADATA


def _spelled(host: str) -> str:
    """One spelling for each address of IPv6."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _meant(address: IPAddress) -> IPAddress:
    """The IPv4 address that one of IPv6 stands for, where it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
