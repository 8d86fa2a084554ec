"""Things that take minutes to make and are kept: outside the checkout, so that a fresh clone finds what an older one made."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

KEPT_S = 7 * 24 * 3600.0


def home() -> Path:
    """The folder of everything kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "cloche-engines")


def key(recipe: str) -> str:
    """A short name for a recipe: another one when anything in it has changed."""
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]


def obtain(name: str, recipe: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name``-(hash of its recipe): as it is when it is there, else filled by ``make``.

    It is made under another name and renamed when complete; ``make`` may use the folder above its own too. What older
    recipes gave is removed when something new is made, a week after its last use: engines that are up may still need it.
    """
    folder = home() / f"{name}-{key(recipe)}"
    if folder.exists():
        os.utime(folder)
        return folder
    home().mkdir(parents=True, exist_ok=True)
    with open(home() / f"{name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for broken in home().glob(f"making-{name}-*"):
                shutil.rmtree(broken)
            with tempfile.TemporaryDirectory(dir=home(), prefix=f"making-{name}-") as temporary:
                made = Path(temporary, "made")
                made.mkdir()
                make(made)
                for old in home().glob(f"{name}-{'[0-9a-f]' * 16}"):
                    if time.time() - old.stat().st_mtime > KEPT_S:
                        shutil.rmtree(old)
                made.rename(folder)
    return folder
