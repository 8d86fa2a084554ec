"""Unpacks a tar or zip file that a stranger sent: bounded, into a fresh folder, and never out of it. Blocks.

Links are made last, when nothing is written any more, so that nothing can be written through one. Where they lead is not looked
at here: whoever reads the folder must not follow them out.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, cast

CHUNK = 256 * 1024
MAX_DIRECTORY_BYTES = 8 * 2**20
"""Of a zip file's directory, which is read as a whole: 20,000 entries with names of 350 bytes."""
MAX_LINK_BYTES = 4095
"""PATH_MAX less its NUL (Linux, include/uapi/linux/limits.h)."""
_PER_ENTRY = 8 * 512
"""Bytes of a tar file that belong to one entry and not to its content: its header, those of a long name, padding."""
_TAIL = 2**20
"""Bytes of padding that may follow the last entry of a tar file."""
_END_OF_DIRECTORY = struct.Struct("<4s4H2LH")
"""The end of a zip file (PKWARE, APPNOTE.TXT 4.3.16): signature, four counts, size and place of the directory, remark."""
_MAX_REMARK = 65535
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


def unpack(archive: IO[bytes], folder: Path, *, size: int, entries: int) -> None:
    """Unpack a tar file (plain, gzip, bzip2, xz) or a zip file into ``folder``, which is there and empty.

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
            _untar(_decompressed(archive, start), into, size + entries * _PER_ENTRY + _TAIL)
        into.finish()
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as exc:
        raise ArchiveError(f"The archive is neither a tar nor a zip file that can be read: {exc}.") from exc
    except UnicodeError as exc:
        raise ArchiveError("The archive has a name that is no text.") from exc
    except gzip.BadGzipFile as exc:
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
        self._size = size
        self._entries = entries
        self._files: set[str] = set()
        self._links: dict[str, str] = {}

    def name(self, raw: str) -> str:
        """The path of one more entry inside the folder; empty for the archive's own root.

        Raises:
            ArchiveError: it leads out, or is one too many.
        """
        self._entries -= 1
        if self._entries < 0:
            raise ArchiveTooLarge("The archive has too many entries.")
        parts = [part for part in raw.split("/") if part not in {"", "."}]
        if raw.startswith("/") or ".." in parts or "\0" in raw:
            raise ArchiveError(f"The archive has an entry {raw[:200]!r}, which leads out of it.")
        return "/".join(parts)

    def make_folder(self, name: str) -> None:
        os.makedirs(self._folder / name, exist_ok=True)

    def write(self, name: str, source: IO[bytes], *, executable: bool) -> None:
        """A file; one that came before under its name is replaced, as tar has it."""
        path = self._place(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        with os.fdopen(os.open(path, flags, 0o755 if executable else 0o644), "wb") as file:
            while chunk := source.read(min(CHUNK, self._size + 1)):
                self._size -= len(chunk)
                if self._size < 0:
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
        path = self._folder / name
        os.makedirs(path.parent, exist_ok=True)
        return path


class _Bounded:
    """A stream that is not read beyond a bound: what unpacks to much is noticed wherever it is."""

    def __init__(self, source: IO[bytes], bound: int) -> None:
        self._source = source
        self._left = bound

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise ArchiveTooLarge("The archive holds too many bytes.")
        return data


def _decompressed(archive: IO[bytes], start: bytes) -> IO[bytes]:
    if start.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=archive, mode="rb"))
    if start.startswith(b"BZh"):
        return cast("IO[bytes]", bz2.BZ2File(archive))
    if start.startswith(b"\xfd7zXZ\x00"):
        return cast("IO[bytes]", lzma.LZMAFile(archive))
    return archive


def _untar(source: IO[bytes], into: _Folder, bound: int) -> None:
    # "r|" reads forward only: nothing is looked for, and nothing read twice. Errors are told, not logged and passed over.
    with tarfile.open(fileobj=cast("IO[bytes]", _Bounded(source, bound)), mode="r|", errorlevel=1) as tar:
        for member in tar:
            name = into.name(member.name)
            if member.isdir():
                into.make_folder(name)
            elif member.isreg():
                content = tar.extractfile(member)
                assert content is not None
                into.write(name, content, executable=bool(member.mode & 0o111))
            elif member.issym():
                into.link(name, member.linkname)
            elif member.islnk():
                into.copy(name, "/".join(part for part in member.linkname.split("/") if part not in {"", "."}))
            else:
                raise ArchiveError(f"The archive has an entry {name[:200]!r} that is no file, folder or link.")


def _unzip(archive: IO[bytes], into: _Folder) -> None:
    _check_directory(archive)
    with zipfile.ZipFile(archive) as found:
        for info in found.infolist():
            name = into.name(info.filename)
            mode = info.external_attr >> 16 if info.create_system == 3 else 0  # 3: made on Unix (APPNOTE.TXT 4.4.2)
            if info.flag_bits & 1:
                raise ArchiveError("The archive is encrypted.")
            if info.is_dir():
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
