"""Who is alive: each process instance holds a lock on a file of its own for as long as it lives.

The file's lines name the folders in which the owner makes cgroups. Whoever can take the lock knows that the owner is dead,
whatever its pid was, and may remove what bears its name there. All functions here block for a moment.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where this backend only says that it needs Linux
    fcntl = None  # type: ignore[assignment]


def state_folder() -> Path:
    """The folder for such files: /run/cloche for root, else one in XDG_RUNTIME_DIR or /tmp that is ours alone.

    Raises:
        OSError: it cannot be made, or somebody else made it.
    """
    uid = os.geteuid()
    if uid == 0:
        folder, mode = Path("/run/cloche"), 0o755  # the boxes' own uids must be able to pass through it
    elif os.environ.get("XDG_RUNTIME_DIR") and os.access(os.environ["XDG_RUNTIME_DIR"], os.W_OK):
        folder, mode = Path(os.environ["XDG_RUNTIME_DIR"], "cloche"), 0o700
    else:
        folder, mode = Path(f"/tmp/cloche-{uid}"), 0o700
    folder.mkdir(mode=mode, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder of ours alone")
    return folder


class Owner:
    """A living owner. Closing it, or the death of its process, gives the lock up."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.owner"
        # Locked before it has the name under which the others look for it.
        new = folder / f"{name}.new"
        self._fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(self._path)

    def note(self, folder: Path) -> None:
        """Write down a folder in which things with the owner's name are about to be made."""
        os.write(self._fd, f"{folder}\n".encode())

    def close(self) -> None:
        """Nothing of ours is left: forget the file."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._fd)


def dead(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Each dead owner and the folders it noted; its file is removed after the caller has dealt with it."""
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
                yield path.stem, [Path(line.rstrip("\n")) for line in text]
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        except BlockingIOError:
            continue  # alive
        finally:
            os.close(fd)
