"""What the service's answers mean: also those that no service gives."""

from __future__ import annotations

import json
import platform
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloche._kit.fields import MAX_LINE, shortened
from cloche.backends.opensandbox import facts
from cloche.backends.opensandbox.facts import Refusal, Sandbox

ODD: list[Any] = [
    None,
    7,
    True,
    "x",
    [],
    [7],
    {},
    {"id": 7},
    {"id": None},
    {"id": ["s1"]},
    {"ID": "s1"},
    {"status": {}},
]


@pytest.mark.parametrize(
    "text",
    [
        "s",
        "0",
        "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
        "fsb-abc.1_2",
        "A" * 128,
        "a..b",
    ],
)
def test_id(text: str) -> None:
    """An id is one word of letters, digits and a few signs, which means nothing in a path or a query."""
    assert facts.is_id(text)
    found = facts.parse_sandbox({"id": text})
    assert found == Sandbox(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "..",
        "../x",
        "..%2fx",
        "a/b",
        "/a",
        "a/",
        "a\\b",
        "a?b",
        "a#b",
        "a&b=c",
        "a%2e",
        "a b",
        "a\n",
        "\na",
        "a\r\nHost: x",
        "a\0",
        "-a",
        "_a",
        "\u00e9",
        "a\u0661",
        "a" * 129,
        "a" * 200,
    ],
    ids=repr,
)
def test_no_id(text: str) -> None:
    """A sandbox of any other name is none: its name would lead a request elsewhere."""
    assert not facts.is_id(text)
    assert facts.parse_sandbox({"id": text, "status": {"state": "Running"}}) is None


@pytest.mark.parametrize("found", ODD, ids=repr)
def test_no_sandbox(found: object) -> None:
    """What has no name is no sandbox."""
    assert facts.parse_sandbox(found) is None


def test_sandbox() -> None:
    """A sandbox is what the service says of it, as far as that has the right form."""
    found = facts.parse_sandbox(
        {
            "id": "s1",
            "status": {"state": "Failed", "reason": "CONTAINER_EXITED", "message": "exited with\n code 1", "x": 1},
            "metadata": {"cloche-run": "r1", "n": 7, "none": None, "list": []},
            "createdAt": "2026-01-01T00:00:00.5Z",
            "entrypoint": ["tail"],
        }
    )
    assert found == Sandbox(
        "s1", "Failed", "CONTAINER_EXITED", "exited with code 1", {"cloche-run": "r1"}, 1767225600.5
    )


@pytest.mark.parametrize(
    "odd", [None, 7, True, "x", [], ["x"], {}, {"state": 7}, {"state": {}, "reason": [], "message": 1}], ids=repr
)
def test_sandbox_of_which_nothing_is_known(odd: object) -> None:
    """A status, metadata or a time of another form count as not said."""
    found = facts.parse_sandbox(
        {"id": "s1", "status": odd, "metadata": None if isinstance(odd, dict) else odd, "createdAt": odd}
    )
    assert found == Sandbox("s1")
    assert not found.dead


@pytest.mark.parametrize("text", ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00", "2026-01-01T01:00:00+01:00"])
def test_time(text: str) -> None:
    """A time without a zone is one of UTC, whatever this machine's zone is."""
    found = facts.parse_sandbox({"id": "s1", "createdAt": text})
    assert found is not None
    assert found.created_at == 1767225600.0


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01T00:00:00Z", "9" * 400, "\ud800"], ids=repr)
def test_time_that_is_none(text: str) -> None:
    """What is no time is not said."""
    assert facts.parse_sandbox({"id": "s1", "createdAt": text}) == Sandbox("s1")


@pytest.mark.parametrize(
    ("state", "dead"),
    [
        ("Pending", False),
        ("Running", False),
        ("Pausing", False),
        ("Paused", False),
        ("Resuming", False),
        ("Stopping", False),
        ("Unknown", False),
        ("Terminated", True),
        ("Failed", True),
        ("", False),
        ("failed", False),
        ("FailedOver", False),
    ],
)
def test_dead(state: str, *, dead: bool) -> None:
    """Only a sandbox that the service calls failed or terminated has ended; a state that nobody knows may pass."""
    found = facts.parse_sandbox({"id": "s1", "status": {"state": state}})
    assert found is not None
    assert found.dead is dead


LONG = "long\n\x1b[31m words\u202e\u0085\ud800 " * 10_000


def test_texts_of_a_sandbox_are_bounded() -> None:
    """What the service says of a sandbox is a line of people's characters and bounded, however long it is."""
    found = facts.parse_sandbox({"id": "s1", "status": {"state": LONG, "reason": LONG, "message": LONG}})
    assert found is not None
    for text, most in ((found.state, 64), (found.reason, MAX_LINE), (found.message, MAX_LINE)):
        assert 0 < len(text) <= most
        assert text.isprintable()


def refusal(body: object, status: int = 400, **headers: str) -> Refusal:
    given_headers = {name.replace("_", "-"): text for name, text in headers.items()}
    return facts.parse_refusal(status, given_headers, body if isinstance(body, bytes) else json.dumps(body).encode())


NOT_FOUND = "DOCKER::SANDBOX_NOT_FOUND"
WRONG = {"type": "missing", "loc": ["body", "resourceLimits", 0, "cpu"], "msg": "Field required"}


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"code": NOT_FOUND, "message": "no s1"}, NOT_FOUND, "no s1"),
        ({"detail": [WRONG]}, "", "resourceLimits.0.cpu: Field required"),
        ({"detail": [WRONG, {"msg": "b"}]}, "", "resourceLimits.0.cpu: Field required; b"),
        ({"detail": [{"loc": [], "msg": "a"}]}, "", "a"),
        ({"detail": [{"msg": str(n)} for n in range(9)]}, "", "0; 1; 2; 3; 4"),
        ({"detail": "Not Found"}, "", "Not Found"),
        (b"Internal Server Error", "", "Internal Server Error"),
        (b"  Service\r\n Unavailable\n", "", "Service Unavailable"),
        ({"error": "Unauthorized: invalid or missing header"}, "", "Unauthorized: invalid or missing header"),
        # As FastAPI has it where nobody unwraps it.
        ({"detail": {"code": NOT_FOUND, "message": "no s1"}}, NOT_FOUND, "no s1"),
        ({"code": "A", "message": "a", "detail": {"code": "B", "message": "b"}, "error": "c"}, "A", "a"),
        ({"code": "A", "detail": "b"}, "A", "b"),
        ({"code": "A"}, "A", ""),
        (b"", "", ""),
        ({}, "", ""),
        ([], "", ""),
        (7, "", ""),
        ("text", "", ""),
        ({"code": 7, "message": ["a"], "error": {}}, "", ""),
        ({"code": True, "detail": 7}, "", ""),
        ({"detail": None}, "", ""),
        ({"detail": [None, 7, "x", [], {}]}, "", "; ; ; ;"),
        ({"detail": [{"loc": "body", "msg": 7}]}, "", ""),
        ({"detail": {"code": 7, "message": 7}}, "", ""),
        (b"\xff\xfe{", "", "\ufffd\ufffd{"),
        (b"[" * 3000, "", "[" * (MAX_LINE - 1) + "…"),
        (b'{"code":"A","message":"' + b"9" * 10 + b'"', "", '{"code":"A","message":"9999999999"'),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refusal(body: object, code: str, message: str) -> None:
    """Each of the shapes that errors have, and what has none of them, is a code and a message as far as it says them."""
    assert refusal(body, 418) == Refusal(418, code, message)


