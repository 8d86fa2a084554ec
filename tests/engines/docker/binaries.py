"""The engines' programs: current ones from their Go modules, the old ones from Debian's packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.engines.docker import cache, host

FOLDER = Path(__file__).parent / "modules"
GO = (1, 26, 6)
"""The oldest Go that the modules name."""


@dataclass(frozen=True)
class Module:
    """Programs of one Go module: every ``tool`` of ``modules/NAME/go.mod``."""

    name: str
    ldflags: str = ""
    """Beside ``-s -w``: the version, which releases get from their own build scripts."""
    tags: str = ""
    cgo: bool = False
    modules: Path = FOLDER
    """The folder of the folder that has its go.mod and go.sum."""
    program: str = ""
    """What its only program is called, where Go would name it after a folder."""

    @property
    def folder(self) -> Path:
        """Where its go.mod and go.sum are."""
        return self.modules / self.name

    @property
    def command(self) -> tuple[str, ...]:
        """What builds it, but for the place."""
        return ("go", "build", "-trimpath", "-buildvcs=false", f"-tags={self.tags}", f"-ldflags=-s -w {self.ldflags}")

    def obtain(self) -> Path:
        """The folder of its programs."""
        recipe = [(self.folder / name).read_text() for name in ("go.mod", "go.sum")]
        recipe += [*self.command, f"cgo={self.cgo}", os.uname().machine, *filter(None, [self.program])]
        return cache.obtain(self.name, "\n".join(recipe), self._build)

    def _build(self, folder: Path) -> None:
        if self.cgo:
            host.need("gcc", "pkg-config", "/usr/include/seccomp.h", "/usr/include/stdio.h")
        host.say(f"building {self.name}; minutes the first time, seconds from Go's own cache")
        run_go(*self.command, "-o", f"{folder}/{self.program}", "tool", cwd=self.folder, cgo=self.cgo)


RUNC = Module("runc", ldflags="-X main.version=1.5.2", tags="seccomp", cgo=True)
CONTAINERD = Module("containerd", ldflags="-X github.com/containerd/containerd/v2/version.Version=2.4.2")
MOBY = Module("moby", ldflags="-X github.com/moby/moby/v2/dockerversion.Version=29.0.0")
GVISOR = Module("gvisor")
REGISTRY = Module("registry")
MODULES = (RUNC, CONTAINERD, MOBY, GVISOR, REGISTRY)


def run_go(*command: str, cwd: Path, cgo: bool = False) -> None:
    """Run a command of Go's, in a folder with a go.mod, which alone decides on modules and versions: not what this user's Go is
    told otherwise.

    Raises:
        MissingError: there is no Go, or it is too old.
        subprocess.CalledProcessError: it failed.
    """
    _need_go()
    environ = {**os.environ, "CGO_ENABLED": str(int(cgo)), "GOTOOLCHAIN": "local", "GOWORK": "off", "GOFLAGS": ""}
    host.run(*command, env=environ, cwd=cwd)


def _need_go() -> None:
    wanted = ".".join(map(str, GO))
    if shutil.which("go") is None:
        raise host.MissingError(
            f"missing: go; the engines are built with Go {wanted} or newer, which must be on the PATH"
        )
    told = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout.strip()
    have = tuple(int(number) for number in re.findall(r"\d+", told)[:3])
    if have < GO:
        raise host.MissingError(f"{told} is too old: the engines are built with Go {wanted} or newer")


def current() -> list[Path]:
    """Folders with the programs of a current Docker, for a PATH."""
    found = [module.obtain() for module in (RUNC, CONTAINERD, MOBY, GVISOR)]
    return [*found, init()] if host.is_debian() else found


def init() -> Path:
    """Debian's tini under the name that Docker looks for; it is what containers with ``Init`` start with."""
    return cache.obtain("init", f"tini\n{os.uname().machine}", _unpack_init)


def _unpack_init(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        host.unpack(["tini"], Path(temporary), Path(temporary))
        shutil.copy(Path(temporary, "usr/bin/tini-static"), folder / "docker-init")


@dataclass(frozen=True)
class Packages:
    """An engine from packages of one Debian, laid out in the cache and not installed: no service of the system's appears.

    Their libraries are those that the programs are linked with, but for libc.
    """

    name: str
    programs: tuple[str, ...]
    libraries: tuple[str, ...]

    def obtain(self) -> tuple[list[Path], list[Path]]:
        """Folders with the programs, for a PATH, and with the libraries.

        Raises:
            MissingError: this is not the Debian that has them.
        """
        if not host.is_debian(SUITE):
            raise host.MissingError(
                f"the engine {self.name} is made from Debian {SUITE}'s packages; this is another system"
            )
        recipe = "\n".join([SUITE, *self.programs, *self.libraries, *NEEDLESS, os.uname().machine])
        folder = cache.obtain(self.name, recipe, self._unpack)
        return [folder / "usr/sbin", folder / "usr/bin"], sorted({file.parent for file in folder.glob("**/*.so.*")})

    def _unpack(self, folder: Path) -> None:
        host.say(f"unpacking Debian's packages for {self.name}")
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            host.unpack([*self.programs, *self.libraries], Path(temporary), folder)
        for needless in NEEDLESS:
            shutil.rmtree(folder / needless, ignore_errors=True)


SUITE = "bookworm"
"""The Debian whose docker.io is 20.10, and whose libraries these are."""
NEEDLESS = ("etc", "lib/systemd", "usr/lib/systemd", "lib/udev", "usr/lib/udev", "usr/share/doc", "usr/share/man")
COMMON = (
    *("libcap2", "libdevmapper1.02.1", "libgcrypt20", "libgpg-error0", "liblz4-1", "liblzma5", "libpcre2-8-0"),
    *("libseccomp2", "libselinux1", "libsystemd0", "libudev1", "libzstd1"),
)
OLD = Packages("old", ("docker.io", "containerd", "runc", "tini"), COMMON)
PODMAN = Packages(
    "podman",
    ("podman", "conmon", "crun", "netavark", "aardvark-dns", "golang-github-containers-common"),
    (*COMMON, "libassuan0", "libglib2.0-0", "libgpgme11", "libsubid4", "libyajl2"),
)
