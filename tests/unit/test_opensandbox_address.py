"""Where the service is, and the addresses that it tells us: also those that a service made to lead us astray would tell."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cloche._kit import places
from cloche._kit.places import MAX_TEXT
from cloche.backends.opensandbox import address
from cloche.backends.opensandbox.address import EXECD_PORT, MAX_HEADER_BYTES, MAX_HEADERS

SUFFIX = f"/proxy/{EXECD_PORT}"


def bases(text: object) -> list[str]:
    return [place.base for place in address.endpoint({"endpoint": text}).places]


@pytest.mark.parametrize(
    ("text", "base", "host"),
    [
        ("https://sandbox.example", "https://sandbox.example", "sandbox.example"),
        ("http://sandbox.example", "http://sandbox.example", "sandbox.example"),
        ("sandbox.example", "https://sandbox.example", "sandbox.example"),
        ("sandbox.example:8080", "https://sandbox.example:8080", "sandbox.example"),
        ("sandbox.example/v1", "https://sandbox.example", "sandbox.example"),
        ("http://10.1.2.3:8080", "http://10.1.2.3:8080", "10.1.2.3"),
        ("http://box/v1", "http://box", "box"),
        ("http://box/v1/", "http://box", "box"),
        ("http://box/", "http://box", "box"),
        ("http://box/api/v1", "http://box/api", "box"),
        ("http://box/api//v1//", "http://box/api", "box"),
        ("http://box/v1/x", "http://box/v1/x", "box"),
        ("http://box/v12", "http://box/v12", "box"),
        ("http://box/apiv1", "http://box/apiv1", "box"),
        ("http://[::1]:8080/v1", "http://[::1]:8080", "::1"),
        ("[FD00::1]", "https://[FD00::1]", "fd00::1"),
        ("[::ffff:10.1.2.3]:80", "https://[::ffff:10.1.2.3]:80", "::ffff:10.1.2.3"),
        ("http://Sandbox.Example.", "http://Sandbox.Example.", "sandbox.example"),
        ("http://my_box:1", "http://my_box:1", "my_box"),
        ("http://box:65535", "http://box:65535", "box"),
        ("https://user:pass@box:1/v1", "https://box:1", "box"),
        ("https://us%40er:p%2Fss@box", "https://box", "box"),
    ],
)
def test_service(text: str, base: str, host: str) -> None:
    """An address without a scheme means https, the version at its end belongs to each request, and the host is told plainly."""
    place = address.api(text)
    assert (place.base, place.host) == (base, host)
    assert places.parse(place.base, "ftp") == replace(place, user="")


@given(st.text("abz09:%.-_~!$&'()*+,;=é", min_size=1))
def test_a_password_is_kept_apart(user: str) -> None:
    """Neither what is dialled, nor what people see of an address, nor what tells origins apart has user and password in it."""
    place = address.api(f"https://{user}@Box:1/a@b/v1")
    assert (place.base, place.user) == ("https://Box:1/a@b", user)
    assert repr(place) == repr(address.api("https://Box:1/a@b/v1"))
    assert place.origin == ("https", "box", "1")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://Box:1/x", "https://user:pass@box:1/y", True),
        ("https://[FD00::1]:1", "https://[fd00::1]:1", True),
        ("https://box", "https://box:443", True),
        ("http://[fd00::1]", "http://[fd00::1]:80", True),
        ("http://box:443", "http://box", False),
        ("https://box", "http://box", False),
        ("https://box:1", "https://box:2", False),
        ("https://box", "https://box.example", False),
        ("https://box", "https://evil/@box", False),
    ],
)
def test_origin(one: str, other: str, *, same: bool) -> None:
    """Two addresses have one origin when scheme, host and port are the same, in whatever letters."""
    assert (address.api(one).origin == address.api(other).origin) is same


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"127.0.0.1:40000{SUFFIX}", ["http://127.0.0.1:40000", f"http://127.0.0.1:40000{SUFFIX}"]),
        (f"http://box:1{SUFFIX}/", ["http://box:1", f"http://box:1{SUFFIX}"]),
        (f"https://box{SUFFIX}", ["https://box", f"https://box{SUFFIX}"]),
        (f"[fd00::1]:1{SUFFIX}", ["http://[fd00::1]:1", f"http://[fd00::1]:1{SUFFIX}"]),
        (f"box/route/x{SUFFIX}", ["http://box/route/x", f"http://box/route/x{SUFFIX}"]),
        (f"box//{SUFFIX}", ["http://box", f"http://box//{SUFFIX}"]),
        ("127.0.0.1:40001", ["http://127.0.0.1:40001"]),
        ("box:1/proxy/8080", ["http://box:1/proxy/8080"]),
        (f"box:1/xproxy/{EXECD_PORT}", [f"http://box:1/xproxy/{EXECD_PORT}"]),
        (f"box:1{SUFFIX}0", [f"http://box:1{SUFFIX}0"]),
        (f"box:1{SUFFIX}/x", [f"http://box:1{SUFFIX}/x"]),
        ("https://gateway.example/a%2Fb/", ["https://gateway.example/a%2Fb"]),
    ],
)
def test_endpoint(text: str, expected: list[str]) -> None:
    """An address without a scheme means http, and where it has execd pass requests on to itself, the direct way comes first."""
    assert bases(text) == expected


@pytest.mark.parametrize("service", ["http://box:8080/below", "https://user:pass@box:8080/below/v1"])
@pytest.mark.parametrize("said", ["evil.example:1/x", "box:8080/sandboxes/s1/proxy/44772", "", None, 7])
def test_endpoint_through_the_service(service: str, said: object) -> None:
    """The way through the service is where the service is for us, whatever address it says; its headers are kept."""
    place = address.api(service)
    endpoint = address.through_the_service({"endpoint": said, "headers": {"A": "b"}}, place, "s1")
    (found,) = endpoint.places
    assert found.base == f"{place.scheme}://box:8080/below/v1/sandboxes/s1/proxy/{EXECD_PORT}"
    assert found.origin == place.origin
    assert endpoint.headers == {"A": "b"}


HOSTILE = [
    "",
    " ",
    "/",
    "//box",
    ":1",
    "http://",
    "http:///x",
    "http://:1",
    "ftp://box",
    "file:///etc/passwd",
    "unix:///run/docker.sock",
    "javascript:alert(1)",
    "http:box",
    "http://http://box",
    "box:",
    "box:0",
    "box:00000",
    "box:65536",
    "box:99999",
    "box:123456",
    "box:-1",
    "box:+1",
    "box:1x",
    "box:1:2",
    "box:\u0664\u0664",
    "user@box",
    "http://user:pass@box",
    "http://127.0.0.1@box",
    "http://box:1@evil.example:2",
    "box#",
    "box/#x",
    "box#@evil.example",
    "box?x=1",
    "box/?x",
    "box?@evil.example",
    "box\\@evil.example",
    "http:\\\\box",
    "box/a\\..\\b",
    "box/..",
    "box/../x",
    "box/a/../../v1",
    "box/.",
    "box/./x",
    "box/x/..",
    f"box/..{SUFFIX}",
    " box",
    "box ",
    "box/a b",
    "box\n",
    "box:1\n",
    "box/x\n",
    "box\r\nHost: evil.example",
    "box/\r\nX: y",
    "box/\t",
    "box\0",
    "box/\x7f",
    "box/é",
    "b\u00f6x",
    "\uff42ox",
    "box\u3002example",
    "box\u2024example",
    "box%2eexample",
    "box%00",
    ".",
    "...",
    "[",
    "[]",
    "[]:1",
    "[::1",
    "::1",
    "::1]",
    "[::1]x",
    "[fe80::1%25eth0]",
    "[evil.example]",
    "box," * 3,
    "a" * (MAX_TEXT + 1),
    "box/" + "a" * MAX_TEXT,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:40]))
def test_endpoint_that_is_no_address(text: str) -> None:
    """What could be read in two ways, leaves its path, cuts a request in two or is no address at all is refused."""
    with pytest.raises(ValueError, match=r"address|host"):
        bases(text)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        "box:1",
        [],
        ["box:1"],
        {},
        {"endpoint": None},
        {"endpoint": 7},
        {"endpoint": ["box:1"]},
        {"Endpoint": "b"},
    ],
    ids=repr,
)
def test_answer_without_an_endpoint(answer: object) -> None:
    """An answer of another form has no address in it."""
    with pytest.raises(ValueError, match="no address"):
        address.endpoint(answer)


@given(
    st.one_of(
        st.text(st.sampled_from("ab.1:/@#?\\[]%\u0664\u00e9\u3002 \t\r\n-_"), max_size=24),
        st.from_regex(places._ADDRESS, fullmatch=True),
    )
)
@example("[::1]:1")
@example("user:pass@box:1/@evil.example:2")
def test_read_as_it_is_dialled(text: str) -> None:
    """The host that an address is checked by is the one that a request made from it goes to, whatever the text."""
    place = None
    with contextlib.suppress(ValueError):
        place = places.parse(text, "http")
    assume(place is not None)
    assert place is not None
    try:
        url = httpx2.URL(place.base)
    except httpx2.InvalidURL:
        return  # no request is ever made from it
    assert url.host.lower().rstrip(".") == place.host
    assert url.scheme == place.scheme
    assert url.fragment == ""
    assert url.query == b""
    assert url.path.rstrip("/") == httpx2.URL(f"http://x{place.path}").path.rstrip("/")


def headers(found: object) -> dict[str, str]:
    return address.endpoint({"endpoint": "box:1", "headers": found}).headers


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"OpenSandbox-Ingress-To": "s1-44772"},
        {"A": "", "b-2": 'x y ! " ~', "OpenSandbox-Secure-Access": "t0ken="},
        {f"H{n}": "x" for n in range(MAX_HEADERS)},
        {"A": "x" * (MAX_HEADER_BYTES - 1)},
    ],
    ids=lambda found: repr(found)[:40],
)
def test_headers(found: dict[str, str]) -> None:
    """What an ingress wants to see in each request is kept as it is, and not shown."""
    assert headers(found) == found
    endpoint = address.endpoint({"endpoint": "box:1", "headers": {"A": "hush"}})
    assert "hush" not in repr(endpoint)


@pytest.mark.parametrize("found", [None, 7, "A: b", [], [["A", "b"]]], ids=repr)
def test_no_headers(found: object) -> None:
    """Headers of another form count as none."""
    assert headers(found) == {}


ODD_HEADERS: list[dict[Any, Any]] = [
    {"A": "x\r\nHost: evil.example"},
    {"A": "x\n"},
    {"A": "\n"},
    {"A": "x\r"},
    {"A": "x\0"},
    {"A": "x\t"},
    {"A": "\x7f"},
    {"A": "é"},
    {"A\r\nB": "x"},
    {"A\n": "x"},
    {"A:": "x"},
    {"A B": "x"},
    {"": "x"},
    {"\u00c4": "x"},
    {"A" * 65: "x"},
    {"A": 7},
    {"A": None},
    {"A": ["x"]},
    {7: "x"},
    {f"H{n}": "x" for n in range(MAX_HEADERS + 1)},
    {"A": "x" * MAX_HEADER_BYTES},
    *[
        {name: "x"}
        for name in (
            "Host",
            "HOST",
            "host",
            "Content-Length",
            "Content-Type",
            "Transfer-Encoding",
            "transfer-encoding",
            "TE",
            "Connection",
            "Upgrade",
            "Expect",
        )
    ],
]


@pytest.mark.parametrize("found", ODD_HEADERS, ids=lambda found: repr(found)[:40])
def test_headers_that_no_request_can_carry(found: dict[Any, Any]) -> None:
    """A header that would end itself, be another request, or say what only we know spoils the whole answer."""
    with pytest.raises(ValueError, match="header"):
        headers({"Fine": "x", **found} if len(found) == 1 else found)
