"""What cloche itself says, on stderr: errors, notes, and for people a line on how it went."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from cloche.cli.writer import STDERR, STDOUT, write_all
from cloche.errors import ClocheError
from cloche.events import Outcome
from cloche.isolation import Posture, State
from cloche.result import Result
from cloche.spec import Limits

_MARKS = {State.IN_FORCE: "+", State.NOT_IN_FORCE: "-", State.UNKNOWN: "?"}


def say(text: str) -> None:
    """One line of cloche's own on stderr, if there is one. What could steer a terminal is escaped."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    if sys.stderr is None:
        return  # print would take stdout instead
    try:
        print(f"cloche: {plain}", file=sys.stderr, flush=True)  # noqa: T201 (this is the command line)
    except (OSError, ValueError):
        return  # nobody listens


def say_unwritable(fd: int, failure: OSError) -> None:
    """Why something did not go out."""
    name = {STDOUT: "stdout", STDERR: "stderr"}[fd]
    say(f"{name} cannot be written: {failure.strerror}")


def print_out(data: bytes) -> bool:
    """Write to stdout. Whether it went out; that nobody reads it is no failure, and any other one is told."""
    try:
        write_all(STDOUT, data)
    except BrokenPipeError:
        return True
    except OSError as exc:
        say_unwritable(STDOUT, exc)
        return False
    return True


def print_json(value: object) -> bool:
    """The same with a value as one line of JSON."""
    return print_out(json.dumps(value).encode() + b"\n")


def say_error(error: ClocheError) -> None:
    """An error: the facts with the stable code, then what to do."""
    say(f"{error.message} [{error.code}]")
    say(f"hint: {error.hint}")


def say_posture(posture: Posture, choice: str = "") -> None:
    """What isolation is in force, promise by promise; and first how it came to this mode, where cloche chose it."""
    if choice:
        say(choice)
    say(f"mode {posture.mode} ({posture.engine or 'no engine'}), isolation {posture.isolation}")
    for guarantee in posture.guarantees:
        advice = f". {guarantee.advice}" if guarantee.advice else ""
        say(f"  {_MARKS[guarantee.state]} {guarantee.name}: {guarantee.evidence}{advice}")


def notes(result: Result, limits: Limits) -> Iterator[str]:
    """What a user cannot see from output and exit status alone."""
    match result.outcome:
        case Outcome.TIMED_OUT:
            yield f"timed out: the script was ended after {limits.timeout_s:g} s (--timeout)"
        case Outcome.OUT_OF_MEMORY:
            yield f"out of memory: the script needed more than {size(limits.memory_bytes)} (--memory)"
        case Outcome.CANCELLED:
            yield "cancelled"
        case Outcome.SIGNALED:
            yield f"the script was ended by {result.signal}"
        case _:
            pass
    if result.outcome is not Outcome.OUT_OF_MEMORY and result.usage.oom_kills:
        yield f"{result.usage.oom_kills} of the script's processes were killed for want of memory"
    for name, total, truncated in (
        ("stdout", result.stdout_bytes, result.stdout_truncated),
        ("stderr", result.stderr_bytes, result.stderr_truncated),
    ):
        if truncated:
            yield f"{name} was cut in its middle: the script wrote {size(total)} (CLOCHE_MAX_OUTPUT_BYTES)"
    for artifact in result.artifacts:
        if artifact.truncated:
            yield f"artifact {artifact.path} was cut: it has {size(artifact.size)} (CLOCHE_MAX_ARTIFACT_BYTES)"
    if result.artifacts_skipped:
        yield f"{result.artifacts_skipped} entries of /output were not collected: links, devices, or over a bound"


def summary(result: Result, saved_to: str | None) -> None:
    """For a person at a terminal: how it went, how long it took, what it left, in what isolation."""
    from rich.console import Console
    from rich.text import Text

    how, style = _headline(result)
    total = result.timings_ms["total"] or 0.0
    parts = [f"{total / 1000:.2f} s" if total >= 100 else f"{total:.0f} ms"]
    if result.artifacts:
        where = f" in {saved_to}" if saved_to else " (not kept: --output DIR)"
        parts.append(f"{_artifacts(result)}{where}")
    instead = f" instead of {result.fallback_from}" if result.fallback_from else ""
    parts.append(f"{result.mode}{instead}, isolation {result.isolation}")
    line = Text("cloche: ", style="dim")
    line.append(how, style=style)
    line.append(" · " + " · ".join(parts), style="dim")
    Console(stderr=True, highlight=False, soft_wrap=True).print(line)


def size(count: int) -> str:
    """Bytes for people: ``1.2 MiB``."""
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return (
                f"{amount:.0f} {unit}"
                if unit == "bytes" or amount >= 10 or amount == int(amount)
                else f"{amount:.1f} {unit}"
            )
        amount /= 1024
    return f"{amount:.1f} GiB"


def _headline(result: Result) -> tuple[str, str]:
    if result.ok:
        return "ok", "green"
    if result.outcome == Outcome.EXITED:
        return f"exited with {result.exit_code}", "yellow"
    if result.outcome == Outcome.SIGNALED:
        return f"ended by {result.signal}", "red"
    return str(result.outcome).replace("_", " "), "red"


def _artifacts(result: Result) -> str:
    names = [f"{a.path!a}".strip("'\"") for a in result.artifacts[:3]]
    more = len(result.artifacts) - len(names)
    count = f"{len(result.artifacts)} artifact{'s' if len(result.artifacts) > 1 else ''}"
    return f"{count}: {', '.join(names)}{f' and {more} more' if more else ''}"
