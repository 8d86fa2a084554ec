"""``python -m tests.engines.service``: the service's image for the tests, made and given to engines that are up."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.engines.docker import host, place
from tests.engines.docker.api import Engine
from tests.engines.kubernetes.cluster import Cluster
from tests.engines.service import images

DOCKER = "CLOCHE_TEST_DOCKER_HOST"


def main() -> int:
    """Do what is asked, and print the image's name. 0: done; 1: this machine cannot, and the last line says why."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines.service", description="The service's image.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make its layers; quick when nothing changed")
    commands.add_parser("load-docker", help=f"give it to the daemon of {DOCKER}, else to the one that is up")
    commands.add_parser("load-cluster", help="give it to the cluster that is up")
    command: str = parser.parse_args().command
    image = images.service()
    try:
        match command:
            case "build":
                for path in image.build():
                    host.say(path)
            case "load-docker":
                usual = place.folder() / "current" / "docker.sock"
                image.load(Engine(Path(os.environ.get(DOCKER, str(usual)).removeprefix("unix://"))))
            case _:
                image.add_to(Cluster(place.folder() / "kubernetes", owned=False))
    except (host.MissingError, RuntimeError, OSError) as error:
        host.say(error)
        return 1
    print(image.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
