"""Unpacking what a stranger sent: whole, within the bounds, never out of the folder; no error but ArchiveError."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import struct
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloche._kit.archive import (
    MAX_DEPTH,
    MAX_DIRECTORY_BYTES,
    MAX_HEADER_BYTES,
    ArchiveError,
    ArchiveTooLarge,
    unpack,
)

SIZE, ENTRIES = 2**20, 200
Tree: TypeAlias = Mapping[str, bytes | None]
"""Files by their paths; None: a folder."""


def opened(data: bytes, folder: Path, *, size: int = SIZE, entries: int = ENTRIES) -> int:
    return unpack(io.BytesIO(data), folder, size=size, entries=entries)


def tar(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, errors="surrogateescape") as made:
        for info, data in entries:
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return file.getvalue()


def entry(
    name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, to: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info, data


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    """A header alone, as tar has it."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header with these records as they are."""
    data = b"".join(records)
    return header(kind, len(data)) + padded(data)


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, data in entries:
            made.writestr(name, data, method)
    return file.getvalue()


def unix(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def tree(folder: Path) -> dict[str, bytes | None]:
    """What is in a folder."""
    found: dict[str, bytes | None] = {}
    for top, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(os.path.join(top, name), folder)] = None
        for name in files:
            path = os.path.join(top, name)
            data = os.fsencode(os.readlink(path)) if os.path.islink(path) else Path(path).read_bytes()
            found[os.path.relpath(path, folder)] = data
    return found


# --- what is right ---------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda name: name not in {".", ".."} and len(name.encode()) < 200
)
PATHS = st.lists(NAMES, min_size=1, max_size=6).map("/".join)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, bytes | None]:
    """Files and folders, no file above another entry, and every folder named."""
    drawn = draw(st.dictionaries(PATHS, st.binary(max_size=2000) | st.none(), max_size=12))
    found: dict[str, bytes | None] = {}
    for path in sorted(drawn):
        above = [path[:at] for at, char in enumerate(path) if char == "/"]
        if not any(found.get(folder) is not None for folder in above) and path not in found:
            found |= dict.fromkeys(above)
            found[path] = drawn[path]
    return found


def as_tar(made: Tree, form: int) -> bytes:
    return tar(
        *(entry(path, kind=tarfile.DIRTYPE) if data is None else entry(path, data) for path, data in made.items()),
        form=form,
    )


PACKERS: dict[str, Callable[[Tree], bytes]] = {
    "gnu": lambda made: as_tar(made, tarfile.GNU_FORMAT),
    "pax": lambda made: as_tar(made, tarfile.PAX_FORMAT),
    "gzip": lambda made: gzip.compress(as_tar(made, tarfile.PAX_FORMAT)),
    "two gzips": lambda made: b"".join(map(gzip.compress, _halves(as_tar(made, tarfile.PAX_FORMAT)))),
    "bzip2": lambda made: bz2.compress(as_tar(made, tarfile.GNU_FORMAT)),
    "xz": lambda made: lzma.compress(as_tar(made, tarfile.GNU_FORMAT)),
    "zip": lambda made: zipped(*((path + "/" * (data is None), data or b"") for path, data in made.items())),
    "stored": lambda made: zipped(
        *((path + "/" * (data is None), data or b"") for path, data in made.items()), method=zipfile.ZIP_STORED
    ),
}


