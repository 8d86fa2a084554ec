"""``cloche doctor``: looks at the way to a box, then from inside of one, and says what is in force, and how that is known."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import anyio

from cloche.backends import TABLE
from cloche.cli import exits, progress, render
from cloche.errors import ClocheError
from cloche.isolation import Check, Guarantee, Isolation, State, Verdict
from cloche.result import ErrorInfo
from cloche.runtime.prove.report import Report, examine
from cloche.settings import Mode, Settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NOT_IN_FORCE = 1
"""Something that a run counts on is not in force, or the level is below the one that is required."""

EVERY = tuple(mode for mode in TABLE if mode != Mode.DISABLED)

MEANS = {
    "network": "a script reaches nothing: no address, no name server, no cloud metadata",
    "network-namespace": "one wall before the network: the box has none of its own",
    "socket-filter": "one wall before the network: the supervisor refuses to make sockets",
    "network-policy": "one wall before the network: the engine's own rules",
    "socket-families": "no sockets that reach past a network namespace",
    "no-credentials": "no token, key or engine's socket is in reach",
    "identity": "the script is never root, and cannot become it",
    "no-capabilities": "it has none of root's rights",
    "no-new-privileges": "no program that it starts gives it rights",
    "system-call-filter": "calls to the kernel that no script needs are refused",
    "engine-call-filter": "the engine refuses some as well",
    "process-tree": "what a script started ends with its run",
    "process-visibility": "it sees no processes but its own",
    "namespaces": "it shares no view of the system with the host",
    "user-namespace": "who it is in the box is nobody outside",
    "own-kernel": "the box has a kernel of its own, so that a hole in it is not one in the host's",
    "read-only-root": "the system's files cannot be changed",
    "workspace-read-only": "what was delivered cannot be changed",
    "writable-places": "nothing can be written but /output, /tmp and /dev/shm",
    "disk-limit": "and these are bounded",
    "file-count-limit": "also in the number of files",
    "landlock": "a second wall before files: the kernel's Landlock",
    "kernel-files": "nothing that steers the kernel can be opened",
    "devices": "no devices of the host",
    "memory-limit": "it cannot take the host's memory",
    "kernel-memory-limit": "nor what the kernel holds for it",
    "process-limit": "it cannot start processes without end",
    "cpu-limit": "it cannot take all the CPU time",
    "no-leftovers": "after a run nothing of it is left",
    "log-size": "its output fits into the log from which it is read",
}
"""In words for who meets these names for the first time."""
_MARKS = {State.IN_FORCE: "+", State.NOT_IN_FORCE: "-", State.UNKNOWN: "?"}
_STATES = {Verdict.OK: State.IN_FORCE, Verdict.NOT_OK: State.NOT_IN_FORCE, Verdict.UNKNOWN: State.UNKNOWN}
_STYLES = {State.IN_FORCE: ("✔", "green"), State.NOT_IN_FORCE: ("✘", "bold red"), State.UNKNOWN: ("?", "yellow")}
_OPTIONAL = ("-", "yellow")
"""What is not in force, and what nobody counts on."""


def execute(mode: str | None, *, every: bool, as_json: bool, require: str | None) -> int:
    """Look, tell, and give the exit status. Errors are told too; nothing is raised for them."""
    try:
        required = None if require is None else Isolation(require)
        chosen = [str(each) for each in EVERY] if every else [mode]
        settings = [Settings.from_env(os.environ, **({} if one is None else {"mode": one})) for one in chosen]
    except ClocheError as error:
        _tell_error(mode, error, as_json=as_json)
        return exits.status_of_error(error)
    with progress.shown(wanted=not as_json):
        reports = anyio.run(_examine_all, settings, required)
    if as_json:
        told = render.print_json([report.to_dict() for report in reports] if every else reports[0].to_dict())
    else:
        told = all(_tell(report) for report in reports)
    return status(reports) if told else exits.NOT_RUN


def status(reports: list[Report]) -> int:
    """0: all is well. Of several modes those count that can be used at all."""
    looked = [report for report in reports if report.posture is not None]
    if not looked:
        return exits.NOT_RUN
    return 0 if all(report.ok for report in looked) else NOT_IN_FORCE


async def _examine_all(settings: list[Settings], required: Isolation | None) -> list[Report]:
    return [await examine(one, required) for one in settings]


def _tell_error(mode: str | None, error: ClocheError, *, as_json: bool) -> None:
    if as_json:
        found: dict[str, Any] = {
            "mode": mode,
            "ok": False,
            "checks": [],
            "guarantees": [],
            "error": ErrorInfo.of(error).model_dump(),
        }
        render.print_json(found)
    else:
        render.say_error(error)


def _tell(report: Report) -> bool:
    """Whether it went out."""
    if sys.stdout is not None and sys.stdout.isatty():
        _draw(report)
        return True
    text = "".join(f"{line}\n" for line in plain(report))
    return render.print_out(text.encode("utf-8", "backslashreplace"))


def plain(report: Report) -> Iterator[str]:
    """Lines for files and pipes."""
    yield f"mode {report.mode}{_engine(report)}"
    for check in report.checks:
        yield _line(_MARKS[_STATES[check.verdict]], check.name, check)
    for guarantee in report.posture.guarantees if report.posture is not None else ():
        yield _line(_MARKS[guarantee.state], _name(guarantee), guarantee)
    yield conclusion(report)
    if report.error is not None:
        yield f"what to do: {report.error.hint}"


def conclusion(report: Report) -> str:
    """One sentence for all of it."""
    if report.error is not None:
        return f"no box could be looked at: {report.error.message} [{report.error.code}]"
    missing = () if report.posture is None else report.posture.missing
    lacks = [check.name for check in report.wrong] + [guarantee.name for guarantee in missing]
    level = f"isolation {report.level}, required is {report.required}"
    if report.ok:
        return f"{level}: everything that a run counts on is in force"
    if lacks:
        return f"{level}; not in force: {', '.join(lacks)}"
    if report.posture is not None and not report.posture.proved:
        return f"{level}; nothing was proved"
    return f"{level}: that is not enough"


def _line(mark: str, name: str, thing: Check | Guarantee) -> str:
    advice = f". {thing.advice}" if thing.advice and mark != "+" else ""
    return f"  {mark} {name}: {_printable(thing.evidence.rstrip('.'))}{_printable(advice)}"


def _name(guarantee: Guarantee) -> str:
    means = MEANS.get(guarantee.name)
    return f"{guarantee.name} ({means})" if means else guarantee.name


def _engine(report: Report) -> str:
    engine = "" if report.posture is None else report.posture.engine
    return f" ({_printable(engine)})" if engine else ""


def _printable(text: str) -> str:
    """Without what could steer a terminal: much of it comes out of a box, or from an engine."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _draw(report: Report) -> None:
    """For a person at a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    title = Text("cloche doctor", style="bold")
    title.append(f"  {report.mode}{_engine(report)}", style="dim")
    console.print()
    console.print(title)
    _draw_part(console, "The way to a box", [(_STATES[c.verdict], c.name, c.name, c) for c in report.checks])
    if report.posture is not None:
        rows = [(g.state, g.name, MEANS.get(g.name, ""), g) for g in report.posture.guarantees]
        _draw_part(
            console, "Inside of a real box" if report.posture.proved else "What the engine says of its boxes", rows
        )
    console.print()
    style = "bold green" if report.ok else "bold red"
    console.print(Text(f"  {_printable(conclusion(report))}", style=style))
    if report.error is not None:
        console.print(Text(f"  → {_printable(report.error.hint)}"))
    console.print()


def _draw_part(console: Console, title: str, rows: Sequence[tuple[State, str, str, Check | Guarantee]]) -> None:
    from rich.text import Text

    if not rows:
        return
    table = _table()
    for state, name, means, thing in rows:
        mark, style = _OPTIONAL if state is State.NOT_IN_FORCE and not thing.needed else _STYLES[state]
        about = Text()
        if means and means != name:
            about.append(f"{means}\n")
        about.append(_printable(thing.evidence), style="dim")
        if thing.advice and state is not State.IN_FORCE:
            about.append(f"\n→ {_printable(thing.advice)}", style=style)
        table.add_row(Text(mark, style=style), Text(name, style="bold" if state is State.IN_FORCE else style), about)
    console.print()
    console.print(Text(f"  {title}", style="bold cyan"))
    console.print(table)


def _table() -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=True, padding=(0, 1))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    return table
