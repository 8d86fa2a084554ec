"""``cloche run``: the options become a spec, the events go to the terminal, the end becomes an exit status."""

from __future__ import annotations

import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import anyio

from cloche.cli import exits, progress, render
from cloche.cli.live import Live
from cloche.cli.save import check_folder, save
from cloche.errors import ClocheError, InvalidSpec, WorkspaceTooLarge
from cloche.result import ErrorInfo, Result
from cloche.runtime import new_run_id
from cloche.settings import Settings, parse_duration, resolve
from cloche.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line, as it was typed. What is None was not given."""

    script: str
    args: tuple[str, ...]
    mode: str | None
    workspace: str | None
    interpreter: str | None
    timeout: str | None
    memory: str | None
    cpus: str | None
    pids: str | None
    env: dict[str, str]
    stdin: str | None
    network: str | None
    output: str | None
    image: str | None
    min_isolation: str | None
    as_json: bool
    quiet: bool
    verbose: bool


def execute(options: Options) -> int:
    """Run the script and give the exit status. Errors are told, on stderr or as JSON; nothing is raised for them."""
    run_id = new_run_id()
    mode = options.mode
    try:
        # The image is the whole sandbox's, so that no other one is prepared.
        given = {"mode": mode, "image": options.image}
        settings = Settings.from_env(os.environ, **{name: value for name, value in given.items() if value is not None})
        mode = str(settings.mode)
        _configure_log(settings)
        spec = _spec(options, settings)
        if options.output is not None:
            check_folder(Path(options.output))
    except ClocheError as error:
        return _refuse(options, Result.failed(run_id, error, mode), error)
    live = Live(settings, spec, run_id, streamed=not options.as_json, verbose=options.verbose)
    with progress.shown(wanted=not options.quiet):
        result = anyio.run(live.run)
    if live.error is not None:
        return _refuse(options, result, live.error)
    try:
        if options.output is not None:
            save(Path(options.output), result.artifacts)
    except ClocheError as error:
        if options.as_json:
            render.print_json(_unsaved(result, error).to_dict())
        else:
            _tell(result, settings, spec, options, saved=False)
        render.say_error(error)
        return exits.status_of_error(error)
    if options.as_json:
        return exits.status_of_result(result) if render.print_json(result.to_dict()) else exits.NOT_RUN
    for fd, failure in live.failures.items():
        render.say_unwritable(fd, failure)
    if live.failures:
        return exits.NOT_RUN
    if not live.broken:
        _tell(result, settings, spec, options)
    return exits.status_of_result(result)


def _spec(options: Options, settings: Settings) -> Spec:
    """The spec that the options describe.

    Raises:
        InvalidSpec: they describe none.
    """
    try:
        timeout = parse_duration(options.timeout)
    except ValueError as exc:
        raise InvalidSpec(f"timeout: {exc}.") from None
    given = {
        "workspace": options.workspace,
        "interpreter": options.interpreter,
        "memory": options.memory,
        "cpus": options.cpus,
        "pids": options.pids,
        "network": options.network,
        "min_isolation": options.min_isolation,
        "timeout": timeout,
    }
    # Inside a workspace a path has one form; what shells complete begins with "./".
    script = options.script if options.workspace is None else re.sub(r"\A(?:\./+)+", "", options.script)
    return Spec(
        script=script,
        args=options.args,
        env=options.env,
        stdin=None if options.stdin is None else _read_stdin(options.stdin, settings),
        **{name: value for name, value in given.items() if value is not None},
    )


def _read_stdin(source: str, settings: Settings) -> bytes:
    bound = settings.workspace_bytes(settings.mode)
    try:
        if source == "-":
            data = sys.stdin.buffer.read(bound + 1)
        else:
            with open(source, "rb") as file:
                data = file.read(bound + 1)
    except OSError as exc:
        raise InvalidSpec(
            f"stdin cannot be read from {source!r}: {exc.strerror}.", hint="Give --stdin a file, or - for your own."
        ) from None
    if len(data) > bound:
        raise WorkspaceTooLarge(f"stdin is larger than {bound} bytes.")
    return data


def _configure_log(settings: Settings) -> None:
    handler = _Handler()
    log = logging.getLogger("cloche")
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(settings.log.upper())


class _Handler(logging.Handler):
    """Log records as lines of cloche's own."""

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            render.say(line)


def _refuse(options: Options, result: Result, error: ClocheError) -> int:
    if options.as_json:
        render.print_json(result.to_dict())
    else:
        render.say_error(error)
    return exits.status_of_error(error)


def _unsaved(result: Result, error: ClocheError) -> Result:
    """The result of a run whose artifacts could not be saved: failed, with all that the run gave."""
    # In a valid result an exit code and a signal go with other outcomes.
    return result.model_copy(
        update={"outcome": "failed", "exit_code": None, "signal": None, "error": ErrorInfo.of(error)}
    )


def _tell(result: Result, settings: Settings, spec: Spec, options: Options, *, saved: bool = True) -> None:
    if options.quiet:
        return
    for note in render.notes(result, resolve(spec, settings)):
        render.say(note)
    if saved and sys.stderr is not None and sys.stderr.isatty():
        render.summary(result, options.output)
