"""``python -m tests.engines.opensandbox``: see the README beside this file."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import get_args

from tests.engines.docker import binaries, host, place
from tests.engines.opensandbox import images, service
from tests.engines.opensandbox.images import PREFIXES, Generation
from tests.engines.opensandbox.service import Service


def main() -> int:
    """Do what is asked. 0: done; 1: this machine cannot, and the last line says why."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines.opensandbox", description="A real OpenSandbox.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make all programs and images; quick when they are there")
    for name, text in (
        ("up", "start services"),
        ("env", "print export lines for those that are up"),
        ("down", "end them"),
    ):
        commands.add_parser(name, help=text).add_argument("generations", nargs="*")
    options = parser.parse_args()
    command: str = options.command
    generations: list[Generation] = getattr(options, "generations", [])
    if unknown := set(generations) - set(PREFIXES):
        parser.error(f"no such generation: {', '.join(sorted(unknown))}; there are {', '.join(PREFIXES)}")
    try:
        match command:
            case "build":
                _build()
            case "up":
                with place.alone():
                    for generation in generations or list(PREFIXES):
                        _service(generation).start()
                        host.say(f"{generation}: {_service(generation).url}")
            case "env":
                _env()
            case _:
                with place.alone():
                    for generation in generations or PREFIXES:
                        _service(generation).close()
                place.leave()
    except (host.MissingError, RuntimeError) as error:
        host.say(error)
        return 1
    return 0


def _build() -> None:
    for folder in binaries.current():
        print(folder)
    print(service.python())
    for image in (images.SANDBOX, *map(images.execd, get_args(Generation))):
        print(image.obtain())


def _env() -> None:
    for generation, prefix in PREFIXES.items():
        found = _service(generation)
        if found.running() and found.server_answers():
            print(f"export {prefix}_API_URL={shlex.quote(found.url)}")
            print(f"export {prefix}_API_KEY={shlex.quote(found.key)}")
            print(f"export {prefix}_DOCKER_HOST={shlex.quote(found.host)}")
            print(f"export {prefix}_FOLDER={shlex.quote(str(found.folder))}")


def _service(generation: Generation) -> Service:
    return Service(generation, place.folder() / f"opensandbox-{generation}", owned=False)


if __name__ == "__main__":
    sys.exit(main())
