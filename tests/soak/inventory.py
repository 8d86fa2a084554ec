"""All that runs could leave on this machine and on its engines, and what they must not touch there. Blocks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import leftovers
from tests.soak.places import Place

from cloche.testing.conformance.observe import processes_with


@dataclass(frozen=True)
class Inventory:
    """What there was at a moment, as text for people."""

    things: frozenset[str]
    """What a run can make. That some of another program's goes meanwhile is no fault."""
    kept: frozenset[str]
    """What no run makes or removes."""

    def changed_since(self, before: Inventory) -> frozenset[str]:
        """What there is now and was not before, and what was and is no more."""
        gone = {f"{thing}, which was there before, is gone" for thing in before.kept - self.kept}
        return (self.things - before.things) | (self.kept - before.kept) | gone


def take(places: Iterable[Place], folders: Iterable[Path], mark: str) -> Inventory:
    """All there is. ``folders``: for temporary files of clients and services. ``mark``: stands in every script's command line."""
    places = list(places)
    engines = {f"{thing} of {place.mode}" for place in places for thing in place.has()}
    machine = (thing for thing in leftovers.now() if not _lives(thing))
    groups = {f"{group} of {place.mode}" for place in places for group in place.groups()}
    things = {*machine, *groups, *_mounts(), *_temporary(folders), *_scripts(mark)}
    return Inventory(frozenset(things), frozenset(engines))


def waiting(owners: Iterable[str]) -> list[str]:
    """Files of dead owners that a sweep keeps for a while: their engine may still make what they had asked it for."""
    paths = (leftovers._state_folder() / f"{owner}.owner" for owner in owners)
    return sorted(f"file {path}" for path in paths if leftovers._waits_for_an_engine(path))


def settled(look: Callable[[], Inventory], before: Inventory, within_s: float) -> list[str]:
    """What has come since ``before``, or is gone, and stays so. On a busy machine some goes late."""
    end = time.monotonic() + within_s
    left = look().changed_since(before)
    while left and time.monotonic() < end:
        time.sleep(0.5)
        left &= look().changed_since(before)
    return sorted(left)


def _lives(thing: str) -> bool:
    """Whether it is another program's folder: that of a service, which holds a lock in it, or that of a build of cloche."""
    kind, _, name = thing.partition(" ")
    lock = Path(name, "lock")
    return kind == "path" and (
        Path(name).name.startswith("cloche-zig-") or (lock.exists() and leftovers._is_locked(lock))
    )


def _mounts() -> Iterator[str]:
    """Mounts of this machine's own namespace, but for those of the kernel's that a cgroup or a user's session brings."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if not words[4].startswith("/run/user/"):
            yield f"mount {words[4]} of {' '.join(words[words.index('-') + 1 :][:2])}"


def _temporary(folders: Iterable[Path]) -> Iterator[str]:
    for folder in folders:
        for path in folder.rglob("*"):
            yield f"path {path}"


def _scripts(mark: str) -> Iterator[str]:
    for pid in processes_with(mark):
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX":
                yield f"process {pid} of a script: {Path(f'/proc/{pid}/cmdline').read_bytes()[:200]!r}"
