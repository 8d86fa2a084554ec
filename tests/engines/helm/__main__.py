"""``python -m tests.engines.helm``: see the README beside this file."""

from __future__ import annotations

import argparse
import shlex
import sys

from tests.engines.docker import host
from tests.engines.helm import binaries

HELM = "CLOCHE_TEST_HELM"


def main() -> int:
    """Do what is asked. 0: done; 1: this machine cannot, and the last line says why."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines.helm", description="A real Helm for tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make it; quick when it is there")
    commands.add_parser("env", help="print an export line; builds it first")
    command: str = parser.parse_args().command
    try:
        program = binaries.obtain()
    except (host.MissingError, RuntimeError) as error:
        host.say(error)
        return 1
    print(program if command == "build" else f"export {HELM}={shlex.quote(str(program))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
