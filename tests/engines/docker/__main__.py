"""``python -m tests.engines.docker``: see the README beside this file."""

from __future__ import annotations

import argparse
import shlex
import sys

from tests.engines.docker import api, binaries, host, images, place
from tests.engines.docker.daemon import Daemon
from tests.engines.docker.podman import Podman
from tests.engines.docker.private import Private

VARIABLES = {
    "current": "CLOCHE_TEST_DOCKER_HOST",
    "old": "CLOCHE_TEST_DOCKER_OLD_HOST",
    "podman": "CLOCHE_TEST_PODMAN_HOST",
}
"""The flavours, and where a test finds each."""
RUNTIME = "CLOCHE_TEST_DOCKER_RUNTIME"
USUAL = ("current", "old")
"""What comes up when none is named; the old one only where it can be had."""


def main() -> int:
    """Do what is asked. 0: done; 1: this machine cannot, and the last line says why."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines.docker", description="Real engines for the tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make all programs and images; quick when they are there")
    commands.add_parser("up", help="start engines, and give them the images").add_argument("flavours", nargs="*")
    commands.add_parser("env", help="print export lines for those that are up")
    commands.add_parser("down", help="end engines, and remove all trace").add_argument("flavours", nargs="*")
    options = parser.parse_args()
    command: str = options.command
    flavours: list[str] = getattr(options, "flavours", [])
    if unknown := set(flavours) - set(VARIABLES):
        parser.error(f"no such flavour: {', '.join(sorted(unknown))}; there are {', '.join(VARIABLES)}")
    try:
        match command:
            case "build":
                _build()
            case "up":
                _up(flavours)
            case "env":
                _env()
            case _:
                _down(flavours or list(VARIABLES))
    except (host.MissingError, RuntimeError) as error:
        host.say(error)
        return 1
    return 0


def _build() -> None:
    host.need(*host.PROGRAMS, *host.FILES)
    for module in binaries.MODULES:
        print(module.obtain())
    if host.is_debian():
        print(binaries.init())
    for packages in (binaries.OLD, binaries.PODMAN):
        if host.is_debian(binaries.SUITE):
            print(*packages.obtain()[0], sep="\n")
        else:
            host.say(f"left out: the engine {packages.name}, which is made from Debian {binaries.SUITE}'s packages")
    for image in images.ALL:
        print(image.obtain())


def _up(flavours: list[str]) -> None:
    host.need(*host.PROGRAMS, *host.FILES)
    with place.alone():
        for flavour in flavours or USUAL:
            if flavour == "old" and not flavours and not host.is_debian(binaries.SUITE):
                host.say(f"left out: the old engine, which is made from Debian {binaries.SUITE}'s packages")
                continue
            engine = _engine(flavour)
            if not engine.running():
                engine.start()
            engine.add(*images.ALL)
            host.say(f"{flavour}: {engine.host}")


def _env() -> None:
    for flavour, variable in VARIABLES.items():
        engine = _engine(flavour)
        if engine.running():
            print(f"export {variable}={shlex.quote(engine.host)}")
            if flavour == "current" and _gvisor_works(engine.engine):
                print(f"export {RUNTIME}=runsc")


def _gvisor_works(engine: api.Engine) -> bool:
    try:
        return engine.run(images.TINY.name, "/usr/bin/tiny", "/etc/hostname", Runtime="runsc").exit_code == 0
    except api.EngineError as error:
        host.say(f"gVisor does not work here: {error}")
        return False


def _down(flavours: list[str]) -> None:
    with place.alone():
        for flavour in flavours:
            _engine(flavour).close()
    place.leave()


def _engine(flavour: str) -> Private:
    folder = place.folder() / flavour
    if flavour == "podman":
        return Podman(folder, owned=False)
    return Daemon("old" if flavour == "old" else "current", folder, owned=False)


if __name__ == "__main__":
    sys.exit(main())
