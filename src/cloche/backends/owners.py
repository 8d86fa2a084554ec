"""Who is alive: each process instance holds a lock on a file of its own for as long as it lives.

The file's lines name the folders in which the owner makes things, such as cgroups. Whoever can take the lock knows that the
owner is dead, whatever its pid was, and may remove what bears its name there.

What is not a file carries the id of the folder of locks beside its owner's name: who shares that folder can tell whether the
owner lives, and nobody else can. All functions here block for a moment.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where this backend only says that it needs Linux
    fcntl = None  # type: ignore[assignment]

MANY_TIMES = 100
NOTE_LIFE_S = 2 * 24 * 3600.0
"""For so long a dead owner's file is kept for a place that is none of ours to look after. What it made there has expired by then
(a run takes a day at most)."""

FINISH_S = 120.0
"""For so long after a sweep found it dead, an owner's file is kept: what it had asked an engine for may be made only after that
sweep has looked, and without the file nobody could tell that its owner is dead."""
_FOUND = "found dead at "

SUPPORTED: bool = fcntl is not None
"""Whether this system has such locks."""


def state_folder() -> Path:
    """The folder for such files: /run/cloche for root, else one in XDG_RUNTIME_DIR or /tmp that is ours alone.

    Raises:
        OSError: none of them can be made, or others made them.
    """
    uid, runtime = os.geteuid(), os.environ.get("XDG_RUNTIME_DIR", "")
    places = [(Path("/run/cloche"), 0o755)] if uid == 0 else []  # the boxes' own uids must be able to pass through it
    if runtime.startswith("/"):
        places.append((Path(runtime, "cloche"), 0o700))
    places += [(Path(f"{top}/cloche-{uid}"), 0o700) for top in ("/tmp", "/var/tmp", "/dev/shm")]
    problem: OSError | None = None
    for folder, mode in places:
        try:
            return own_folder(folder, mode)
        except OSError as exc:
            problem = problem or exc
    assert problem is not None
    raise problem


def own_folder(folder: Path, mode: int) -> Path:
    """A folder that is ours alone, with exactly this mode, whatever the umask.

    Raises:
        OSError: it cannot be made, or somebody else made it.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "not a folder of ours alone", str(folder))
    if stat.S_IMODE(found.st_mode) != mode:
        folder.chmod(mode)
    return folder


def place_id(folder: Path) -> str:
    """A name for this folder of locks, the same for all who share it and for nobody else: a copy of the folder on another
    machine, or after a restart, has another one.

    Raises:
        OSError: it can be neither read nor made.
    """
    path = folder / "place"
    for _ in range(MANY_TIMES):
        with contextlib.suppress(FileNotFoundError):
            text = path.read_text(encoding="ascii") + _boot_id()
            return hashlib.sha256(text.encode()).hexdigest()[:16]
        new = folder / f"place.{secrets.token_hex(4)}"
        new.write_text(secrets.token_hex(8), encoding="ascii")
        with contextlib.suppress(FileExistsError):
            os.link(new, path)  # whole, or not at all
        new.unlink()
    raise FileNotFoundError(errno.ENOENT, "it does not stay", str(path))


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return ""


def is_alive(folder: Path, name: str) -> bool | None:
    """Whether the owner of that name, whose lock is or was in ``folder``, lives; None: that cannot be seen.

    A file that is not there proves nothing: its owner may have closed, or somebody may have cleaned up.
    """
    if "/" in name:
        return None
    try:
        fd = os.open(folder / f"{name}.owner", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ValueError):  # the name comes from an engine, and may be none that a file could have
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class Owner:
    """A living owner. Closing it, or the death of its process, gives the lock up."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.owner"
        # Locked before it has the name under which the others look for it. One that sweeps may still be quicker.
        for _ in range(MANY_TIMES):
            self._fd = os.open(folder / f"{name}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._fd).st_nlink:
                    (folder / f"{name}.new").rename(self._path)
                    return
            except (BlockingIOError, FileNotFoundError):
                time.sleep(0.001)
            os.close(self._fd)
        raise BlockingIOError(errno.EAGAIN, "others hold the lock of a new owner", str(self._path))

    def note(self, place: Path | str) -> None:
        """Write down a folder in which things with the owner's name are about to be made, or a line about where else."""
        os.write(self._fd, f"{place}\n".encode())

    def close(self, *, left: bool = False) -> None:
        """Give the lock up, and forget the file, unless something of ours is ``left``: then it tells that we are no more."""
        if not left:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
        os.close(self._fd)


@dataclass(slots=True)
class Dead:
    """An owner that is no more, the folders it noted, and its other notes. Set ``left`` when something of it is left."""

    name: str
    folders: list[Path]
    notes: list[str] = field(default_factory=list)
    age_s: float = field(default=0.0, compare=False)
    """Since its file was last written to."""
    found_s: float = field(default=0.0, compare=False)
    """Since a sweep first found it, and left its file."""
    left: bool = False


def dead(folder: Path, *, look_only: bool = False) -> Iterator[Dead]:
    """Each dead owner; its file goes after the caller has dealt with it, unless something is left for the next sweep, or
    ``look_only`` says that nothing may change.
    """
    for path in [*folder.glob("*.owner"), *folder.glob("*.new")]:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink == 0:
                continue  # another one was quicker
            with open(fd, closefd=False, encoding="utf-8", errors="replace") as text:
                lines = [line.rstrip("\n") for line in text]
            marks = [line for line in lines if line.startswith(_FOUND) and line.removeprefix(_FOUND).isdecimal()]
            folders = [Path(line) for line in lines if line.startswith("/")]
            notes = [line for line in lines if not line.startswith(("/", _FOUND))]
            now = time.time()
            found_s = now - float(marks[0].removeprefix(_FOUND)) if marks else 0.0
            found = Dead(path.stem, folders, notes, now - os.fstat(fd).st_mtime, found_s)
            yield found
            if look_only:
                continue
            if not found.left:
                path.unlink(missing_ok=True)
            elif not marks:
                os.write(fd, f"{_FOUND}{int(now)}\n".encode())
        except BlockingIOError:
            continue  # alive
        finally:
            os.close(fd)
