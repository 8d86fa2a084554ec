"""The bundle, read back by a reader of the tests' own."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloche.spec import Limits
from cloche.supervisor.bundle import CHUNK_BYTES, MAX_RECORD_BYTES, Bundle, Entry, File, Folder, Link

RAW = st.binary(max_size=40).map(lambda raw: raw.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
NAME = RAW.map(lambda name: name.replace("/", "_").replace("=", "_") or "a")
ENTRY: st.SearchStrategy[Entry] = st.one_of(
    st.builds(Folder, NAME), st.builds(File, NAME, st.binary(max_size=300), st.booleans()), st.builds(Link, NAME, NAME)
)


def records(data: bytes) -> Iterator[tuple[str, bytes]]:
    while data:
        kind, size = struct.unpack_from("<cI", data)
        assert size <= MAX_RECORD_BYTES
        payload = data[5 : 5 + size]
        assert len(payload) == size
        yield kind.decode(), payload
        data = data[5 + size :]


def read(data: bytes) -> dict[str, Any]:
    """What a reader makes of a bundle, as the format's page says."""
    found: dict[str, Any] = {"limits": {}, "argv": [], "env": {}, "entries": [], "stdin": None}
    sink: list[bytes] = []
    kinds = ""
    for kind, payload in records(data):
        kinds += kind
        match kind:
            case "M":
                assert payload == b"cloche-bundle 1"
            case "L":
                name, _, value = payload.partition(b"=")
                found["limits"][name.decode()] = int(value)
            case "A":
                found["argv"].append(payload)
            case "E":
                name, _, value = payload.partition(b"=")
                found["env"][name] = value
            case "D":
                found["entries"].append(("D", payload))
            case "F":
                sink = []
                found["entries"].append(("F", payload[:1], payload[1:], sink))
            case "S":
                target, _, path = payload.partition(b"\0")
                found["entries"].append(("S", path, target))
            case "I":
                found["stdin"] = sink = []
            case "C":
                sink.append(payload)
            case "Z":
                assert payload == b""
            case _:
                pytest.fail(f"a record of kind {kind}")
    assert kinds.startswith("M")
    assert kinds.endswith("Z")
    assert "Z" not in kinds[:-1]
    return found


def raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@given(
    st.lists(RAW, max_size=5),
    st.dictionaries(NAME, RAW, max_size=5),
    st.lists(ENTRY, max_size=6),
    st.none() | st.binary(max_size=300),
)
def test_there_and_back(argv: list[str], env: dict[str, str], entries: list[Entry], stdin: bytes | None) -> None:
    """Whatever goes into a bundle comes out of it, byte for byte, with the links last."""
    bundle = Bundle(argv, env, Limits(timeout_s=1.5, grace_s=0.25), entries, stdin)
    written = b"".join(bundle.records())
    assert bundle.delivery_bytes == len(written)
    found = read(written)
    assert found["limits"] == {
        "timeout_ms": 1500,
        "grace_ms": 250,
        "output_bytes": 2**20,
        "artifact_bytes": 4 * 2**20,
        "artifact_count": 256,
    }
    assert found["argv"] == [raw(arg) for arg in argv]
    assert found["env"] == {raw(name): raw(value) for name, value in env.items()}
    expected: list[tuple[Any, ...]] = []
    for entry in [e for e in entries if not isinstance(e, Link)] + [e for e in entries if isinstance(e, Link)]:
        match entry:
            case Folder():
                expected.append(("D", raw(entry.path)))
            case File():
                expected.append(("F", b"x" if entry.executable else b"-", raw(entry.path), entry.data))
            case Link():
                expected.append(("S", raw(entry.path), raw(entry.target)))
    assert [(*e[:3], b"".join(e[3])) if e[0] == "F" else e for e in found["entries"]] == expected
    assert (None if found["stdin"] is None else b"".join(found["stdin"])) == stdin
    assert bundle.payload_bytes == sum(len(e.data) for e in entries if isinstance(e, File)) + len(stdin or b"")


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_large_files_are_cut_into_records(size: int) -> None:
    """A file of any size is a sequence of bounded records."""
    data = bytes(range(256)) * (size // 256 + 1)
    bundle = Bundle(["a"], {}, Limits(), [File("f", data[:size])], data[:size])
    written = b"".join(bundle.records())
    assert bundle.delivery_bytes == len(written)
    found = read(written)
    assert b"".join(found["entries"][0][3]) == data[:size]


def test_a_record_is_bounded() -> None:
    """An argument over the bound of a record is refused, not written."""
    with pytest.raises(ValueError, match="over the bound"):
        list(Bundle(["x" * (MAX_RECORD_BYTES + 1)], {}, Limits()).records())
