"""The images of an OpenSandbox service: what its sandboxes are made of, and what brings execd into them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.engines.docker import binaries, images
from tests.engines.docker.images import ENVIRONMENT, Image

Generation = Literal["current", "old"]
"""Of execd: as from 1.1.1 on, or up to 1.1.0."""
PREFIXES: Mapping[Generation, str] = {"current": "CLOCHE_TEST_OPENSANDBOX", "old": "CLOCHE_TEST_OPENSANDBOX_OLD"}
"""How the variables begin by which a test finds the service of each."""
HERE = Path(__file__).parent


class Root(Image):
    """The tests' sandbox image, but for its user: the supervisor starts as root in it."""

    def obtain(self) -> Path:
        """The same files."""
        return images.SANDBOX.obtain()


@dataclass(frozen=True)
class Execd(Image):
    """An image of which the server takes two files, ``/execd`` and ``/bootstrap.sh``."""

    @property
    def recipe(self) -> str:
        """All that decides what is in it."""
        sources = [*sorted(HERE.joinpath("execd").iterdir()), HERE / "bootstrap.sh", Path(__file__)]
        return "\n".join([*(source.read_text() for source in sources), self.name, os.uname().machine])


def execd(generation: Generation) -> Execd:
    """The image with an execd of that generation."""

    def make(tree: Path) -> None:
        flags = ("-trimpath", "-buildvcs=false", "-ldflags=-s -w")
        binaries.run_go("go", "build", *flags, "-o", str(tree / "execd"), ".", cwd=HERE / "execd")
        option = "--current" if generation == "current" else ""
        bootstrap = tree / "bootstrap.sh"
        bootstrap.write_text(HERE.joinpath("bootstrap.sh").read_text().replace("GENERATION", option))
        bootstrap.chmod(0o755)

    # The server starts it once, with a command that the program ignores.
    return Execd(f"cloche-test/execd-{generation}:1", ('ENTRYPOINT ["/execd"]',), make)


SANDBOX = Root("cloche-test/sandbox-root:1", (ENVIRONMENT,), images.SANDBOX.make)