def _halves(data: bytes) -> Iterator[bytes]:
    yield data[: len(data) // 2]
    yield data[len(data) // 2 :]


@pytest.mark.parametrize("packer", PACKERS)
@settings(max_examples=20, deadline=None)
@given(made=trees())
def test_round_trip(packer: str, made: Tree) -> None:
    """A tree that the standard library packed comes out as it was, whatever its names are."""
    if packer in {"zip", "stored"}:  # a zip file's names are in the system's words: a backslash is one of them
        made = {path: data for path, data in made.items() if "\\" not in path}
    with tempfile.TemporaryDirectory(prefix="archive-") as folder:
        size = opened(PACKERS[packer](made), Path(folder))
        assert tree(Path(folder)) == dict(made)
        assert size == sum(len(data or b"") for data in made.values())


def test_what_is_kept_of_a_mode(tmp_path: Path) -> None:
    """Of the modes only "executable" is kept: no setuid, nothing that others may write."""
    (info, data), (quiet, text) = entry("run", b"x"), entry("note", b"y")
    info.mode, quiet.mode = 0o6777, 0o666
    opened(tar((info, data), (quiet, text)), tmp_path)
    assert (tmp_path / "run").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "note").stat().st_mode & 0o7777 == 0o644


def test_links(tmp_path: Path) -> None:
    """A link comes out as it is, without being followed; a hard link is a file of its own."""
    opened(
        tar(
            entry("a", b"one"),
            entry("out", kind=tarfile.SYMTYPE, to="/etc/passwd"),
            entry("b", kind=tarfile.LNKTYPE, to="./a"),
        ),
        tmp_path,
    )
    assert tree(tmp_path) == {"a": b"one", "b": b"one", "out": b"/etc/passwd"}
    assert (tmp_path / "b").stat().st_nlink == 1


def test_links_in_a_zip(tmp_path: Path) -> None:
    """A zip file's links are such by their mode, where it was made on Unix."""
    foreign = zipfile.ZipInfo("c")
    foreign.create_system, foreign.external_attr = 0, 0o120777 << 16
    opened(zipped((unix("a", 0o120777), b"../up"), (unix("b", 0o100755), b"x"), (foreign, b"text")), tmp_path)
    assert os.readlink(tmp_path / "a") == "../up"
    assert (tmp_path / "b").stat().st_mode & 0o111
    assert (tmp_path / "c").read_bytes() == b"text"


def test_long_and_foreign_names(tmp_path: Path) -> None:
    """Names that are no UTF-8 come out byte for byte, and so do those that need a header of their own."""
    odd, long = os.fsdecode(b"caf\xe9"), "/".join(["d" * 120] * 5)
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        folder = tmp_path / str(number)
        folder.mkdir()
        opened(tar(entry(odd, b"x"), entry(long, b"y"), entry("l", kind=tarfile.SYMTYPE, to=long), form=form), folder)
        assert (folder / odd).read_bytes() == b"x"
        assert (folder / long).read_bytes() == b"y"
        assert os.readlink(folder / "l") == long


def test_later_entries_win(tmp_path: Path) -> None:
    """Of two files of one name the later one is there, and it alone, as tar has it."""
    opened(tar(entry("a", b"long before"), entry("a", b"new")), tmp_path)
    assert tree(tmp_path) == {"a": b"new"}


def test_a_comment_for_all(tmp_path: Path) -> None:
    """What git writes before its archives, a remark for all entries, is passed over."""
    remark = pax(b"16 comment=0000\n", kind=tarfile.XGLTYPE)
    opened(remark + tar(entry("a", b"x")), tmp_path)
    assert tree(tmp_path) == {"a": b"x"}


def test_an_empty_one(tmp_path: Path) -> None:
    """An archive with nothing in it is a folder with nothing in it."""
    opened(tar(), tmp_path)
    opened(zipped(), tmp_path)
    assert tree(tmp_path) == {}


# --- what leads out, or is no file -----------------------------------------------------------------------------------

EVIL = {
    "absolute": tar(entry("/etc/x", b"x")),
    "up": tar(entry("../x", b"x")),
    "up in the middle": tar(entry("a/../../x", b"x")),
    "absolute by a pax header": pax(b"15 path=/etc/x\n") + tar(entry("a", b"x")),
    "nul by a pax header": pax(b"12 path=a\0b\n") + tar(entry("a", b"x")),
    "file through a link": tar(entry("l", kind=tarfile.SYMTYPE, to="/tmp"), entry("l/x", b"x")),
    "link over a file": tar(entry("a", b"x"), entry("a", kind=tarfile.SYMTYPE, to="/tmp")),
    "link over a folder": tar(entry("a/b", b"x"), entry("a", kind=tarfile.SYMTYPE, to="/tmp")),
    "link through a link": tar(
        entry("l", kind=tarfile.SYMTYPE, to="/tmp"), entry("l/x", kind=tarfile.SYMTYPE, to="/etc")
    ),
    "hard link out": tar(entry("a", kind=tarfile.LNKTYPE, to="/etc/passwd")),
    "hard link up": tar(entry("a", kind=tarfile.LNKTYPE, to="../../etc/passwd")),
    "hard link to a link": tar(
        entry("l", kind=tarfile.SYMTYPE, to="/etc/passwd"), entry("a", kind=tarfile.LNKTYPE, to="l")
    ),
    "hard link ahead": tar(entry("a", kind=tarfile.LNKTYPE, to="b"), entry("b", b"x")),
    "character device": tar(entry("a", kind=tarfile.CHRTYPE)),
    "block device": tar(entry("a", kind=tarfile.BLKTYPE)),
    "fifo": tar(entry("a", kind=tarfile.FIFOTYPE)),
    "sparse": header(tarfile.GNUTYPE_SPARSE, 0) + bytes(1024),
    "sparse by a pax header": pax(b"22 GNU.sparse.major=1\n") + tar(entry("a", b"x")),
    "file where a folder is": tar(entry("a/b", b"x"), entry("a", b"x")),
    "folder where a file is": tar(entry("a", b"x"), entry("a/b", b"x")),
    "the root a file": tar(entry(".", b"x")),
    "empty link": tar(entry("a", kind=tarfile.SYMTYPE, to="")),
    "long link": tar(entry("a", kind=tarfile.SYMTYPE, to="x" * 5000)),
    "long name": tar(entry("x" * 5000, b"x")),
    "deep": tar(entry("d/" * 2500 + "x", b"x")),
    "a size for all": pax(b"9 size=1\n", kind=tarfile.XGLTYPE) + tar(entry("a", b"x")),
    "a size that is none": pax(b"10 size=-1\n") + tar(entry("a", b"x")),
    "less than nothing": header(tarfile.REGTYPE, -512) + bytes(1024),
    "a record without a length": pax(b"path=a\n"),
    "a record too long": pax(b"99 path=a\n"),
    "a record of nothing": pax(b"0 path=a\n"),
    "a record without an end": pax(b"9 path=ab"),
    "cut in a header": tar(entry("a", b"x"))[:300],
    "cut in a file": tar(entry("a", b"x" * 3000))[:2000],
    "garbage after an entry": tar(entry("a", b"x"))[:1024] + b"?" * 512,
    "cut gzip": gzip.compress(tar(entry("a", os.urandom(3000))))[:-50],
    "broken gzip": gzip.compress(tar(entry("a", b"x")))[:-8] + bytes(8),
    "no bzip2": b"BZh9" + bytes(100),
    "no xz": b"\xfd7zXZ\x00" + bytes(100),
    "no archive": b"#!/bin/sh\necho hello\n",
    "nothing": b"",
    "zip: absolute": zipped(("/etc/x", b"x")),
    "zip: up": zipped(("../x", b"x")),
    "zip: up behind": zipped(("a/../../x", b"x")),
    "zip: file through a link": zipped((unix("l", 0o120777), b"/tmp"), ("l/x", b"x")),
    "zip: link over a file": zipped((unix("l", 0o120777), b"/tmp"), ("./l", b"x")),
    "zip: fifo": zipped((unix("a", 0o010644), b"")),
    "zip: device": zipped((unix("a", 0o020644), b"")),
    "zip: long link": zipped((unix("a", 0o120777), b"x" * 5000)),
    "zip: without an end": zipped(("a", b"x"))[:-10],
    "zip: bzip2": zipped(("a", b"x" * 100), method=zipfile.ZIP_BZIP2),
    "zip: lzma": zipped(("a", b"x" * 100), method=zipfile.ZIP_LZMA),
}


@pytest.mark.parametrize("what", EVIL)
def test_refused(what: str, tmp_path: Path) -> None:
    """What leads out, is no file, folder or link, or is broken, is an ArchiveError, and nothing is made outside of the folder."""
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    with pytest.raises(ArchiveError):
        opened(EVIL[what], inside)
    assert {path for path in tree(tmp_path) if not path.startswith("deep/er/")} == {"deep", "deep/er"}


@pytest.mark.parametrize("name", ["/x", "../x", "a/../../x", "a/.."])
def test_what_leads_out_is_told(name: str, tmp_path: Path) -> None:
    """A name that leads out is refused for that, and before anything is made of it."""
    for data in (tar(entry(name, b"x")), zipped((name, b"x")), tar(entry(name, kind=tarfile.SYMTYPE, to="x"))):
        with pytest.raises(ArchiveError, match="leads out"):
            opened(data, tmp_path)
    with pytest.raises(ArchiveError, match="leads out"):
        opened(pax(b"12 path=a\0b\n") + tar(entry("a", b"x")), tmp_path)
    assert not tree(tmp_path)


def patched(data: bytes, signature: bytes, at: int, form: str, value: int) -> bytes:
    """A zip file with one number in its records changed: at so many bytes behind each signature."""
    made = bytearray(data)
    found = data.find(signature)
    while found >= 0:
        struct.pack_into(form, made, found + at, value)
        found = data.find(signature, found + 1)
    return bytes(made)


A_ZIP = zipped(("a", b"x" * 1000))
DIRECTORY, END = b"PK\x01\x02", b"PK\x05\x06"
LIES = {
    "encrypted": patched(A_ZIP, DIRECTORY, 8, "<H", 1),
    "strongly encrypted": patched(A_ZIP, DIRECTORY, 8, "<H", 0x40),
    "no name": patched(A_ZIP, DIRECTORY, 46, "<B", 0),
    "checksum": patched(A_ZIP, DIRECTORY, 16, "<L", 1),
    "smaller than it is": patched(A_ZIP, DIRECTORY, 24, "<L", 10),
    "compressed more than it is": patched(A_ZIP, DIRECTORY, 20, "<L", 1),
    "compressed less than it is": patched(A_ZIP, DIRECTORY, 20, "<L", 2**31),
    "place of an entry": patched(A_ZIP, DIRECTORY, 42, "<L", 2**31),
    "place of the directory": patched(A_ZIP, END, 16, "<L", 2**31),
    "size of the directory": patched(A_ZIP, END, 12, "<L", 2**20),
    "zip64": A_ZIP[:-22] + b"PK\x06\x07" + bytes(16) + A_ZIP[-22:],
}


@pytest.mark.parametrize("what", LIES)
def test_zip_that_lies(what: str, tmp_path: Path) -> None:
    """A zip file that says something false of itself, or is encrypted, is refused."""
    with pytest.raises(ArchiveError):
        opened(LIES[what], tmp_path)


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packer", PACKERS)
def test_bound_of_bytes(packer: str, tmp_path: Path) -> None:
    """All files together may have so many bytes and not one more, however small the archive is."""
    for number, extra in enumerate((0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = PACKERS[packer]({"a": bytes(SIZE // 2), "b": bytes(SIZE // 2 + extra)})
        if extra:
            with pytest.raises(ArchiveTooLarge):
                opened(data, folder)
        else:
            opened(data, folder)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= SIZE


@pytest.mark.parametrize("packer", PACKERS)
def test_bound_of_entries(packer: str, tmp_path: Path) -> None:
    """There may be so many entries and not one more, and the folders that no entry names count too."""
    (tmp_path / "fits").mkdir()
    opened(PACKERS[packer]({str(i): b"" for i in range(ENTRIES)}), tmp_path / "fits")
    more: Tree = {str(i): b"" for i in range(ENTRIES + 1)}
    hidden: Tree = {f"{i}/{'d/' * 50}x": b"" for i in range(ENTRIES // 50 + 1)}
    for number, made in enumerate((more, hidden)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ArchiveTooLarge):
            opened(PACKERS[packer](made), folder)
        assert len(tree(folder)) <= ENTRIES


def test_work_without_end(tmp_path: Path) -> None:
    """What makes no entry is bounded too: the same folder again and again, remarks upon remarks."""
    for again in (
        header(tarfile.DIRTYPE, 0, "a/"),
        pax(b"14 comment=ab\n"),
        pax(b"14 comment=ab\n", kind=tarfile.XGLTYPE),
    ):
        with pytest.raises(ArchiveTooLarge):
            opened(gzip.compress(again * 20_000, 1), tmp_path)


def test_hard_links_count(tmp_path: Path) -> None:
    """A hard link costs what its file does."""
    made = tar(entry("a", bytes(SIZE // 2)), entry("b", kind=tarfile.LNKTYPE, to="a"))
    opened(made, tmp_path)
    (tmp_path / "b").unlink()
    with pytest.raises(ArchiveTooLarge):
        opened(tar(entry("a", bytes(SIZE // 2 + 1)), entry("b", kind=tarfile.LNKTYPE, to="a")), tmp_path)


def test_depth(tmp_path: Path) -> None:
    """Folders may lie in folders down to a bound, so that whatever was made can be removed."""
    opened(tar(entry("d/" * (MAX_DEPTH - 1) + "x", b"x")), tmp_path)
    with pytest.raises(ArchiveError):
        opened(tar(entry("d/" * MAX_DEPTH + "x", b"x")), tmp_path)


def peak_bytes(data: bytes, folder: Path, size: int = SIZE) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError):
            opened(data, folder, size=size, entries=20_000)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_header_of_a_gigabyte(kind: bytes, tmp_path: Path) -> None:
    """A header that says a gigabyte of one entry, a megabyte when compressed, does not get into memory."""
    packed = zlib.compressobj(wbits=31)
    data = packed.compress(header(kind, 2**30))
    for _ in range(256):
        data += packed.compress(bytes(2**20))
    assert peak_bytes(data + packed.flush(), tmp_path, size=2**29) < 4 * MAX_HEADER_BYTES


def test_header_that_takes_long_to_search(tmp_path: Path) -> None:
    """A header of digits only, which takes others hours to search, is refused at once."""
    begun = time.perf_counter()
    with pytest.raises(ArchiveError):
        opened(pax(b"1" * (MAX_HEADER_BYTES - 1000)), tmp_path)
    assert time.perf_counter() - begun < 1


def test_chain_of_headers(tmp_path: Path) -> None:
    """Extended headers may follow one another without end: none of them costs a step of recursion."""
    opened(pax(b"9 a=bcd \n"[:8] + b"\n") * 3000 + tar(entry("a", b"x")), tmp_path, size=2**22)
    assert tree(tmp_path) == {"a": b"x"}


def test_xz_that_asks_for_memory(tmp_path: Path) -> None:
    """An xz file whose header asks for a gigabyte of memory is refused."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    data = bytearray(lzma.compress(tar(entry("a", b"x")), filters=filters))
    # The block's header (xz file format, 3.1): size, flags, filter, size of its properties, the dictionary; then padding, CRC32.
    start, size = 12, (data[12] + 1) * 4
    data[start + 4] = 37  # 1.5 GiB
    struct.pack_into("<L", data, start + size - 4, zlib.crc32(bytes(data[start : start + size - 4])))
    with pytest.raises(ArchiveError, match=r"[Mm]emory"):
        opened(bytes(data), tmp_path)


def test_bomb(tmp_path: Path) -> None:
    """A file of a gigabyte in a small archive ends at the bound, and not in memory."""
    packed = zlib.compressobj(wbits=31)
    data = packed.compress(header(tarfile.REGTYPE, 2**30))
    for _ in range(64):
        data += packed.compress(bytes(2**20))
    assert peak_bytes(data + packed.flush(), tmp_path) < 2**21
    assert peak_bytes(zipped(("a", bytes(2**26))), tmp_path) < 2**21


def test_huge_directory(tmp_path: Path) -> None:
    """A zip file whose directory would fill the memory is refused before it is read."""
    directory = b"PK\x01\x02" + bytes(42)
    data = directory * (MAX_DIRECTORY_BYTES // 46 + 1)
    end = struct.pack("<4s4H2LH", END, 0, 0, 0, 0, len(data), 0, 0)
    assert peak_bytes(b"PK\x03\x04" + data + end, tmp_path) < 2**21


def test_entries_that_overlap(tmp_path: Path) -> None:
    """Entries that share their bytes are refused: each would be unpacked anew, also where nothing comes of it."""
    empty_blocks = b"\x00\x00\x00\xff\xff" * 2000 + b"\x03\x00"
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, 0, len(empty_blocks), 0, 1, 0) + b"a" + empty_blocks
    record = struct.pack("<4s6H3L5H2L", DIRECTORY, 20, 20, 0, 8, 0, 0, 0, len(empty_blocks), 0, 1, 0, 0, 0, 0, 0, 0)
    end = struct.pack("<4s4H2LH", END, 0, 0, 50, 50, 50 * 47, len(local), 0)
    with pytest.raises(ArchiveError, match="overlap"):
        opened(local + (record + b"a") * 50 + end, tmp_path)


# --- whatever comes --------------------------------------------------------------------------------------------------

SEEDS = [
    *(PACKERS[packer]({"a/b": b"text" * 100, "c": b""}) for packer in ("gnu", "pax", "gzip", "zip", "stored")),
    tar(entry("l", kind=tarfile.SYMTYPE, to="a"), entry("x" * 300, b"y"), form=tarfile.PAX_FORMAT),
]


@st.composite
def garbage(draw: st.DrawFn) -> bytes:
    """Nothing in particular, or an archive that somebody changed here and there."""
    if draw(st.booleans()):
        return draw(st.sampled_from([b"", b"PK\x03\x04", END, b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00"])) + draw(
            st.binary(max_size=2000)
        )
    made = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(made) - 1))
        made[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(made)


@settings(max_examples=300, deadline=None)
@given(garbage())
def test_whatever_comes(data: bytes) -> None:
    """Whatever the bytes are, they are unpacked within the bounds, or refused with an ArchiveError."""
    with tempfile.TemporaryDirectory(prefix="archive-") as folder:
        with contextlib.suppress(ArchiveError):
            opened(data, Path(folder))
        found = tree(Path(folder))
    assert len(found) <= ENTRIES
    assert sum(len(data) for data in found.values() if data) <= SIZE
