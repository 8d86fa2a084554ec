"""The commands and their options."""

from __future__ import annotations

from typing import Any

import click

from cloche.cli.run import Options, execute
from cloche.isolation import Isolation
from cloche.settings import Mode


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:  # noqa: FBT001 (click's signature)
    if wanted and not context.resilient_parsing:
        import cloche as package

        click.echo(f"cloche {package.__version__}")
        context.exit()


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, sign, text = value.partition("=")
        if not sign or not name:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE")
        pairs[name] = text
    return pairs


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print the version."
)
def cloche() -> None:
    """Run untrusted scripts in isolation.

    Settings come from the environment: CLOCHE_MODE, CLOCHE_TIMEOUT and others; see docs/settings.md.
    """


@cloche.command(
    "run",
    epilog="Exit status: the script's own; 128+N if signal N ended it; 124 timed out; 137 out of memory; 130 cancelled; "
    "125 cloche could not run it; 2 wrong usage.",
)
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARG...]")
@click.option("--mode", metavar="MODE", help=f"{' or '.join(Mode)}.  [CLOCHE_MODE]")
@click.option("--workspace", metavar="DIR", help="Deliver this folder; SCRIPT is then a path inside it.")
@click.option("--interpreter", metavar="NAME", help="Program that runs the script. Else its suffix chooses.")
@click.option("--timeout", metavar="S", help="Seconds the script may run; also 90s, 2m.  [CLOCHE_TIMEOUT]")
@click.option("--memory", metavar="SIZE", help="Memory, such as 256Mi.  [CLOCHE_MEMORY]")
@click.option("--cpus", metavar="N", help="CPUs, such as 0.5.  [CLOCHE_CPUS]")
@click.option("--pids", metavar="N", help="Processes and threads.  [CLOCHE_PIDS]")
@click.option("--env", metavar="K=V", multiple=True, callback=_pairs, help="A variable for the script. Repeatable.")
@click.option("--stdin", metavar="FILE|-", help="Give this file, or cloche's own stdin, to the script.")
@click.option("--network", metavar="none|open", help="What the script may reach.  [none]")
@click.option("--output", metavar="DIR", help="Write what the script leaves in /output into this folder.")
@click.option("--image", metavar="IMAGE", help="Image, on engines that have images.  [CLOCHE_IMAGE]")
@click.option(
    "--min-isolation", metavar="LEVEL", help="none, process, namespace, container or kernel.  [CLOCHE_MIN_ISOLATION]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the script's output.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing beside errors.")
@click.option("-v", "--verbose", is_flag=True, help="Say what isolation is in force, and how it is known.")
def run(**options: Any) -> int:
    """Run SCRIPT in isolation.

    Its output streams through, its exit status is this command's. Arguments for the script stand after "--".
    """
    return execute(Options(**options))


@cloche.command(
    "sweep",
    epilog="Exit status: 0 nothing is left; 1 something could not be removed; 125 the engine cannot be used; 2 wrong usage.",
)
@click.option("--mode", metavar="MODE", help=f"{' or '.join(Mode)}.  [CLOCHE_MODE]")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def sweep(*, mode: str | None, dry_run: bool, as_json: bool) -> int:
    """Remove what dead processes left on an engine.

    Nothing that may be of a living run is touched: only what has expired, or whose owner is known to be dead.
    """
    from cloche.cli.sweep import execute

    return execute(mode, dry_run=dry_run, as_json=as_json)


@cloche.command("serve")
@click.option("--address", metavar="HOST:PORT", help="Where to listen.  [CLOCHE_SERVE_ADDRESS, 127.0.0.1:8080]")
@click.option("--mode", metavar="MODE", help=f"{' or '.join(Mode)}.  [CLOCHE_MODE]")
def serve(**options: str | None) -> int:
    """Run scripts for others, over HTTP.

    Who may ask is set with CLOCHE_SERVE_TOKENS or CLOCHE_SERVE_TOKENS_FILE. GET /docs describes the interface.
    """
    from cloche.cli.serve import execute

    return execute(options["address"], options["mode"])


@cloche.command(
    "doctor",
    epilog="Exit status: 0 everything that a run counts on is in force, and the level is the required one; 1 it is not; "
    "125 nothing could be looked at; 2 wrong usage.",
)
@click.option("--mode", metavar="MODE", help=f"{' or '.join(Mode)}.  [CLOCHE_MODE]")
@click.option("--all", "every", is_flag=True, help="Look at every mode that can be used here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (with --all a list of them) instead.")
@click.option(
    "--require",
    metavar="LEVEL",
    type=click.Choice([str(level) for level in Isolation]),
    help="none, process, namespace, container or kernel.  [CLOCHE_MIN_ISOLATION]",
)
def doctor(*, mode: str | None, every: bool, as_json: bool, require: str | None) -> int:
    """Prove the isolation of the boxes.

    Looks at each step of the way to a box, then runs harmless probes inside of real ones: for each guarantee, whether it is in
    force, how that is known, and what to do. It takes some seconds.
    """
    from cloche.cli.doctor import execute

    if every and mode is not None:
        raise click.UsageError("--all and --mode exclude each other")
    return execute(mode, every=every, as_json=as_json, require=require)
