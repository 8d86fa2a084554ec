"""The machine's disk: a Debian tree with systemd, bubblewrap and the project's dependencies. Made once, kept in a cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines import debian

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

SUITES = ("bookworm", "trixie")
"""Debian suites that can be had: 12 has systemd 252, Linux 6.1, Python 3.11; 13 has systemd 257, Linux 6.12, Python 3.13."""
PACKAGES = (
    "systemd-sysv",
    "dbus",
    "dbus-user-session",
    "libpam-systemd",
    "apparmor",
    "apparmor-profiles",
    "bubblewrap",
    "python3",
    "python3-venv",
    "nodejs",
    "procps",
    "kmod",
    "linux-image-cloud-amd64",
)
USERS = {"alice": 1000, "bob": 1001}
"""alice has a user manager of her own, bob has none."""
MASKED = (
    "apparmor.service",  # a scene loads the one profile that it is about
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
)
SPARE_BYTES = 2**30
"""Room on the disk beside what is installed."""
UNIT = """\
[Unit]
Description=The scenes of cloche
After=dbus.socket systemd-logind.service systemd-user-sessions.service

[Service]
Type=exec
ExecStartPre=/usr/bin/mount -o ro,X-mount.mkdir /dev/vdb /srv/cloche
ExecStart=/usr/bin/python3 /srv/cloche/tests/engines/vm/guest/main.py
ExecStopPost=/usr/bin/systemctl --no-block poweroff
"""


@dataclass(frozen=True)
class Image:
    """What qemu needs to boot."""

    disk: Path
    kernel: Path
    initrd: Path


def cache_folder() -> Path:
    """Outside the checkout, so that a fresh clone finds what an older one made."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "cloche-vm")


def obtain(suite: str, mirror: str | None) -> Image:
    """The image of a suite: from the cache when its recipe has not changed, else made now, which takes minutes."""
    requirements = _requirements()
    recipe = "\n".join([Path(__file__).read_text(), suite, *requirements])
    folder = cache_folder() / f"{suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    image = Image(folder / "disk.img", folder / "vmlinuz", folder / "initrd.img")
    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / f"{suite}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not image.initrd.exists():
            for old in cache_folder().glob(f"{suite}-*"):
                shutil.rmtree(old)
            _make(image, suite, mirror or _site(), requirements)
    return image


def _requirements() -> list[str]:
    """What the project needs at run time and for its tests."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [*project["project"]["dependencies"], *project["dependency-groups"]["test"]]


def _site() -> str:
    """The Debian archive that this machine's own apt uses."""
    if not (sites := debian.sites()):
        run("apt-get", "update", "-q")
        sites = debian.sites()
    if not sites:
        sys.exit("apt on this machine knows no Debian archive: name one with --mirror URL")
    return sites[0]


def _make(image: Image, suite: str, site: str, requirements: list[str]) -> None:
    print(f"making the image of Debian {suite} in {image.disk.parent}; this takes a few minutes", flush=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="tree-") as temporary:
        tree = Path(temporary, "root")
        log = cache_folder() / f"{suite}.log"
        with open(log, "w", encoding="utf-8") as output:
            include = f"--include={','.join(PACKAGES)}"
            command = ["debootstrap", "--variant=minbase", include, suite, str(tree), site]
            done = subprocess.run(
                command, env={**os.environ, **debian.proxies()}, stdout=output, stderr=output, check=False
            )
        if done.returncode:
            sys.exit(f"debootstrap failed; its log is {log}, and says at the end:\n{log.read_text()[-2000:]}")
        _configure(tree)
        _install(tree, requirements)
        image.disk.parent.mkdir()
        for target, name in ((image.kernel, "vmlinuz-*"), (image.initrd, "initrd.img-*")):
            shutil.copy(next(tree.joinpath("boot").glob(name)), target.with_suffix(".new"))
        disk_from(tree, image.disk, SPARE_BYTES)
        # The last one to appear: whoever sees it sees a finished image.
        image.kernel.with_suffix(".new").rename(image.kernel)
        image.initrd.with_suffix(".new").rename(image.initrd)


def _configure(tree: Path) -> None:
    tree.joinpath("etc/hostname").write_text("cloche-vm\n")
    tree.joinpath("etc/hosts").write_text("127.0.0.1 localhost cloche-vm\n")
    tree.joinpath("etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
    tree.joinpath("etc/systemd/system/cloche-vm.service").write_text(UNIT)
    wants = tree / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    wants.joinpath("cloche-vm.service").symlink_to("../cloche-vm.service")
    for unit in MASKED:
        tree.joinpath("etc/systemd/system", unit).symlink_to("/dev/null")
    for name, uid in USERS.items():
        run("chroot", str(tree), "useradd", "--create-home", "--uid", str(uid), "--shell", "/bin/bash", name)


def _install(tree: Path, requirements: list[str]) -> None:
    """A virtual environment in /opt/cloche with all but the project itself, by the tree's own pip and this machine's network."""
    for source, name in (("/etc/resolv.conf", "etc/resolv.conf"), (_certificates(), "opt/ca.pem")):
        shutil.copy(source, tree / name)
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", **_index()}
    run("chroot", str(tree), "python3", "-m", "venv", "/opt/cloche")
    pip = ("/opt/cloche/bin/pip", "install", "--quiet", "--no-cache-dir", "--cert", "/opt/ca.pem", *requirements)
    run("chroot", str(tree), *pip, env=environ)
    for name in ("etc/resolv.conf", "opt/ca.pem"):
        tree.joinpath(name).unlink()


def _certificates() -> str:
    """The authorities that this machine trusts."""
    return os.environ.get("PIP_CERT") or ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"


def _index() -> dict[str, str]:
    """Where this machine's pip gets packages from, as variables for another pip."""
    found = {}
    answer = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    for line in answer.stdout.splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in {"index-url", "extra-index-url", "proxy", "trusted-host"}:
            found[f"PIP_{option.upper().replace('-', '_')}"] = value.strip("'\"")
    return found


def disk_from(tree: Path, disk: Path, spare_bytes: int) -> None:
    """An ext4 file system with everything in a folder, in a sparse file."""
    used = int(subprocess.run(["du", "-sk", tree], capture_output=True, text=True, check=True).stdout.split()[0]) * 1024
    with open(disk, "wb") as file:
        file.truncate(used + used // 4 + spare_bytes)
    run("mkfs.ext4", "-q", "-F", "-d", str(tree), str(disk))


def run(*command: str, env: dict[str, str] | None = None) -> None:
    """Run a command of this machine; it must succeed.

    Raises:
        subprocess.CalledProcessError: it did not.
    """
    subprocess.run(command, check=True, env=env)
