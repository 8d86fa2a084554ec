"""``python -m tests.engines.compose``: Docker Compose for the tests, and the images that its files need."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from typing import get_args

from tests.engines.compose import binaries, images
from tests.engines.docker import host
from tests.engines.docker.images import SANDBOX
from tests.engines.opensandbox.images import Generation, execd
from tests.engines.service.images import service

COMPOSE = "CLOCHE_TEST_COMPOSE"
"""Where a test finds the program."""


def main() -> int:
    """Do what is asked. 0: done; 1: this machine cannot, and the last line says why."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines.compose", description="Docker Compose for tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make the program and all images; quick when they are there")
    commands.add_parser("env", help="print an export line for the tests; makes the program if it is not there")
    command: str = parser.parse_args().command
    try:
        program = binaries.obtain()
        if command == "build":
            print(program)
            for image in (SANDBOX, *map(execd, get_args(Generation))):
                print(image.obtain())
            for layered in (service(), images.SERVER):
                print(*layered.build(), sep="\n")
        else:
            print(f"export {COMPOSE}={shlex.quote(str(program))}")
    except (host.MissingError, RuntimeError, subprocess.CalledProcessError) as error:
        host.say(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
