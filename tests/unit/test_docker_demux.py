"""The attached stream of a container, taken apart."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloche.backends.docker.demux import Demux, DemuxError


def piece(number: int, data: bytes) -> bytes:
    return bytes([number, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


@given(
    st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=8),
    st.lists(st.integers(min_value=0, max_value=400), max_size=12),
)
def test_cut_anywhere(pieces: list[tuple[int, bytes]], cuts: list[int]) -> None:
    """However the bytes are cut, each stream comes out whole and in order."""
    raw = b"".join(piece(number, data) for number, data in pieces)
    places = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    demux = Demux()
    got = {"stdout": b"", "stderr": b""}
    for start, end in itertools.pairwise(places):
        for source, data in demux.feed(raw[start:end]):
            assert data
            got[source] += data
    assert got["stdout"] == b"".join(data for number, data in pieces if number == 1)
    assert got["stderr"] == b"".join(data for number, data in pieces if number == 2)


def test_a_piece_is_handed_on_as_it_comes() -> None:
    """A piece of 4 GiB is not waited for: what has come of it is given at once, and nothing of it is kept."""
    demux = Demux()
    assert list(demux.feed(b"\x01\0\0\0\xff\xff\xff\xffabc")) == [("stdout", b"abc")]
    assert list(demux.feed(b"de")) == [("stdout", b"de")]


@pytest.mark.parametrize(
    "header", [b"\x00\0\0\0\0\0\0\x01", b"\x03\0\0\0\0\0\0\x01", b"\x01\x01\0\0\0\0\0\x01", b"HTTP/1.1"]
)
def test_no_such_stream(header: bytes) -> None:
    """What has no header of such a stream is refused, not passed on as output."""
    with pytest.raises(DemuxError):
        list(Demux().feed(header))
