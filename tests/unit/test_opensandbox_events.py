"""The stream of a command, taken apart: as each execd writes it, and as none does."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloche.backends.opensandbox.events import MAX_LINE_BYTES, Begun, Decoder, Ended, Event, EventError, Printed


def events(*pieces: bytes) -> list[Event]:
    decoder = Decoder()
    found = [event for piece in pieces for event in decoder.feed(piece)]
    return [*found, *decoder.finish()]


def line(kind: str, text: str = "", **more: Any) -> bytes:
    """As Go writes it: what is empty is left out, and some characters are escaped."""
    found = {"type": kind, **({"text": text} if text else {}), "timestamp": 1, **more}
    return json.dumps(found, ensure_ascii=False).replace("\u2028", "\\u2028").encode() + b"\n\n"


def failed(value: object, traceback: object = ("exit status 7",), name: object = "CommandExecError") -> bytes:
    return line("error", error={"ename": name, "evalue": value, "traceback": traceback})


OLD = (  # execd up to 1.1.0
    b'{"type":"init","text":"3f","timestamp":1}\n\n'
    b'{"type":"ping","text":"pong","timestamp":1}\n\n'
    b'{"type":"stdout","text":"a","timestamp":2}\n\n'
    b'{"type":"stdout","text":"\\n","timestamp":2}\n\n'
    b'{"type":"stderr","text":"b","timestamp":2}\n\n'
    b'{"type":"error","timestamp":3,"error":{"ename":"CommandExecError","evalue":"7","traceback":["exit status 7"]}}\n\n'
)
NEW = (  # later ones
    b'{"type":"init","text":"3f","timestamp":1}\n\n'
    b'{"type":"stdout","text":"a\\n","timestamp":2}\n\n'
    b'{"type":"ping","text":"pong","timestamp":1}\n\n'
    b'{"type":"stdout","text":"\\n","timestamp":2}\n\n'
    b'{"type":"stderr","text":"b","timestamp":2}\n\n'
    b'{"type":"execution_complete","execution_time":3,"timestamp":3}\n\n'
)


def test_old_and_new() -> None:
    """Each line that the command wrote is there as execd has it, with or without its end, and signs of life are not."""
    assert events(OLD) == [
        Begun("3f"),
        Printed("stdout", "a"),
        Printed("stdout", "\n"),
        Printed("stderr", "b"),
        Ended(7, "exit status 7"),
    ]
    assert events(NEW) == [
        Begun("3f"),
        Printed("stdout", "a\n"),
        Printed("stdout", "\n"),
        Printed("stderr", "b"),
        Ended(0),
    ]


@pytest.mark.parametrize("stream", [OLD, NEW])
def test_server_sent_events(stream: bytes) -> None:
    """With ``data:`` before each event, other fields between and CRLF at the ends the same stream says the same."""
    for before in (b"data:", b"data: ", b"data:  ", b" data: ", b"event: x\r\nid: 7\r\nretry: 5\n: ping\ndata: "):
        framed = stream.replace(b'{"type"', before + b'{"type"')
        assert events(framed) == events(stream)
        assert events(framed.replace(b"\n", b"\r\n")) == events(stream)


def test_nothing() -> None:
    """An empty stream, and one of empty lines and other fields, has no event."""
    assert events() == []
    assert events(b"\n\r\n \n\t\n:\n: x\nevent: init\nid: 1\nretry: 3\ndata:\ndata: \ndata:: x\n") == []


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ANY_LINE = st.one_of(
    st.builds(line, st.sampled_from(["init", "stdout", "stderr", "ping", "result"]), ANY_TEXT),
    st.builds(failed, ANY_TEXT),
    st.sampled_from([b"\n", b"\r\n", b": x\n", b"event: stdout\n", b"data:\n", line("execution_complete")]),
    st.builds(lambda text: b"data: " + line("stdout", text), ANY_TEXT),
)


@given(st.lists(ANY_LINE, max_size=8), st.lists(st.integers(0, 2000), max_size=12), st.booleans())
def test_cut_anywhere(lines: list[bytes], cuts: list[int], ended: bool) -> None:
    """However the bytes are cut, in the middle of a character too, the same events come, whether the last line has its end or
    not.
    """
    raw = b"".join(lines)
    raw = raw if ended else raw.rstrip(b"\n")
    places = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    pieces = [raw[start:end] for start, end in itertools.pairwise(places)]
    whole = [event for part in raw.split(b"\n") for event in events(part)]
    assert events(*pieces) == events(raw) == whole
    assert events(*(bytes([byte]) for byte in raw)) == whole


@given(st.lists(ANY_TEXT))
def test_text(texts: list[str]) -> None:
    """A text comes out as it went in, whatever characters are in it."""
    assert events(b"".join(line("stdout", text) for text in texts)) == [Printed("stdout", text) for text in texts]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\r", "\x1c", "\x1e"])
def test_what_looks_like_the_end_of_a_line(end: str) -> None:
    """Only the byte 0x0A ends a line: what else is an end of one to Unicode or to Python stays within the text."""
    text = f"a{end}b"
    for escaped in (True, False):
        raw = json.dumps({"type": "stdout", "text": text}, ensure_ascii=escaped).encode()
        assert events(raw + b"\n\n") == [Printed("stdout", text)]


def test_as_it_comes() -> None:
    """An event is there as soon as its line has ended, and not before."""
    decoder = Decoder()
    assert list(decoder.feed(b'{"type":"stdout","text":"a"}')) == []
    assert list(decoder.feed(b"\n")) == [Printed("stdout", "a")]
    assert list(decoder.feed(b'\n{"type":"execution_complete"}\n{"type"')) == [Ended(0)]


def test_last_line_without_an_end() -> None:
    """The last event counts at the end of the stream though its line has no end, and only once; a half one is an error."""
    decoder = Decoder()
    assert list(decoder.feed(b'{"type":"execution_complete"}')) == []
    assert list(decoder.finish()) == [Ended(0)]
    assert list(decoder.finish()) == []
    list(decoder.feed(b'{"type":"execution_comp'))
    with pytest.raises(EventError):
        list(decoder.finish())


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("7", 7),
        ("0", 0),
        ("255", 255),
        ("-1", -1),
        ("-", None),
        ("--1", None),
        ("+1", None),
        ("", None),
        ("1.5", None),
        (" 1", None),
        ("1 ", None),
        ("1\n", None),
        ("1_0", None),
        ("0x1", None),
        ("\u0661", None),
        ("\u00b2", None),
        ("9" * 12, None),
        ("-" + "9" * 11, None),
        ("9" * 5000, None),
        ("fork/exec /bin/sh: no such file or directory", None),
        (7, 7),
        (True, None),
        (None, None),
        (["7"], None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_exit_code(value: object, code: int | None) -> None:
    """The value is the exit code where it is a decimal number of a sane length; anything else says that nothing was started."""
    (found,) = events(failed(value))
    assert isinstance(found, Ended)
    assert found.exit_code == code


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (failed("-1", ["signal: killed"]), Ended(-1, "signal: killed")),
        (failed("7", ["a", 7, None, "b"]), Ended(7, "a; b")),
        (failed("7", []), Ended(7, "CommandExecError: 7")),
        (failed("7", "trace"), Ended(7, "CommandExecError: 7")),
        (failed("7", {"a": "b"}), Ended(7, "CommandExecError: 7")),
        (failed("no such file", ["x"], "Failed"), Ended(None, "Failed: no such file")),
        (failed(7, 7, 7), Ended(7, ": 7")),
        (failed([7], 7, 7), Ended(None, ": ")),
        (line("error"), Ended(None, ": ")),
        (line("error", error="x"), Ended(None, ": ")),
        (line("error", error=["x"]), Ended(None, ": ")),
        (b'{"code":"RUNTIME_ERROR","message":"no memory"}', Ended(None, "RUNTIME_ERROR: no memory")),
        (b'{"code":"RUNTIME_ERROR"}', Ended(None, "RUNTIME_ERROR: ")),
        (b'{"code":"RUNTIME_ERROR","message":7,"type":7}', Ended(None, "RUNTIME_ERROR: ")),
    ],
    ids=repr,
)
def test_errors(raw: bytes, expected: Ended) -> None:
    """An error ends the command, with what it says of why, of any form, and also where it comes in place of an event."""
    assert events(raw) == [expected]


@pytest.mark.parametrize(
    "raw",
    [
        b"null",
        b"7",
        b"true",
        b'"stdout"',
        b"[]",
        b'[{"type":"stdout","text":"a"}]',
        b"{}",
        b'{"type":null}',
        b'{"type":7,"text":"a"}',
        b'{"type":["stdout"],"text":"a"}',
        b'{"type":"STDOUT","text":"a"}',
        b'{"type":"stdout\\n","text":"a"}',
        b'{"Type":"stdout","text":"a"}',
        b'{"text":"a"}',
        b'{"code":7,"message":"a"}',
        b'{"code":""}',
        b'{"type":"ping","text":"pong","code":"X"}',
        b'{"type":"result","results":{"text/plain":"a"}}',
        b'{"type":"a kind of 2030","text":"a"}',
    ],
    ids=repr,
)
def test_what_is_no_event(raw: bytes) -> None:
    """JSON that is no event that we know, of whatever form, is passed over, and the stream goes on."""
    assert events(raw + b"\n" + line("stdout", "b")) == [Printed("stdout", "b")]


@pytest.mark.parametrize("text", [None, 7, True, ["a"], {"a": "b"}], ids=repr)
def test_text_that_is_none(text: object) -> None:
    """A text of another type counts as an empty one."""
    raw = b"".join(line(kind, text=text) for kind in ("init", "stdout", "stderr"))  # type: ignore[arg-type]
    assert events(raw) == [Begun(""), Printed("stdout", ""), Printed("stderr", "")]


@pytest.mark.parametrize(
    "raw",
    [
        b"x",
        b"HTTP/1.1 502 Bad Gateway",
        b"<html>",
        b"Internal Server Error",
        b"data",
        b"data: data: {}",
        b"{",
        b'{"type":"stdout"}{"type":"stdout"}',
        b"{'type':'stdout'}",
        b'{"type":"stdout","text":"\xff"}',
        b'{"type":"stdout","text":"a\tb"}',
        b"\0",
        b"[" * 100_000,
        b'{"text":' * 100_000,
        b'{"type":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"type":"stdout","n":' + b"9" * 5000 + b"}",
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_what_is_no_stream(raw: bytes) -> None:
    """What is no JSON, or none that can be read, is an error of one kind that shows a little of it, never a crash."""
    for rest in (b"\n", b""):
        with pytest.raises(EventError) as caught:
            events(line("stdout", "a"), raw + rest)
        assert len(str(caught.value)) < 500


def padded(size: int) -> bytes:
    """A line of that many bytes."""
    head, tail = b'{"type":"stdout","text":"', b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


def test_a_line_at_the_bound() -> None:
    """The longest line that there may be comes through whole, also as the last one."""
    raw = padded(MAX_LINE_BYTES)
    assert len(events(raw + b"\n" + raw)) == 2


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("piece", [2**16, 2**30])
def test_a_line_beyond_the_bound(end: bytes, piece: int) -> None:
    """A longer one is refused, however it comes, and no more of it is kept than the bound and a piece."""
    raw = padded(MAX_LINE_BYTES + 1) + end
    with pytest.raises(EventError, match="more than"):
        events(*(raw[start : start + piece] for start in range(0, len(raw), piece)))
    endless = Decoder()
    for _ in range(MAX_LINE_BYTES // 2**16):
        assert list(endless.feed(b" " * 2**16)) == []
    with pytest.raises(EventError, match="more than"):
        list(endless.feed(b" "))


def test_many_lines_at_once() -> None:
    """The bound is that of a line, not of what comes at a time."""
    raw = b"\n" * (MAX_LINE_BYTES + 1) + padded(2**16) + b"\n"
    assert len(events(raw)) == 1
    assert len(events((padded(2**16) + b"\n") * 40)) == 40
