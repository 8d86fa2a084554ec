"""The decoder: the same frames however the bytes are cut, and nothing but frames out of anything."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloche.events import StreamName
from cloche.supervisor.frames import (
    MAX_LINE_BYTES,
    MAX_PAYLOAD_BYTES,
    VERSION,
    Data,
    Decoder,
    End,
    Fail,
    File,
    FileData,
    Foreign,
    Frame,
    FrameError,
    Hardening,
    Hello,
    Start,
)
from cloche.testing.fake import encode_frame, encode_frames, end

HELLO = Hello(VERSION, 1, 0)
NUMBER = st.integers(0, 10**18 - 1)
PAYLOAD = st.binary(min_size=1, max_size=200)
NAME = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name not in {".", ".."}
)
PATH = st.lists(NAME, min_size=1, max_size=4).map("/".join)


@st.composite
def bodies(draw: st.DrawFn) -> list[Frame]:
    """What stands between start and end: output whose offsets rise, and files with their data."""
    ends: dict[str, int] = {"stdout": 0, "stderr": 0}
    frames: list[Frame] = []
    for _ in range(draw(st.integers(0, 8))):
        stream = cast("StreamName", draw(st.sampled_from(["stdout", "stderr"])))
        offset = ends[stream] + draw(st.sampled_from([0, 0, 5]))
        data = draw(PAYLOAD)
        frames.append(Data(stream, offset, data))
        ends[stream] = offset + len(data)
    for path in draw(st.lists(PATH, max_size=3)):
        frames.append(File(path, draw(NUMBER), draw(st.booleans())))
        frames.extend(FileData(data) for data in draw(st.lists(PAYLOAD, max_size=2)))
    return frames


ENDS = st.builds(
    lambda exits, number, **rest: End(number if exits else None, None if exits else number % 64 + 1, **rest),
    st.booleans(),
    st.integers(0, 255),
    cause=st.sampled_from(["none", "timeout", "memory", "cancel"]),
    run_us=NUMBER,
    cpu_us=NUMBER,
    peak_memory_bytes=NUMBER,
    oom_kills=NUMBER,
    stdout_bytes=NUMBER,
    stderr_bytes=NUMBER,
    stdout_truncated=st.booleans(),
    stderr_truncated=st.booleans(),
    artifacts_skipped=NUMBER,
    hardening=st.integers(0, 4095).map(Hardening),
)
FAILS = st.builds(Fail, st.sampled_from(["interpreter-missing", "invalid-spec"]), st.text(min_size=1, max_size=40))
RUNS = st.one_of(
    st.builds(lambda body, last: [HELLO, Start(), *body, last], bodies(), ENDS),
    st.builds(lambda last: [HELLO, last], FAILS.filter(lambda f: f.message.isascii())),
)


def decode(pieces: Iterable[bytes]) -> list[Frame | Foreign]:
    decoder = Decoder()
    return [frame for piece in pieces for frame in decoder.feed(piece)]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(bounds)]


@given(RUNS, st.lists(st.integers(0, 10**6), max_size=12))
def test_cut_anywhere(frames: list[Frame], places: list[int]) -> None:
    """However the bytes are cut, the frames are those that were written."""
    assert decode(cut(encode_frames(frames), places)) == frames


@given(RUNS, st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_read_again(frames: list[Frame], losses: list[int]) -> None:
    """A stream that is lost anywhere, and read again from its start, gives every frame once."""
    data = encode_frames(frames)
    decoder = Decoder()
    given_out: list[Frame | Foreign] = []
    for loss in losses:
        given_out += decoder.feed(data[: loss % (len(data) + 1)])
        decoder.restart()
    given_out += decoder.feed(data)
    assert given_out == frames
    assert decoder.finished


@given(
    st.lists(
        st.binary(max_size=300) | st.sampled_from([b"@c 0 hello 1 1 0\n", b"@c 1 start\n", b"@c 2 o 0 "]), max_size=20
    )
)
def test_noise(pieces: list[bytes]) -> None:
    """Bytes that no supervisor wrote never become output or an end: they are foreign, or an error."""
    decoder = Decoder()
    try:
        for piece in pieces:
            for frame in decoder.feed(piece):
                assert isinstance(frame, Foreign | Hello | Start) or frame.__class__ is Data
                if isinstance(frame, Data):  # only what has the whole form of such a frame
                    assert b"@c 2 o 0 " in b"".join(pieces)
    except FrameError:
        pass
    assert len(decoder._partial) < MAX_LINE_BYTES + 300


@given(st.integers(1, 64))
def test_memory_is_bounded(size: int) -> None:
    """A line without an end is refused before it fills the memory."""
    decoder = Decoder()
    pieces = (decoder.feed(b"x" * size) for _ in range(MAX_LINE_BYTES // size + 1))
    with pytest.raises(FrameError, match="over-long"):
        list(chain.from_iterable(pieces))
    assert len(decoder._partial) <= MAX_LINE_BYTES + size


@pytest.mark.parametrize(
    "text",
    [
        b"@c 0 hello 2 1 0",  # another version
        b"@c 1 hello 1 1 0",  # a frame is missing
        b"@c 0 start",  # no hello
        b"@c 0 hello 1 1",
        b"@c 00 hello 1 1 0",
        b"@c 0 hello 1 1 0\n@c 1 hello 1 1 0",
        b"@c 0 hello 1 1 0\n@c 1 o 0 YQ==",  # output before the start
        b"@c 0 hello 1 1 0\n@c 1 start x",
        b"@c 0 hello 1 1 0\n@c 1 start\n@c 2 start",
        b"@c 0 hello 1 1 0\n@c 1 start\n@c 2 o 0 YQ",  # base64 without its padding
        b"@c 0 hello 1 1 0\n@c 1 start\n@c 2 o 5 YQ==\n@c 3 o 5 YQ==",  # going back
        b"@c 0 hello 1 1 0\n@c 1 start\n@c 2 data YQ==",  # data of no file
        b"@c 0 hello 1 1 0\n@c 1 start\n@c 2 file 1 0 L2V0Yy94",  # /etc/x
        b"@c 0 hello 1 1 0\n@c 1 start\n@c 2 file 1 0 Li4veA==",  # ../x
        b"@c 0 hello 1 1 0\n@c 1 start\n@c 2 end exit 256 none 0 0 0 0 0 0 0 0 0 0",
        b"@c 0 hello 1 1 0\n@c 1 start\n@c 2 end signal 0 none 0 0 0 0 0 0 0 0 0 0",
        b"@c 0 hello 1 1 0\n@c 1 start\n@c 2 end signal 65 none 0 0 0 0 0 0 0 0 0 0",
        b"@c 0 hello 1 1 0\n@c 1 end exit 0 none 0 0 0 0 0 0 0 0 0 0",  # an end without a start
        b"@c 0 hello 1 1 0\n@c 1 fail interpreter-missing YQ==\n@c 2 start",  # after the last one
        b"@c 0 hello 1 1 0\n@c 1 whatever",
        b"@c ",
    ],
)
def test_malformed(text: bytes) -> None:
    """A line that has the magic and is no frame, or is out of order, is an error."""
    with pytest.raises(FrameError):
        decode([text + b"\n"])


def test_foreign_lines() -> None:
    """A line without the magic is given out as foreign, for the reader to judge."""
    assert decode([b"unable to retrieve container logs\n\n"]) == [
        Foreign(b"unable to retrieve container logs"),
        Foreign(b""),
    ]


def test_largest_frame_fits_a_line() -> None:
    """A full frame of the largest numbers is under the bound of a line."""
    line = encode_frame(10**18 - 1, Data("stdout", 10**18 - 1, b"x" * MAX_PAYLOAD_BYTES))
    assert len(line) < MAX_LINE_BYTES


def test_cut_is_told() -> None:
    """The decoder knows whether it stands in the middle of a line."""
    decoder = Decoder()
    data = encode_frames([HELLO, Start(), end()])
    list(decoder.feed(data[:-1]))
    assert (decoder.cut, decoder.finished) == (True, False)
    list(decoder.feed(data[-1:]))
    assert (decoder.cut, decoder.finished) == (False, True)
