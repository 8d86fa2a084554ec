"""Writes artifacts into a folder of the host: below it, and never through a link."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cloche.cli.writer import write_all
from cloche.errors import InvalidSpec, ProtocolError
from cloche.result import ArtifactInfo
from cloche.spec import check_inside

_BY_DESCRIPTOR = os.open in os.supports_dir_fd and os.mkdir in os.supports_dir_fd
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)


def check_folder(folder: Path) -> None:
    """Find out, before anything runs, whether artifacts can be written there. Makes nothing.

    Raises:
        InvalidSpec: they cannot.
    """
    try:
        there = folder.absolute()
    except OSError:
        raise _refused(folder, "the current folder does not exist any more") from None
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise _refused(folder, f"{os.fspath(there)!r} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _refused(folder, f"{os.fspath(there)!r} is not writable")


def save(folder: Path, artifacts: Iterable[ArtifactInfo]) -> None:
    """Write each artifact to its path below ``folder``, which is made if need be. A file that is there is replaced.

    Raises:
        ProtocolError: a path leads out of the folder. Nothing of that artifact is written.
        InvalidSpec: something cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise _refused(folder, f"{exc.strerror}, at {os.fspath(exc.filename or folder)!r}") from None
    for artifact in artifacts:
        parts = _parts(artifact.path)
        try:
            if _BY_DESCRIPTOR:
                _save_by_descriptor(folder, parts, artifact.data)
            else:
                _save_by_path(folder, parts, artifact.data)
        except OSError as exc:
            # Its own path, not the name under which it is written first.
            raise _refused(folder, f"{exc.strerror}, at artifact {artifact.path!r}") from None


def _refused(folder: Path, why: str) -> InvalidSpec:
    return InvalidSpec(
        f"The artifacts cannot be written to {os.fspath(folder)!r}: {why}.", hint="Choose another folder with --output."
    )


def _parts(path: str) -> list[str]:
    try:
        check_inside(path, "artifact")
        parts = path.split("/")
        # What is one name on Linux can be a path on Windows.
        if any(os.path.basename(part) != part or os.path.splitdrive(part)[0] for part in parts):
            raise ValueError(f"artifact {path!r} has a name that is a path on this system")
    except ValueError as exc:
        raise ProtocolError(f"{exc}.") from None
    return parts


def _save_by_descriptor(folder: Path, parts: list[str], data: bytes) -> None:
    at = os.open(folder, _FOLDER)
    try:
        for part in parts[:-1]:
            with suppress(FileExistsError):
                os.mkdir(part, dir_fd=at)
            inner = os.open(part, _FOLDER | _NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        # Beside it and then renamed: that replaces a link or a second name, where opening it would write through.
        beside = f".cloche-{secrets.token_hex(8)}"
        fd = os.open(beside, _CREATE | _NOFOLLOW, 0o666, dir_fd=at)
        try:
            _write_and_close(fd, data)
            os.replace(beside, parts[-1], src_dir_fd=at, dst_dir_fd=at)
        except OSError:
            os.unlink(beside, dir_fd=at)
            raise
    finally:
        os.close(at)


def _save_by_path(folder: Path, parts: list[str], data: bytes) -> None:
    at = folder
    for part in parts[:-1]:
        at /= part
        at.mkdir(exist_ok=True)
        if at.is_symlink():
            raise NotADirectoryError(20, "a link stands in the way", os.fspath(at))
    beside = at / f".cloche-{secrets.token_hex(8)}"
    try:
        _write_and_close(os.open(beside, _CREATE, 0o666), data)
        beside.replace(at / parts[-1])
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _write_and_close(fd: int, data: bytes) -> None:
    try:
        write_all(fd, data)
    finally:
        os.close(fd)
