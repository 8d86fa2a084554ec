"""What this machine is and has: programs and the packages that bring them, and Debian's archive."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.engines import debian

PROGRAMS = {
    "gcc": "gcc",
    "pkg-config": "pkg-config",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "iptables": "iptables",
    "ebtables": "iptables",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setsid": "util-linux",
    "tar": "tar",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "openssl": "openssl",
}
"""A program, and the Debian package that brings it."""
FILES = {"/usr/include/seccomp.h": "libseccomp-dev", "/usr/include/stdio.h": "libc6-dev"}
"""A file, and the Debian package that brings it."""
COMMAND_TIMEOUT_S = 1200.0


class MissingError(RuntimeError):
    """This machine lacks something; the message tells what to install."""


def need(*things: str) -> None:
    """See that programs and files of the tables above are there.

    Raises:
        MissingError: some are not.
    """
    known = PROGRAMS | FILES
    absent = [
        thing for thing in things if not (os.path.exists(thing) if thing.startswith("/") else shutil.which(thing))
    ]
    if absent:
        packages = " ".join(dict.fromkeys(known[thing] for thing in absent))
        raise MissingError(f"missing: {', '.join(absent)}; on Debian: apt-get install {packages}")


def need_root() -> None:
    """Namespaces, debootstrap and daemons are root's.

    Raises:
        MissingError: this is not root.
    """
    if os.geteuid() != 0:
        raise MissingError("the engines need root: run this as root")


def release() -> tuple[str, str]:
    """The distribution and its code name, such as ``("debian", "bookworm")``; empty where they are not told."""
    try:
        told = platform.freedesktop_os_release()
    except OSError:
        return "", ""
    return told.get("ID", ""), told.get("VERSION_CODENAME", "")


def is_debian(suite: str | None = None) -> bool:
    """Whether this is Debian, and that suite of it."""
    name, code = release()
    return name == "debian" and suite in {None, code}


def archive() -> str:
    """The Debian archive that this machine's own apt uses.

    Raises:
        MissingError: it uses none.
    """
    need("apt-get")
    if not (sites := debian.sites()):
        run("apt-get", "update", "-q")
        sites = debian.sites()
    if not sites:
        raise MissingError("apt on this machine knows no Debian archive, and the image is made from one")
    return sites[0]


def unpack(packages: Sequence[str], folder: Path, into: Path) -> None:
    """Download Debian packages and lay their files out in a folder. Nothing is installed, no script of theirs runs."""
    need("apt-get", "dpkg-deb")
    if not debian.sites():
        run("apt-get", "update", "-q")
    # As root apt would hand the download to a user who may not write here.
    run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages, cwd=folder)
    for file in sorted(folder.glob("*.deb")):
        run("dpkg-deb", "--extract", str(file), str(into))
        file.unlink()


def run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run a command of this machine, its output among ours on stderr; it must succeed.

    Raises:
        subprocess.CalledProcessError: it did not.
    """
    subprocess.run(
        command, check=True, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=COMMAND_TIMEOUT_S
    )


def say(*words: object) -> None:
    """Tell the user on stderr what takes time; stdout is for what a shell evaluates."""
    print(*words, file=sys.stderr, flush=True)


def children(pid: int) -> list[int]:
    """The child processes of one that has a single thread."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
