"""What comes out of a box is bounded and checked before anybody believes it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit import probes

from cloche.errors import ProtocolError
from cloche.runtime.prove.observe import MAX_BYTES, observe

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KINDS = sorted({row["see"] for row in probes.healthy()})


def test_reads_what_the_prober_prints() -> None:
    """Each kind of row arrives with its values."""
    seen = observe(probes.printed(probes.healthy()))
    assert seen.identity is not None
    assert seen.identity.uids == (1000, 1000, 1000, 1000)
    assert seen.identity.groups == ()
    assert seen.kernel is not None
    assert seen.kernel.boot_id == "b"
    assert seen.sockets["packet"] == 1
    assert seen.places["/tmp"].files == 65536
    assert seen.reached["size /tmp"].got == 42 * probes.MIB
    assert seen.reached["processes"].errno == 11
    assert seen.cpu is not None
    assert seen.cpu.throttled is None
    assert seen.complete


def test_unknown_kinds_and_fields_are_passed_over() -> None:
    """A newer prober may say more."""
    rows: list[dict[str, Any]] = [{"see": "weather", "x": [1]}, {"see": "processes", "count": 3, "more": {"a": None}}]
    seen = observe(probes.printed(rows))
    assert seen.process_count == 3
    assert not seen.complete


def test_a_last_line_that_was_cut_is_left_out() -> None:
    """A box that is ended while it prints has said what it said before."""
    data = probes.printed([{"see": "memory", "bytes": 5}]) + b'{"see": "memo'
    assert observe(data).touched_bytes == 5


def test_an_output_that_was_cut_is_not_complete() -> None:
    """The prober says itself that it left lines out."""
    assert not observe(probes.printed([{"see": "end", "ms": 1, "cut": 1}])).complete


@pytest.mark.parametrize(
    "data",
    [
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b'{"see": 3}\n',
        b'{"see": "processes"}\n',
        b'{"see": "processes", "count": "3"}\n',
        b'{"see": "processes", "count": true}\n',
        b'{"see": "identity", "pid": 1, "guard": 1, "Uid": "root"}\n',
        b'{"see": "environment", "names": [1]}\n',
        b'{"see": "processes", "count": ' + b"9" * 30 + b"}\n",
        b"[" * 5000 + b"\n",
        b'{"see": "x", "y": "' + b"z" * 9000 + b'"}\n',
        b"\n" * 5000,
        b"x" * (MAX_BYTES + 1),
    ],
)
def test_what_is_no_observation_is_refused(data: bytes) -> None:
    """Whoever else writes there is not believed."""
    with pytest.raises(ProtocolError):
        observe(data)


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    """Bytes of any kind are observations or a ProtocolError, nothing else."""
    with contextlib.suppress(ProtocolError):
        observe(data)


@given(st.lists(st.fixed_dictionaries({"see": st.sampled_from(KINDS)}, optional={"x": JSON}), max_size=4), st.data())
def test_any_values(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    """The same with rows of known kinds whose fields hold anything."""
    names = sorted({name for row in probes.healthy() for name in row} - {"see"})
    for row in rows:
        row.update(data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=6)))
    with contextlib.suppress(ProtocolError):
        observe(probes.printed(rows))
