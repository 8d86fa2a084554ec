"""``docker-compose`` from its Go module. It is whole by itself: neither the ``docker`` command nor a plugin folder is needed."""

from __future__ import annotations

from pathlib import Path

from tests.engines.docker.binaries import Module

FOLDER = Path(__file__).parent / "modules"
VERSION = "5.6.0"

COMPOSE = Module(
    "compose",
    # Unstamped it calls itself "dev", and a report of a bug would name no version.
    ldflags=f"-X github.com/docker/compose/v5/internal.Version=v{VERSION}",
    modules=FOLDER,
    program="docker-compose",
)


def obtain() -> Path:
    """The program."""
    return COMPOSE.obtain() / COMPOSE.program
