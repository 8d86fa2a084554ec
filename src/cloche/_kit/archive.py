"""Unpacks a tar or zip file that a stranger sent: bounded, into a fresh folder, and never out of it. Blocks.

Links are made last, when nothing is written any more, so that nothing can be written through one. Where they lead is not looked
at here: whoever reads the folder must not follow them out.

tarfile reads one header at a time here and no more. Its own walk through a file holds extended headers of any size in memory,
searches them in quadratic time, and follows a chain of them by recursion; and it takes garbage for the end.
"""

from __future__ import annotations

import bz2
import errno
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol, cast

CHUNK = 256 * 1024
MAX_DIRECTORY_BYTES = 8 * 2**20
"""Of a zip file's directory, which is read as a whole: 20,000 entries with names of 350 bytes."""
MAX_HEADER_BYTES = 2**20
"""Of what a tar file says of an entry beside its header: names have 4 KiB at most, attributes 64 KiB each."""
MAX_LINK_BYTES = 4095
"""PATH_MAX less its NUL (Linux, include/uapi/linux/limits.h)."""
MAX_DEPTH = 100
"""Folders in folders: removing them takes a step of recursion and a descriptor for each."""
MAX_XZ_BYTES = 128 * 2**20
"""Of memory that unpacking xz may take; `xz -9` needs 65 MiB, and a header can ask for 4 GiB."""
_BLOCK = 512
_PER_ENTRY = 8 * _BLOCK
"""Bytes of a tar file that belong to one entry and not to its content: its header, those of a long name, padding."""
_TAIL = 2**20
"""Bytes of padding that may follow the last entry of a tar file."""
_TOLD = frozenset({b"path", b"linkpath", b"size"})
"""What is heeded of an extended header (POSIX.1-2017, pax, "pax Extended Header")."""
_END_OF_DIRECTORY = struct.Struct("<4s4H2LH")
"""The end of a zip file (PKWARE, APPNOTE.TXT 4.3.16): signature, four counts, size and place of the directory, remark."""
_MAX_REMARK = 65535
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
"""What every zip program writes; others take memory by what their header says."""
_THEIRS = frozenset(
    {
        errno.EEXIST,
        errno.EILSEQ,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EPERM,
    }
)
"""What the system says of names that cannot be; any other failure is the machine's."""


class ArchiveError(ValueError):
    """It is no archive that can be unpacked. The message says why."""


class ArchiveTooLarge(ArchiveError):
    """It holds more than is allowed."""


def unpack(archive: IO[bytes], folder: Path, *, size: int, entries: int) -> int:
    """Unpack a tar file (plain, gzip, bzip2, xz) or a zip file into ``folder``, which is there and empty. Gives its size.

    Of the modes only "executable" is kept. ``size``: bytes that all files together may have; ``entries``: how many of all kinds.

    Raises:
        ArchiveTooLarge: there is more in it. What was unpacked so far is in the folder.
        ArchiveError: it is neither, is broken, is encrypted, or has an entry that leads out or is no file, folder or link.
        OSError: the folder cannot be written.
    """
    into = _Folder(folder, size, entries)
    archive.seek(0)
    start = archive.read(6)
    archive.seek(0)
    try:
        if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            _unzip(archive, into)
        else:
            _untar(_Bounded(_decompressed(archive, start), size + entries * _PER_ENTRY + _TAIL), into)
        into.finish()
        return size - into.left
    except ArchiveError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as exc:
        raise ArchiveError(f"The archive is neither a tar nor a zip file that can be read: {exc}.") from exc
    except UnicodeError as exc:
        raise ArchiveError("The archive has a name that is no text.") from exc
    except (ValueError, struct.error) as exc:  # as zipfile says of places before the beginning
        raise ArchiveError(f"The archive is broken: {exc}.") from exc
    except OSError as exc:
        if exc.errno is None:  # as bz2 says that it is no bzip2
            raise ArchiveError(f"The archive is broken: {exc}.") from exc
        if exc.errno in _THEIRS:
            raise ArchiveError(f"The archive has an entry that cannot be made: {exc.strerror}.") from exc
        raise


