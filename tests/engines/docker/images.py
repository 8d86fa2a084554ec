"""The images that the tests run in, as tar files of a root folder; no registry is needed. Made once, kept in the cache.

``cloche-test/sandbox:1`` is a small Debian with sh, bash, Python, node and perl, for uid 1000; ``cloche-test/tiny:1`` has
one static program, ``/usr/bin/tiny``, and neither shell nor Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.engines import debian
from tests.engines.docker import cache, host

SUITE = "bookworm"
PACKAGES = ("bash", "ca-certificates", "nodejs", "perl-base", "python3")
USER = 1000
NEEDLESS = (
    "usr/share/doc",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "var/cache",
    "var/lib/apt/lists",
    "var/log",
)
"""Folders that are emptied: nothing in a run reads them."""
ENVIRONMENT = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """An image and how it is made."""

    name: str
    changes: tuple[str, ...]
    make: Callable[[Path], None]

    @property
    def recipe(self) -> str:
        """All that decides what is in it, but for the state of Debian's archive."""
        here = Path(__file__)
        return "\n".join([here.read_text(), here.with_name("tiny.c").read_text(), self.name, os.uname().machine])

    @property
    def labels(self) -> dict[str, str]:
        """What tells it from one of the same name that an older recipe gave."""
        return {"cloche-test.recipe": cache.key(self.recipe)}

    def obtain(self) -> Path:
        """The tar file of its root folder."""
        short = self.name.rpartition("/")[2].partition(":")[0]
        return cache.obtain(f"image-{short}", self.recipe, self._pack) / "root.tar"

    def _pack(self, folder: Path) -> None:
        host.say(f"making the image {self.name}")
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            tree = Path(temporary, "root")
            tree.mkdir(mode=0o755)
            self.make(tree)
            # The same packages give the same bytes, whoever makes it and when.
            steady = (
                "--sort=name",
                "--mtime=@0",
                "--numeric-owner",
                "--format=posix",
                "--pax-option=delete=atime,delete=ctime",
            )
            host.run("tar", *steady, "--create", "--file", str(folder / "root.tar"), "--directory", str(tree), ".")


def _make_tiny(tree: Path) -> None:
    host.need("gcc", "/usr/include/stdio.h")
    for name in ("usr/bin", "output", "workspace", "tmp", "etc"):
        tree.joinpath(name).mkdir(parents=True, mode=0o755)
    for name in ("output", "tmp"):
        tree.joinpath(name).chmod(0o1777)
    source = Path(__file__).with_name("tiny.c")
    host.run(
        "gcc", "-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-o", str(tree / "usr/bin/tiny"), str(source)
    )


def install_debian(tree: Path, packages: Sequence[str], useradd: Sequence[str]) -> None:
    """A small Debian with some packages and one user, and nothing in it that is this machine's or could change a user.

    Raises:
        RuntimeError: debootstrap failed; the message has its last words.
    """
    host.need_root()
    host.need("debootstrap")
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", SUITE, str(tree), host.archive()]
    done = subprocess.run(
        command,
        env={**os.environ, **debian.proxies()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=host.COMMAND_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"debootstrap failed and said at the end:\n{(done.stdout + done.stderr)[-2000:]}")
    host.run("chroot", str(tree), "useradd", *useradd)
    for name in NEEDLESS:
        shutil.rmtree(tree / name)
        tree.joinpath(name).mkdir()
    tree.joinpath("etc/machine-id").write_text("")
    for name in ("etc/resolv.conf", "etc/hostname"):
        tree.joinpath(name).unlink(missing_ok=True)
    host.run("find", str(tree), "-xdev", "-perm", "/6000", "-type", "f", "-exec", "chmod", "ug-s", "{}", "+")


def _make_sandbox(tree: Path) -> None:
    install_debian(tree, PACKAGES, ("--uid", str(USER), "--create-home", "--shell", "/bin/bash", "runner"))


TINY = Image("cloche-test/tiny:1", (f"USER {USER}:{USER}",), _make_tiny)
SANDBOX = Image("cloche-test/sandbox:1", (ENVIRONMENT, f"USER {USER}:{USER}"), _make_sandbox)
ALL = (TINY, SANDBOX)
