"""``cloche sweep``: removes what dead processes left on an engine, and says what it was."""

from __future__ import annotations

import json
import os
from typing import Any

import anyio

from cloche.backends.contract import Leftover
from cloche.cli import exits, render
from cloche.cli.writer import STDOUT, write_all
from cloche.errors import ClocheError
from cloche.result import ErrorInfo
from cloche.runtime import Swept, sweep_now
from cloche.settings import Settings

NOT_REMOVED = 1
"""Something could not be removed."""


def execute(mode: str | None, *, dry_run: bool, as_json: bool) -> int:
    """Sweep, and give the exit status. Errors are told, on stderr or as JSON; nothing is raised for them."""
    try:
        settings = Settings.from_env(os.environ, **({} if mode is None else {"mode": mode}))
        mode = str(settings.mode)
        swept = anyio.run(lambda: sweep_now(settings, dry_run=dry_run))
    except ClocheError as error:
        if as_json:
            _print(mode, dry_run, (), error)
        else:
            render.say_error(error)
        return exits.status_of_error(error)
    if as_json:
        _print(swept.mode, dry_run, swept.leftovers, None)
    else:
        _tell(swept, dry_run=dry_run)
    stayed = not dry_run and not all(leftover.removed for leftover in swept.leftovers)
    return NOT_REMOVED if stayed else 0


def _tell(swept: Swept, *, dry_run: bool) -> None:
    lines = [_line(leftover, dry_run=dry_run) for leftover in swept.leftovers]
    lines.append(
        f"mode {swept.mode}: nothing is left of the dead"
        if not lines
        else f"mode {swept.mode}: {sum(leftover.removed for leftover in swept.leftovers)} of {len(lines)} removed"
        if not dry_run
        else f"mode {swept.mode}: {len(lines)} would be removed"
    )
    for line in lines:
        render.say(line)


def _line(leftover: Leftover, *, dry_run: bool) -> str:
    did = "removed" if leftover.removed else "would remove" if dry_run else "could not remove"
    return f"{did} the {leftover.kind} {leftover.name}: {leftover.reason}"


def _print(mode: str | None, dry_run: bool, leftovers: Any, error: ClocheError | None) -> None:  # noqa: FBT001
    found = {
        "mode": mode,
        "dry_run": dry_run,
        "leftovers": [
            {"kind": each.kind, "name": each.name, "removed": each.removed, "reason": each.reason} for each in leftovers
        ],
        "error": None if error is None else ErrorInfo.of(error).model_dump(),
    }
    write_all(STDOUT, json.dumps(found).encode() + b"\n")
