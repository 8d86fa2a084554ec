"""What the tests of all scenes need: the scene's own words, and what can be seen of cgroups from outside."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import cloche

CHOSEN = os.environ.get("SCENE_CHOSEN", "")
OWN = os.environ.get("SCENE_OWN", "")
SLOW = int(os.environ.get("SCENE_SLOW", "1"))
"""How many times slower than a usual machine this one may be."""
CGROUPS = Path("/sys/fs/cgroup")


def python(source: str, **fields: object) -> cloche.Spec:
    """A script given as text."""
    return cloche.Spec.model_validate({"name": "main.py", "content": source, **fields})


def cgroups() -> set[str]:
    """All cgroups with cloche's name on them, whoever made them."""
    return {str(folder.relative_to(CGROUPS)) for folder in CGROUPS.glob("**/cloche-o*")}


def none_left(before: set[str], within_s: float = 5.0) -> list[str]:
    """The cgroups that have come since and do not go in time, with the processes that hold them."""
    end = time.monotonic() + within_s * SLOW
    while (left := cgroups() - before) and time.monotonic() < end:
        time.sleep(0.05)
    return [f"{name}: {', '.join(_holders(CGROUPS / name)) or 'empty'}" for name in sorted(left)]


def _holders(folder: Path) -> list[str]:
    found = []
    for procs in folder.glob("**/cgroup.procs"):
        for pid in procs.read_text().split():
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            words = dict(line.split(":\t", 1) for line in status if ":\t" in line)
            seen = " ".join(
                f"{name}={words[name]}" for name in ("Name", "State", "PPid", "SigPnd", "ShdPnd", "SigBlk", "SigIgn")
            )
            found.append(f"{procs.parent.name}/{pid} {seen}")
    return found


def note(name: str, value: float) -> None:
    """Put a figure among the results, and on the screen."""
    with open(Path(os.environ["SCENE_RESULTS"], "figures.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps({"scene": os.environ["SCENE"], "name": name, "value": value}) + "\n")
