"""The C reader against the Python writer: what is written is what is read, however it is cut, and nothing else is taken."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.supervisor import builds
from tests.supervisor.test_start import MAGIC, records

from cloche.spec import Limits, encode
from cloche.supervisor.bundle import CHUNK_BYTES, Bundle, Entry, File, Folder, Link

QUICK = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
text = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from("\udc80\udcff"), max_size=20
)
name = text.map(lambda value: value.replace("/", "|")).filter(
    lambda value: value not in {"", ".", ".."} and len(encode(value)) <= 255
)
path = st.lists(name, min_size=1, max_size=4).map("/".join)
blob = st.binary(max_size=200) | st.integers(0, 3 * CHUNK_BYTES).map(lambda n: bytes(i % 251 for i in range(n)))
variable = st.tuples(text.map(lambda value: value.replace("=", "")).filter(bool), text)
number = st.integers(0, 2**40)


@st.composite
def links(draw: st.DrawFn) -> Link:
    """A link that stays inside, with as many '..' as its own depth bears."""
    where = draw(path)
    up = draw(st.integers(0, where.count("/")))
    return Link(where, "/".join([*[".."] * up, draw(path)]))


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    limits = Limits(
        timeout_s=draw(st.integers(1, 2**40)) / 1000,
        grace_s=draw(number) / 1000,
        output_bytes=draw(number),
        artifact_bytes=draw(number),
        artifact_count=draw(number),
    )
    entries: st.SearchStrategy[Entry] = st.builds(Folder, path) | st.builds(File, path, blob, st.booleans()) | links()
    return Bundle(
        argv=draw(st.lists(text, min_size=1, max_size=6)),
        env=dict(draw(st.lists(variable, max_size=6))),
        limits=limits,
        entries=draw(st.lists(entries, max_size=8)),
        stdin=draw(st.none() | blob),
    )


def expected(bundle: Bundle) -> list[str]:
    """The calls that the reader must make."""
    calls: list[str] = []
    for entry in [e for e in bundle.entries if not isinstance(e, Link)] + [
        e for e in bundle.entries if isinstance(e, Link)
    ]:
        match entry:
            case Folder(path=where):
                calls.append(f"folder {encode(where).hex()}")
            case File(path=where, data=data, executable=executable):
                calls += [f"{'program' if executable else 'file'} {encode(where).hex()}", *_bytes(data), "close"]
            case Link(path=where, target=target):
                calls += [f"target {encode(target).hex()}", f"link {encode(where).hex()}"]
    if bundle.stdin is not None:
        calls += ["input", *_bytes(bundle.stdin), "close"]
    calls += [f"arg {encode(arg).hex()}" for arg in bundle.argv]
    calls += [f"env {encode(f'{key}={value}').hex()}" for key, value in bundle.env.items()]
    limits = bundle.limits
    milliseconds = [round(limits.timeout_s * 1000), round(limits.grace_s * 1000)]
    numbers = [*milliseconds, limits.output_bytes, limits.artifact_bytes, limits.artifact_count]
    return [*calls, f"limits {' '.join(map(str, numbers))}"]


def _bytes(data: bytes) -> list[str]:
    return [f"bytes {data[i : i + CHUNK_BYTES].hex()}" for i in range(0, len(data), CHUNK_BYTES)]


@pytest.fixture(scope="module")
def driver(folder: Path) -> Path:
    return builds.bundle_driver(folder)


def calls(driver: Path, data: bytes, step: int = 65536) -> list[str]:
    """What the C reader makes of some bytes, fed in steps."""
    done = subprocess.run([driver, str(step)], input=data, capture_output=True, check=True)
    return done.stdout.decode().splitlines()


@QUICK
@given(bundle=bundles(), step=st.sampled_from([1, 2, 3, 4, 5, 7, 4096, 65536, 10**7]))
def test_reader_gets_what_the_writer_means(driver: Path, bundle: Bundle, step: int) -> None:
    """Every bundle that Python writes is read by C as the same calls, however its bytes are cut."""
    assert calls(driver, b"".join(bundle.records()), step) == expected(bundle)


@QUICK
@given(bundle=bundles(), at=st.integers(0, 10**6))
def test_a_cut_bundle_is_refused(driver: Path, bundle: Bundle, at: int) -> None:
    """A bundle that lacks its end is never taken for a whole one, and what was read of it was right."""
    data = b"".join(bundle.records())
    *before, last = calls(driver, data[: at % len(data)])
    assert last == "error it ended too early"
    want = [line for line in expected(bundle) if not line.startswith(("arg", "env", "limits"))]
    assert before == want[: len(before)]


def test_the_shortest_time(driver: Path) -> None:
    """A time of less than a millisecond is one, and not a plan without time."""
    data = b"".join(Bundle(argv=["x"], env={}, limits=Limits(timeout_s=1e-9)).records())
    assert calls(driver, data)[-1].startswith("limits 1 ")


MUTATIONS: Sequence[str] = ("flip", "drop", "double", "swap")


@QUICK
@given(bundle=bundles(), kind=st.sampled_from(MUTATIONS), a=st.integers(0, 10**6), b=st.integers(0, 10**6))
def test_damaged_bundles_do_no_harm(driver: Path, bundle: Bundle, kind: str, a: int, b: int) -> None:
    """Records that are lost, doubled, exchanged or changed end in an error or in calls that are all inside."""
    records = list(bundle.records())
    first, second = a % len(records), b % len(records)
    match kind:
        case "flip":
            changed = bytearray(records[first])
            changed[b % len(changed)] ^= 1 << a % 8
            records[first] = bytes(changed)
        case "drop":
            del records[first]
        case "double":
            records.insert(second, records[first])
        case _:
            records[first], records[second] = records[second], records[first]
    linked = False
    for line in calls(driver, b"".join(records)):
        what, _, rest = line.partition(" ")
        if what in {"folder", "file", "program", "link"}:
            parts = bytes.fromhex(rest).split(b"/")
            assert not {b"", b".", b".."} & set(parts)
            assert all(len(part) <= 255 for part in parts)
            assert what == "link" or not linked, "something was made after a link"
            linked = linked or what == "link"


@pytest.mark.parametrize(
    ("target", "where", "fine"),
    [
        (b"x", b"l", True),
        (b"./x/.//y", b"l", True),
        (b"a/../b", b"l", True),
        (b"..", b"l", False),
        (b"..", b"d/l", True),
        (b"../..", b"d/l", False),
        (b"../x/../..", b"d/l", False),
        (b"../../x", b"d/e/l", True),
        (b"...", b"l", True),
        (b"a/..", b"l", True),
        (b"a/../..", b"l", False),
        (b"/", b"l", False),
        (b"", b"l", False),
        (b"x" * 5000, b"l", True),
    ],
)
def test_link_targets(driver: Path, target: bytes, where: bytes, fine: bool) -> None:
    """A link's target may climb as far as its own folder is deep, at no point further."""
    *_, last = calls(driver, records(MAGIC, (b"S", target + b"\0" + where)))
    assert last == ("error it ended too early" if fine else "error a link's path or target")