class _Folder:
    """Where it goes."""

    def __init__(self, folder: Path, size: int, entries: int) -> None:
        self._folder = folder
        self.left = size
        """Bytes that may still be written."""
        self._entries = entries
        self._files: set[str] = set()
        self._folders: set[str] = {""}
        self._links: dict[str, str] = {}

    def name(self, raw: str) -> str:
        """The path of an entry inside the folder; empty for the archive's own root.

        Raises:
            ArchiveError: it leads out, or too deep.
        """
        parts = [part for part in raw.split("/") if part not in {"", "."}]
        if raw.startswith("/") or ".." in parts or "\0" in raw:
            raise ArchiveError(f"The archive has an entry {raw[:200]!r}, which leads out of it.")
        if len(parts) > MAX_DEPTH:
            raise ArchiveError(f"The archive has an entry {raw[:200]!r}, which is nested too deeply.")
        return "/".join(parts)

    def make_folder(self, name: str) -> None:
        """A folder, and those that it is in: an archive need not name them, and they count all the same."""
        if name in self._folders:
            return
        self.make_folder(name.rpartition("/")[0])
        self._count()
        os.mkdir(self._folder / name)
        self._folders.add(name)

    def write(self, name: str, source: IO[bytes], *, executable: bool) -> None:
        """A file; one that came before under its name is replaced, as tar has it."""
        path = self._place(name)
        self._count()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        with os.fdopen(os.open(path, flags, 0o755 if executable else 0o644), "wb") as file:
            while chunk := source.read(min(CHUNK, self.left + 1)):
                self.left -= len(chunk)
                if self.left < 0:
                    raise ArchiveTooLarge("The archive holds too many bytes.")
                file.write(chunk)
        self._files.add(name)

    def copy(self, name: str, of: str) -> None:
        """A hard link: a file of its own here."""
        if of not in self._files:
            raise ArchiveError(f"The archive has a hard link {name[:200]!r} to no file that comes before it.")
        if name != of:
            path = self._folder / of
            with open(path, "rb") as source:
                self.write(name, source, executable=bool(os.stat(path).st_mode & 0o111))

    def link(self, name: str, target: str) -> None:
        if not target or "\0" in target or len(os.fsencode(target)) > MAX_LINK_BYTES:
            raise ArchiveError(f"The archive has a link {name[:200]!r} that leads nowhere.")
        self._count()
        self._links[name] = target

    def finish(self) -> None:
        """Make the links."""
        for name, target in self._links.items():
            path = self._place(name)
            if os.path.lexists(path):
                raise ArchiveError(f"The archive has a link {name[:200]!r} in the place of another entry.")
            os.symlink(target, path)

    def _place(self, name: str) -> Path:
        if not name:
            raise ArchiveError("The archive's own root is no folder.")
        self.make_folder(name.rpartition("/")[0])
        return self._folder / name

    def _count(self) -> None:
        self._entries -= 1
        if self._entries < 0:
            raise ArchiveTooLarge("The archive has too many entries.")


class _Bounded:
    """A stream that is not read beyond a bound: what unpacks to much is noticed wherever it is."""

    def __init__(self, source: IO[bytes], bound: int) -> None:
        self._source = source
        self._left = bound

    def read(self, size: int) -> bytes:
        """So many bytes; fewer only where it ends."""
        data = self._source.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ArchiveTooLarge("The archive holds too many bytes.")
        return data

    def exactly(self, size: int) -> bytes:
        """Raises: EOFError: there are fewer."""
        data = self.read(size)
        if len(data) < size:
            raise EOFError("it ends too early")
        return data


class _Content:
    """The content of an entry, which begins where the stream stands."""

    def __init__(self, source: _Bounded, size: int) -> None:
        self._source = source
        self._left = size

    def read(self, size: int) -> bytes:
        data = self._source.exactly(min(size, self._left))
        self._left -= len(data)
        return data


class _Decompressor(Protocol):
    """What bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


class _Gzip:
    """zlib's, made like them."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: with gzip's header and checksum

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = 0) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Decompressed(io.RawIOBase):
    """What was compressed, as it was; streams may follow one another, as parallel programs write them."""

    def __init__(self, source: IO[bytes], begin: Callable[[], _Decompressor]) -> None:
        self._source = source
        self._begin = begin
        self._inner = begin()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # RawIOBase's own has any writable buffer
        data = b""
        while True:
            piece = self._inner.decompress(data, len(buffer))
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)
            data = b""
            if self._inner.eof:
                data = self._inner.unused_data or self._source.read(CHUNK)
                if not data.strip(b"\0"):
                    return 0
                self._inner = self._begin()
            elif self._inner.needs_input:
                data = self._source.read(CHUNK)
                if not data:
                    raise EOFError("it ends too early")


def _decompressed(archive: IO[bytes], start: bytes) -> IO[bytes]:
    begin: Callable[[], _Decompressor]
    if start.startswith(b"\x1f\x8b"):
        begin = _Gzip
    elif start.startswith(b"BZh"):
        begin = bz2.BZ2Decompressor
    elif start.startswith(b"\xfd7zXZ\x00"):

        def begin() -> _Decompressor:
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_BYTES)

    else:
        return archive
    return cast("IO[bytes]", io.BufferedReader(_Decompressed(archive, begin), CHUNK))


