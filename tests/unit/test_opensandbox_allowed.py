"""Whether to connect where a service sends us. Everything here is an attack, or what an attack must not be mistaken for."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloche.backends.opensandbox.allowed import Allowed

PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111"]
INTERNAL = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",  # Alibaba's metadata
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",  # Microsoft's
    "169.254.169.254",  # of nearly all others
    "169.254.170.2",  # of Amazon's containers
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",  # Oracle's
    "192.168.1.1",
    "198.18.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fc00::1",
    "fd00:ec2::254",  # Amazon's
    "fd20:ce::254",  # Google's
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "100::1",
]


def number(text: str) -> int:
    return int(ipaddress.IPv4Address(text))


def mapped(text: str) -> str:
    return f"::ffff:{text}"


def six_to_four(text: str) -> str:
    return str(ipaddress.IPv6Address((0x2002 << 112) | (number(text) << 80) | 1))


def nat64(text: str) -> str:
    return f"64:ff9b::{text}"


def local_nat64(text: str) -> str:
    return f"64:ff9b:1::{text}"


def compatible(text: str) -> str:
    return f"::{text}"


def translated(text: str) -> str:
    return f"::ffff:0:{text}"


def go(host: str, at: str, *entries: str, own: str = "api.example") -> bool:
    return Allowed.of(own, entries)(host, ipaddress.ip_address(at))


@pytest.mark.parametrize("at", [*PUBLIC, *INTERNAL])
def test_own_host(at: str) -> None:
    """The service's own host is spoken to anyway, wherever it is; nothing else is without an allow-list."""
    assert go("api.example", at)
    assert go("API.Example.", at)
    assert not go("other.example", at)
    assert not go(at, at)


@pytest.mark.parametrize("host", ["box.api.example", "api.example.evil.example", "xapi.example", "example", "", "."])
def test_not_own_host(host: str) -> None:
    """A host that only looks like the service's own is another one."""
    assert not go(host, "8.8.8.8")


@pytest.mark.parametrize("entry", ["box.example", "BOX.example", "box.example.", "other,box.example"])
@pytest.mark.parametrize("at", [*PUBLIC, *INTERNAL])
def test_name(entry: str, at: str) -> None:
    """A host that is on the list by its name is allowed at whatever address, in whatever letters, and no other host is."""
    entries = entry.split(",")
    assert go("box.example", at, *entries)
    assert go("Box.Example.", at, *entries)
    for host in ("a.box.example", "box.example.evil.example", "xbox.example", "box-example", at):
        assert not go(host, at, *entries)


@pytest.mark.parametrize("at", PUBLIC)
def test_wildcard(at: str) -> None:
    """A wildcard stands for each host below a name, at any depth, but neither for the name itself nor for one that ends alike."""
    for host in ("a.example", "a.b.example", "A.EXAMPLE."):
        assert go(host, at, "*.example")
        assert go(host, at, "*.Example.")
    for host in ("example", "evil-example", "evilexample", "a.example.evil", "a.evil-example", "", at):
        assert not go(host, at, "*.example")
    assert not go("evil-box.example", at, "*.box.example")
    assert go("anything", at, "*")


@pytest.mark.parametrize("at", INTERNAL)
@pytest.mark.parametrize("entry", ["*", "*.example"])
def test_wildcard_at_an_address_that_is_not_public(entry: str, at: str) -> None:
    """Whoever names hosts below a name could give them any address, so a wildcard allows public ones alone."""
    assert not go("a.example", at, entry)


@pytest.mark.parametrize("form", [mapped, six_to_four, nat64, local_nat64, compatible, translated])
@pytest.mark.parametrize("at", [at for at in INTERNAL if ":" not in at])
def test_wildcard_at_another_form_of_such_an_address(form: Callable[[str], str], at: str) -> None:
    """An address of IPv6 that stands for one of IPv4, or may, is as little public as that one."""
    assert not go("a.example", form(at), "*.example")


@pytest.mark.parametrize("form", [mapped, six_to_four, nat64])
def test_wildcard_at_another_form_of_a_public_address(form: Callable[[str], str]) -> None:
    """Where there is no IPv4 a public address is reached through its other form."""
    assert go("a.example", form("8.8.8.8"), "*.example")


@pytest.mark.parametrize(
    ("entry", "at", "yes"),
    [
        ("10.1.0.0/16", "10.1.255.255", True),
        ("10.1.0.0/16", "10.2.0.0", False),
        ("10.1.2.3/16", "10.1.9.9", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.4", False),
        ("10.1.2.3", "8.8.8.8", False),
        ("10.1.0.0/255.255.0.0", "10.1.9.9", True),
        ("169.254.169.254", "169.254.169.254", True),
        ("fd00::/64", "fd00::1", True),
        ("fd00::/64", "fd00:0:0:1::1", False),
        ("[fd00::1]", "fd00::1", True),
        ("FD00::1", "fd00::1", True),
        ("fd00::1", "fd00::2", False),
        ("::1", "::1", True),
        ("::1", "127.0.0.1", False),
        ("127.0.0.1", "::1", False),
        ("0.0.0.0/0", "10.1.2.3", True),
        ("0.0.0.0/0", "fd00::1", False),
        ("::/0", "fd00::1", True),
        ("::/0", "10.1.2.3", False),
        ("10.1.0.0/16", "::ffff:10.1.2.3", True),
        ("10.1.0.0/16", "::ffff:10.2.2.3", False),
        ("::ffff:10.1.0.0/112", "::ffff:10.1.2.3", True),
    ],
)
def test_network(entry: str, at: str, *, yes: bool) -> None:
    """An address or a network on the list is allowed under whatever name, and no address beside it."""
    for host in ("any.example", at, "xn--bcher-kva.example"):
        assert go(host, at, entry) is yes


@given(st.ip_addresses(), st.sampled_from(["a.example", "evil.test", "api.example.", "127.0.0.1"]))
def test_each_entry_alone_decides(at: ipaddress.IPv4Address | ipaddress.IPv6Address, host: str) -> None:
    """What a list allows is what one of its entries allows."""
    entries = ["box.test", "*.example", "10.0.0.0/8", "fd00::/8", "::1"]
    alone = any(Allowed.of("api.example", [entry])(host, at) for entry in entries)
    assert Allowed.of("api.example", entries)(host, at) is alone


@pytest.mark.parametrize("entry", ["10.0.0.0/33", "box.example/8", "/8", "10.0.0.0/8/8", "fd00::/129", "http://box"])
def test_entry_that_is_none(entry: str) -> None:
    """A network that is none is refused, not taken for the name of a host."""
    with pytest.raises(ValueError, match="network"):
        Allowed.of("api.example", [entry])
