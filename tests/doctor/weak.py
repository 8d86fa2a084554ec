"""A bubblewrap that does not do all that it is told, for a doctor to find out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAM = """#!/usr/bin/python3 -ISE
import os, sys
words, leave_out, instead, more = sys.argv[1:], {leave_out}, {instead}, {more}
if "--version" not in words:
    end = words.index("--")
    mine, rest = words[:end], words[end:]
    for gone in leave_out:
        for at in range(len(mine) - len(gone), -1, -1):
            if mine[at:at + len(gone)] == gone: del mine[at:at + len(gone)]
    for old, new in instead:
        for at in range(len(mine) - len(old), -1, -1):
            if mine[at:at + len(old)] == old: mine[at:at + len(old)] = new
    at = mine.index("--remount-ro") if "--remount-ro" in mine else len(mine)
    words = mine[:at] + more + mine[at:] + rest
os.execv({real!r}, [{real!r}, *words])
"""
"""Before the first ``--remount-ro`` mounts can still be added."""


@dataclass(frozen=True)
class Weakness:
    """What of bubblewrap's arguments is left out, replaced, or added."""

    leave_out: Sequence[Sequence[str]] = ()
    instead: Sequence[tuple[Sequence[str], Sequence[str]]] = ()
    more: Sequence[str] = field(default=())


def write(folder: Path, real: str, weakness: Weakness) -> None:
    """Put such a bubblewrap into a folder."""
    program = folder / "bwrap"
    program.write_text(
        PROGRAM.format(
            real=real,
            leave_out=json.dumps(weakness.leave_out),
            instead=json.dumps(weakness.instead),
            more=json.dumps(weakness.more),
        )
    )
    program.chmod(0o755)
