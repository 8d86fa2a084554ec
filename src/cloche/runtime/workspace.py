"""A folder of the host → the entries of a bundle, without following a link out and without reading more than is allowed.

Blocks; the runtime calls it in a worker thread. Everything is opened relative to its folder's descriptor and looked at
after it was opened, so that a folder that changes meanwhile can give old or new content, never somebody else's file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from cloche.errors import InvalidSpec, WorkspaceTooLarge
from cloche.spec import MAX_PATH_BYTES, encode
from cloche.supervisor.bundle import Entry, File, Folder, Link

MAX_ENTRIES = 20_000
"""More is a dependency tree or a mistake; empty files cost the box memory too."""
MAX_DEPTH = 64
_LINK_HOPS = 40
"""After so many the kernel gives up with ELOOP (Linux, fs/namei.c MAXSYMLINKS)."""

# Windows has neither descriptors of folders nor these flags; there a path is used, and links are still not followed.
_BY_DESCRIPTOR = os.open in os.supports_dir_fd and os.scandir in os.supports_fd
_READ = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)  # a fifo that took a file's place must not stop us
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)
_NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_FOLDER = _READ | getattr(os, "O_DIRECTORY", 0)


class Budget:
    """The bytes that may still be delivered."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.left = bound

    def take(self, size: int) -> None:
        """Count what will be delivered.

        Raises:
            WorkspaceTooLarge: it does not fit.
        """
        if size > self.left:
            raise WorkspaceTooLarge(f"Workspace and stdin together are larger than {self.bound} bytes.")
        self.left -= size


def read_workspace(root: Path, budget: Budget) -> list[Entry]:
    """Everything in ``root``, folders before what they hold, sorted by name.

    Raises:
        WorkspaceTooLarge: it is larger than the budget, or has too many entries. Found out before all is read.
        InvalidSpec: ``root`` is no folder; an entry is no file, folder or inner link, or cannot be read.
    """
    try:
        place = _Place(os.fspath(root), os.open(root, _FOLDER) if _BY_DESCRIPTOR else None)
    except OSError as exc:
        raise InvalidSpec(
            f"The workspace {os.fspath(root)!r} cannot be read: {exc.strerror}.", hint="Give a folder that exists."
        ) from None
    entries = list(_walk(place, "", budget, [0]))
    _check_links(entries)
    return entries


def open_file(path: str) -> int:
    """A descriptor of a regular file of the host, links followed: the caller named it.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(path, _READ)


def read_all(fd: int, bound: int) -> bytes | None:
    """The file's bytes, or None when there are more than ``bound``."""
    chunks: list[bytes] = []
    left = bound + 1
    while left > 0 and (chunk := os.read(fd, min(left, 2**20))):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks) if left > 0 else None


def resolve_inside(path: str, folder: str, links: dict[str, str]) -> str | None:
    """Where ``path``, read from ``folder``, leads when the links are followed; None: to nothing, the links run in a circle.

    Raises:
        ValueError: out of the workspace.
    """
    here = folder.split("/") if folder else []
    todo = path.split("/")[::-1]
    hops = 0
    while todo:
        part = todo.pop()
        if part == "..":
            if not here:
                raise ValueError("leaves the workspace")
            here.pop()
        elif part not in {"", "."}:
            here.append(part)
            target = links.get("/".join(here))
            if target is not None:
                hops += 1
                if hops > _LINK_HOPS:
                    return None
                here.pop()
                todo += target.split("/")[::-1]
    return "/".join(here)


class _Place:
    """An open folder: by descriptor where the system has such, else by path."""

    def __init__(self, path: str, fd: int | None) -> None:
        self.path = path
        self.fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.fd is not None:
            os.close(self.fd)

    def scan(self) -> list[os.DirEntry[str]]:
        with os.scandir(self.path if self.fd is None else self.fd) as found:
            return sorted(found, key=lambda entry: entry.name)

    def open(self, name: str) -> int:
        if self.fd is None:
            return os.open(os.path.join(self.path, name), _READ)
        return os.open(name, _READ | _NOFOLLOW, dir_fd=self.fd)

    def folder(self, name: str) -> _Place:
        path = os.path.join(self.path, name)
        if self.fd is None:
            return _Place(path, None)
        return _Place(path, os.open(name, _FOLDER | _NOFOLLOW, dir_fd=self.fd))

    def link(self, name: str) -> str:
        if self.fd is None:
            return os.readlink(os.path.join(self.path, name))
        return os.readlink(name, dir_fd=self.fd)


def _walk(place: _Place, prefix: str, budget: Budget, count: list[int]) -> Iterator[Entry]:
    with place:
        try:
            found = place.scan()
        except OSError as exc:
            raise _unreadable(prefix or ".", exc) from None
        for entry in found:
            path = prefix + entry.name
            count[0] += 1
            if count[0] > MAX_ENTRIES:
                raise WorkspaceTooLarge(f"The workspace has more than {MAX_ENTRIES} entries.")
            if len(encode(path)) > MAX_PATH_BYTES or path.count("/") > MAX_DEPTH:
                raise InvalidSpec(
                    f"The workspace is nested too deeply, at {path[:200]!r}.", hint="Deliver a flatter folder."
                )
            try:
                yield from _entry(place, entry, path, budget, count)
            except FileNotFoundError:
                continue  # removed since the folder was listed: as if it had never been there
            except OSError as exc:
                raise _unreadable(path, exc) from None


def _entry(place: _Place, entry: os.DirEntry[str], path: str, budget: Budget, count: list[int]) -> Iterator[Entry]:
    if entry.is_symlink():
        yield Link(path, place.link(entry.name))
    elif entry.is_dir(follow_symlinks=False):
        inner = place.folder(entry.name)
        yield Folder(path)
        yield from _walk(inner, path + "/", budget, count)
    elif entry.is_file(follow_symlinks=False):
        yield _file(place, entry.name, path, budget)
    else:
        raise InvalidSpec(
            f"{path!r} in the workspace is neither a file nor a folder nor a link.",
            hint="Leave fifos, sockets and devices out of the workspace.",
        )


def _file(place: _Place, name: str, path: str, budget: Budget) -> File:
    fd = place.open(name)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EAGAIN, "it changed while it was read")
        if status.st_size > budget.left:
            budget.take(status.st_size)
        data = read_all(fd, budget.left)
        budget.take(budget.left + 1 if data is None else len(data))
    finally:
        os.close(fd)
    assert data is not None  # else take has raised
    return File(path, data, executable=bool(status.st_mode & 0o111))


def _check_links(entries: list[Entry]) -> None:
    links = {entry.path: entry.target for entry in entries if isinstance(entry, Link)}
    for path, target in links.items():
        folder = path.rpartition("/")[0]
        try:
            if os.path.isabs(target) or target.startswith("/"):
                raise ValueError("is absolute")
            # Twice: word by word, as the supervisor's reader checks it, and as the kernel will follow it.
            resolve_inside(target, folder, {})
            resolve_inside(target, folder, links)
        except ValueError as exc:
            raise InvalidSpec(
                f"The link {path!r} in the workspace {exc}: it points to {target!r}.",
                hint="Replace it by a relative link to something inside the workspace, or by the file itself.",
            ) from None


def _unreadable(path: str, exc: OSError) -> InvalidSpec:
    if exc.errno in {errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.EAGAIN}:
        return InvalidSpec(
            f"{path!r} in the workspace changed while it was read.",
            hint="Run again when it is at rest.",
            retryable=True,
        )
    return InvalidSpec(
        f"{path!r} in the workspace cannot be read: {exc.strerror}.", hint="Make it readable, or leave it out."
    )
