"""``cloche sweep``: removes what dead processes left on an engine, and says what it was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict

import anyio

from cloche.backends.contract import Leftover
from cloche.cli import exits, render
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
            _print(mode, (), error, dry_run=dry_run)
        else:
            render.say_error(error)
        return exits.status_of_error(error)
    if not as_json:
        _tell(swept, dry_run=dry_run)
    elif not _print(swept.mode, swept.leftovers, None, dry_run=dry_run):
        return exits.NOT_RUN
    stayed = not dry_run and not all(leftover.removed for leftover in swept.leftovers)
    return NOT_REMOVED if stayed else 0


def _tell(swept: Swept, *, dry_run: bool) -> None:
    found = swept.leftovers
    for leftover in found:
        did = "removed" if leftover.removed else "would remove" if dry_run else "could not remove"
        render.say(f"{did} the {leftover.kind} {leftover.name}: {leftover.reason}")
    if not found:
        summary = "nothing is left of the dead"
    elif dry_run:
        summary = f"{len(found)} would be removed"
    else:
        summary = f"{sum(leftover.removed for leftover in found)} of {len(found)} removed"
    render.say(f"mode {swept.mode}: {summary}")


def _print(mode: str | None, leftovers: Sequence[Leftover], error: ClocheError | None, *, dry_run: bool) -> bool:
    return render.print_json(
        {
            "mode": mode,
            "dry_run": dry_run,
            "leftovers": [asdict(leftover) for leftover in leftovers],
            "error": None if error is None else ErrorInfo.of(error).model_dump(),
        }
    )