@pytest.mark.parametrize(
    "body",
    [
        {"code": LONG, "message": LONG},
        {"detail": [{"loc": ["body", LONG], "msg": LONG}] * 9},
        {"detail": LONG},
        {"error": LONG},
        {"detail": {"code": LONG, "message": LONG}},
        LONG.encode("utf-8", "replace"),
        b"x" * 10**6,
        b"\xff" * 10**6,
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refusals_are_bounded(body: object) -> None:
    """A refusal is a line of people's characters and bounded, however long what the service said is."""
    found = refusal(body)
    assert 0 < len(found.message) <= MAX_LINE
    assert len(found.code) <= 100
    assert found.message.isprintable()
    assert found.code.isprintable()


@pytest.mark.parametrize("depth", [*range(850, 1010, 4), 100_000])
def test_nested_refusal(depth: int) -> None:
    """Something nested at any depth, where a request was wrong, is never a crash."""
    nested = b"[" * depth + b"]" * depth
    assert refusal(b'{"detail":[{"loc":["body",' + nested + b'],"msg":"a"}]}').status == 400


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("3f-A_b.1", "3f-A_b.1"),
        ("a\r\nb\x1b[31m\u202e\u00e9c", "ab[31mc"),
        ("a" * 65, "a" * 64),
        ("", ""),
    ],
)
def test_request_id(said: str, read: str) -> None:
    """The request's id is what ASCII prints of it, at most 64 characters."""
    assert refusal({}, x_request_id=said).request_id == read


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("0", 0.0),
        ("3", 3.0),
        ("99999", 99999.0),
        ("100000", None),
        ("-3", None),
        ("3.5", None),
        ("1e3", None),
        ("inf", None),
        ("nan", None),
        (" 3", None),
        ("3\n", None),
        ("\u0663", None),
        ("\u00b3", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("", None),
    ],
    ids=repr,
)
def test_retry_after(said: str, read: float | None) -> None:
    """When to come again is a whole number of seconds, of five digits at most; anything else is not said."""
    assert refusal({}, 429, retry_after=said).retry_after_s == read


@given(st.text(), st.integers(1, 40))
def test_shortened(text: str, most: int) -> None:
    """One line for people has no character that they could not see, no two spaces together, and a sign where it was cut."""
    line = shortened(text, most)
    assert len(line) <= most
    assert line.isprintable()
    assert "  " not in line
    assert line == line.strip()


def elf(machine: int, order: int = 1) -> bytes:
    """What a program of Linux begins with (man 5 elf)."""
    return b"\x7fELF" + bytes([2, order, 1]) + bytes(9) + struct.pack("<HH" if order == 1 else ">HH", 2, machine)


@pytest.mark.parametrize(
    ("head", "machine"),
    [
        (elf(62), "x86_64"),
        (elf(62) + bytes(44), "x86_64"),
        (elf(183), "aarch64"),
        (elf(183, 2), "aarch64"),
        (elf(243), "ELF f300"),  # RISC-V
        (elf(22, 2), "ELF 0016"),  # s390x
        (elf(62)[:19], ""),
        (elf(62)[:4], ""),
        (b"", ""),
        (b"#!/bin/sh\n" + bytes(64), ""),
        (b"MZ" + bytes(64), ""),
        (b'{"code":"FILE_NOT_FOUND","message":"x"}', ""),
        (b"\x7fELG" + elf(62)[4:], ""),
    ],
    ids=repr,
)
def test_machine(head: bytes, machine: str) -> None:
    """The architecture of a program is what its head says; of no program it is not known."""
    assert facts.machine_of(head) == machine


@pytest.mark.skipif(sys.platform != "linux", reason="programs have another form here")
def test_machine_of_a_real_program() -> None:
    """The interpreter that runs this is a program for the machine that it runs on."""
    with Path(sys.executable).open("rb") as program:
        assert facts.machine_of(program.read(64)) == platform.machine()
