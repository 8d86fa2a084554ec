"""``python -m tests.soak``: see the package's docstring."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import anyio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tests import modes
from tests.soak import places
from tests.soak.course import soak
from tests.soak.places import Place
from tests.soak.plan import plan
from tests.soak.report import Report

from cloche.testing.conformance import must_work


def main(arguments: Sequence[str] | None = None) -> int:
    """A soak as the command line wants it. 0: it has found nothing; 1: it has, or could not be done."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--runs", type=int, default=300, help="over all modes together")
    parser.add_argument("--seed", type=int, default=None, help="that of an earlier soak, to have the same again")
    parser.add_argument("--modes", default=",".join(places.MODES), help="with commas between")
    parser.add_argument("--report", type=Path, default=Path("build/soak.json"))
    parser.add_argument("--patience", type=float, default=200, help="seconds for what sweeps keep for a while")
    options = parser.parse_args(arguments)
    wanted = [name.strip() for name in options.modes.split(",") if name.strip()]
    if unknown := sorted(set(wanted) - set(places.MODES)):
        parser.error(f"no such mode: {', '.join(unknown)}; there are {', '.join(places.MODES)}")
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    report = Report(seed, f"soak{secrets.token_hex(3)}")
    # A table that is cut to 80 columns is of no use in a log.
    console = Console(width=None if sys.stdout.isatty() else 150)
    # Not one of cloche's own names: the inventory takes those for leftovers.
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    found: list[Place] = []
    try:
        _find(wanted, folder, report, found)
        if found:
            _soak(found, options, folder, report, console)
    finally:
        for place in found:
            with contextlib.suppress(RuntimeError):  # which is told of already, or comes after something worse
                place.close()
    report.show(console)
    report.write(options.report)
    if report.failed:
        console.print(f"to have the same again: --seed {seed} --runs {options.runs} --modes {options.modes}")
        console.print(f"what the clients said: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if report.failed else 0


def _find(wanted: Sequence[str], folder: Path, report: Report, found: list[Place]) -> None:
    for mode in wanted:
        try:
            found.append(places.find(mode, folder))
        except modes.Unset as exc:
            report.skipped[mode] = str(exc)
            if must_work(mode):
                report.absent.append(mode)


def _soak(found: Sequence[Place], options: argparse.Namespace, folder: Path, report: Report, console: Console) -> None:
    runs: int = options.runs
    names = [place.mode for place in found]
    planned = plan(report.seed, names, runs, report.mark, frozenset(p.mode for p in found if p.restartable))
    report.plan = [run for of_mode in planned.values() for run in of_mode]
    console.print(f"seed {report.seed}: {runs} runs on {', '.join(names)}; uid {os.geteuid()}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=runs)
        done = itertools.count(1)

        def told() -> None:
            progress.advance(bar)
            if (number := next(done)) % max(1, runs // 10) == 0 and not console.is_terminal:
                console.print(f"{number} of {runs}")  # a log has no bar that grows

        anyio.run(soak, found, planned, folder, report, told, options.patience)


if __name__ == "__main__":
    sys.exit(main())
