"""Server-sent events, as bytes cut anywhere."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloche._kit.sse import Decoder, Message, MessageTooLarge

BOUND = 10_000
EVENTS = st.from_regex(r"[a-z]{1,12}", fullmatch=True)
LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=40)
MESSAGES = st.lists(st.tuples(EVENTS, st.lists(LINES, min_size=1, max_size=3)), max_size=6)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def decode(*chunks: bytes, bound: int = BOUND) -> list[Message]:
    decoder = Decoder(bound)
    return [message for chunk in chunks for message in decoder.feed(chunk)]


@given(MESSAGES, ENDS, st.lists(st.integers(0, 500), max_size=30), st.booleans())
def test_cut_anywhere(messages: list[tuple[str, list[str]]], end: str, cuts: list[int], bom: bool) -> None:
    """Wherever the bytes are cut, and however lines end, the messages are those that were written."""
    text = "".join(
        end.join([f": a remark{end}event: {event}", *(f"data: {line}" for line in lines), "", ""])
        for event, lines in messages
    )
    data = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[a:b] for a, b in itertools.pairwise(places)]
    expected = [Message(event, "\n".join(lines).encode()) for event, lines in messages]
    assert decode(*chunks) == decode(data) == expected
    assert decode(*(data[i : i + 1] for i in range(len(data)))) == expected


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_anything(chunks: list[bytes]) -> None:
    """Whatever comes, it is messages or nothing, and no more is kept than the bound."""
    decoder = Decoder(100)
    try:
        for chunk in chunks:
            assert all(len(message.data) <= 100 for message in decoder.feed(chunk))
    except MessageTooLarge:
        assert sum(map(len, chunks)) > 100


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"data\n\n", [Message("message", b"")]),
        (b"data:x\n\n", [Message("message", b"x")]),
        (b"data: x\n\n", [Message("message", b"x")]),
        (b"data:  x\n\n", [Message("message", b" x")]),
        (b"data: a: b\n\n", [Message("message", b"a: b")]),
        (b"event: e\n\n", []),
        (b"event: e\n\ndata: x\n\n", [Message("message", b"x")]),
        (b"id: 1\nretry: 5\nfoo: bar\ndata: x\n\n", [Message("message", b"x")]),
        (b": \n:\n\n\n", []),
        (b"data: x\n", []),
        (b"data: x\ndata: y\n\n", [Message("message", b"x\ny")]),
        (b"data: x\r\n\r\ndata: y\r\r", [Message("message", b"x"), Message("message", b"y")]),
    ],
)
def test_fields(data: bytes, expected: list[Message]) -> None:
    """Fields mean what the standard says."""
    assert decode(data) == expected


@pytest.mark.parametrize(
    "chunks",
    [
        [b"x" * 101],
        [b"data: ", b"x" * 60, b"x" * 60],
        [b"data: " + b"x" * 101 + b"\n"],
        [b"data: x\n"] * 60,
        [b"data: " + b"x" * 50 + b"\n", b"data: " + b"x" * 50],
        [b": a remark without an end"] * 5,
    ],
)
def test_too_large(chunks: list[bytes]) -> None:
    """A message without an end, in one line or in many, is given up at the bound."""
    with pytest.raises(MessageTooLarge, match="more than 100 bytes"):
        decode(*chunks, bound=100)


def test_many_messages_are_not_one() -> None:
    """The bound is that of one message: any number of them may come."""
    assert len(decode(*[b"data: 0123456789\n\n: remark\n\n"] * 100, bound=100)) == 100
