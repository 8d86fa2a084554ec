"""``python -m tests.engines.kubernetes``: see the README beside this file."""

from __future__ import annotations

import argparse
import shlex
import sys

from tests.engines.docker import host, place
from tests.engines.kubernetes import binaries, cluster, images
from tests.engines.kubernetes.cluster import Cluster

KUBECONFIG = "CLOCHE_TEST_KUBECONFIG"
FOLDER = "CLOCHE_TEST_KUBERNETES_FOLDER"
KUBECTL = "CLOCHE_TEST_KUBECTL"
"""A kubectl for those who have none on the PATH."""
NEEDED = ("gcc", "pkg-config", "debootstrap", *cluster.PROGRAMS, "tar", "apt-get", *host.FILES)


def main() -> int:
    """Do what is asked. 0: done; 1: this machine cannot, and the last line says why."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines.kubernetes", description="A real cluster for tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make all programs and images; quick when they are there")
    commands.add_parser("up", help="start the cluster, or what of it does not run")
    commands.add_parser("env", help="print export lines when it is up")
    commands.add_parser("down", help="end it, and remove all trace")
    command: str = parser.parse_args().command
    try:
        match command:
            case "build":
                _build()
            case "up":
                with place.alone():
                    _cluster().launch()
                host.say(f"kubernetes: https://{':'.join(map(str, _cluster().server))}")
            case "env":
                _env()
            case _:
                _down()
    except (host.MissingError, RuntimeError) as error:
        host.say(error)
        return 1
    return 0


def _build() -> None:
    host.need(*NEEDED)
    for folder in binaries.obtain():
        print(folder)
    for image in images.ALL:
        print(image.obtain())


def _env() -> None:
    found = _cluster()
    if found.up():
        print(f"export {KUBECONFIG}={shlex.quote(str(found.kubeconfig))}")
        print(f"export {FOLDER}={shlex.quote(str(found.folder))}")
        print(f"export {KUBECTL}={shlex.quote(str(binaries.KUBERNETES.obtain() / 'kubectl'))}")


def _down() -> None:
    with place.alone():
        _cluster().close()
    place.leave()


def _cluster() -> Cluster:
    return Cluster(place.folder() / "kubernetes", owned=False)


if __name__ == "__main__":
    sys.exit(main())
