"""Layers of images, each kept by itself: what changes every hour lies above what hardly ever does.

The lowest is a Debian with Python. Above lie environments of that Python, filled from here: no program of the image runs.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.engines.docker import host
from tests.engines.docker.images import Image, install_debian

PACKAGES = ("ca-certificates", "python3")
PYTHON = "3.11"
"""Of that suite of Debian."""
GLIBC_MINOR = 36
"""Of that suite of Debian, 2.36: whatever was built for it or an older one works."""
UID = 10001
"""The user that the service's image has a name for."""


@dataclass(frozen=True)
class Layer(Image):
    """Files that lie above those of other layers."""

    ingredients: str
    """All that decides what is in it, beside what is written in this file."""

    @property
    def recipe(self) -> str:
        """The same, with this file."""
        return "\n".join([Path(__file__).read_text(), self.name, self.ingredients, os.uname().machine])


def _make_base(tree: Path) -> None:
    user = ("--uid", str(UID), "--no-create-home", "--home-dir", "/tmp", "--shell", "/usr/sbin/nologin")
    install_debian(tree, PACKAGES, (*user, "cloche"))


BASE = Layer("cloche-test/python-base:1", (), _make_base, "")


def environment(name: str, root: str, *requirements: Path) -> Layer:
    """An environment of Python at ``root`` (a path without its first slash), with all packages that files pin."""

    def make(tree: Path) -> None:
        folder = tree / root
        install(folder, root, *(f"--requirement={file}" for file in requirements))
        for program in ("python", "python3"):
            folder.joinpath("bin", program).symlink_to(f"/usr/bin/python{PYTHON}")
        folder.joinpath("pyvenv.cfg").write_text(
            f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {PYTHON}\n"
        )

    return Layer(name, (), make, "\n".join(file.read_text() for file in requirements))


def install(folder: Path, root: str, *what: str) -> None:
    """Install packages into the folder that will be ``root`` in an image, for its Python, whatever Python this is."""
    packages = folder / "lib" / f"python{PYTHON}" / "site-packages"
    packages.mkdir(parents=True)
    machine = platform.machine()
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC_MINOR, 16, -1)] + [
        f"manylinux2014_{machine}"
    ]
    chosen = [f"--platform={name}" for name in platforms]
    # Where times are not kept, as in the tar of a layer, compiled modules have to be told by the hash of their source.
    host.run(
        *(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--root-user-action=ignore",
        ),
        *("--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", *chosen, "--target", str(packages), *what),
        env={**os.environ, "SOURCE_DATE_EPOCH": "0"},
    )
    # pip puts programs beside the packages, and has them started by its own Python.
    programs = packages / "bin"
    programs.mkdir(exist_ok=True)
    for program in programs.iterdir():
        content = program.read_bytes()
        program.write_bytes(content.replace(f"#!{sys.executable}".encode(), f"#!/{root}/bin/python".encode(), 1))
    programs.rename(folder / "bin")