def _untar(source: _Bounded, into: _Folder) -> None:
    told: dict[bytes, bytes] = {}
    block = source.exactly(_BLOCK)
    while block and block.count(0) < _BLOCK:
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if entry.size < 0:
            raise ArchiveError("The archive has an entry of less than no bytes.")
        if entry.type in {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}:
            told |= _records(_header(source, entry))
        elif entry.type == tarfile.XGLTYPE:
            if _TOLD & _records(_header(source, entry)).keys():
                raise ArchiveError("The archive has a name or a size for all its entries.")
        elif entry.type == tarfile.GNUTYPE_LONGNAME:
            told[b"path"] = _header(source, entry).rstrip(b"\0")
        elif entry.type == tarfile.GNUTYPE_LONGLINK:
            told[b"linkpath"] = _header(source, entry).rstrip(b"\0")
        else:
            _take(source, entry, told, into)
            told = {}
        block = source.read(_BLOCK)


def _take(source: _Bounded, entry: tarfile.TarInfo, told: dict[bytes, bytes], into: _Folder) -> None:
    """One entry, with what was told of it before."""
    name = into.name(_text(told[b"path"]) if b"path" in told else entry.name)
    target = _text(told[b"linkpath"]) if b"linkpath" in told else entry.linkname
    if entry.isdir():
        into.make_folder(name)
    elif entry.issym():
        into.link(name, target)
    elif entry.islnk():
        into.copy(name, "/".join(part for part in target.split("/") if part not in {"", "."}))
    elif (
        entry.isreg()
        and entry.type != tarfile.GNUTYPE_SPARSE
        and not any(key.startswith(b"GNU.sparse") for key in told)
    ):
        size = _number(told[b"size"]) if b"size" in told else entry.size
        into.write(name, cast("IO[bytes]", _Content(source, size)), executable=bool(entry.mode & 0o111))
        source.exactly(-size % _BLOCK)
    else:
        raise ArchiveError(f"The archive has an entry {name[:200]!r} that is no file, folder or link.")


def _header(source: _Bounded, entry: tarfile.TarInfo) -> bytes:
    """What an extended header holds."""
    if entry.size > MAX_HEADER_BYTES:
        raise ArchiveTooLarge("The archive says too much of an entry.")
    return source.exactly(entry.size + -entry.size % _BLOCK)[: entry.size]


def _records(data: bytes) -> dict[bytes, bytes]:
    """The names and values of an extended header: `length name=value`, a line for each."""
    return dict(_each_record(data))


def _each_record(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 9)
        end = at + _number(data[at:space]) if space >= 0 else at
        name, sign, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space or not sign or data[end - 1 : end] != b"\n":
            raise ArchiveError("The archive has an extended header that is none.")
        yield name, value
        at = end


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ArchiveError("The archive has a size that is no number.")
    return int(text)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _unzip(archive: IO[bytes], into: _Folder) -> None:
    _check_directory(archive)
    with zipfile.ZipFile(archive) as found:
        # Entries that share their bytes make a bomb, or work without end, of a small file.
        if sum(info.compress_size for info in found.infolist()) > archive.seek(0, os.SEEK_END):
            raise ArchiveError("The archive has entries that overlap.")
        for info in found.infolist():
            name = into.name(info.filename)
            mode = info.external_attr >> 16 if info.create_system == 3 else 0  # 3: made on Unix (APPNOTE.TXT 4.4.2)
            if info.flag_bits & 1:
                raise ArchiveError("The archive is encrypted.")
            if info.compress_type not in _METHODS:
                raise ArchiveError("The archive is compressed in another way than `deflate`.")
            if info.filename.endswith("/"):
                into.make_folder(name)
            elif stat.S_ISLNK(mode):
                with found.open(info) as content:
                    into.link(name, os.fsdecode(content.read(MAX_LINK_BYTES + 1)))
            elif stat.S_IFMT(mode) in {0, stat.S_IFREG}:
                with found.open(info) as content:
                    into.write(name, content, executable=bool(mode & 0o111))
            else:
                raise ArchiveError(f"The archive has an entry {name[:200]!r} that is no file, folder or link.")


def _check_directory(archive: IO[bytes]) -> None:
    """Refuse a zip file whose directory would fill the memory; zipfile reads it as a whole.

    Raises:
        ArchiveError: it has none. Files of more than 4 GiB or 65,535 entries (zip64) are taken to be too large.
    """
    end = archive.seek(0, os.SEEK_END)
    archive.seek(max(0, end - _END_OF_DIRECTORY.size - _MAX_REMARK))
    tail = archive.read()
    archive.seek(0)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END_OF_DIRECTORY.size:
        raise ArchiveError("The archive is a zip file without an end.")
    if _END_OF_DIRECTORY.unpack_from(tail, at)[5] > MAX_DIRECTORY_BYTES or b"PK\x06\x07" in tail[max(0, at - 20) : at]:
        raise ArchiveTooLarge("The archive has too many entries.")
