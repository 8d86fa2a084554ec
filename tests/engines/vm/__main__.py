"""``python -m tests.engines.vm``: see the README beside this file."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from tests.engines.vm import image, machine, project

TIMEOUT_S = {"kvm": 900.0, "tcg": 7200.0}
NEEDS = ("debootstrap", "mkfs.ext4", machine.QEMU)


def main() -> int:
    """Play the scenes in each machine asked for. 0: all went well, or KVM was asked for and is not here; 1: not."""
    options = _options()
    if options.need_kvm and not machine.may_have_kvm():
        return _skip()
    if missing := [name for name in NEEDS if shutil.which(name) is None]:
        sys.exit(f"missing: {', '.join(missing)}; on Debian: apt-get install debootstrap e2fsprogs qemu-system-x86")
    if os.geteuid() != 0:
        sys.exit("debootstrap needs root: run this as root")
    failed = 0
    for suite in options.suite or ["trixie"]:
        made = image.obtain(suite, options.mirror)
        accel = options.accel or machine.accelerator(made)
        if options.need_kvm and accel != "kvm":
            return _skip()
        failed += not _play(suite, made, accel, options)
    return 1 if failed else 0


def _skip() -> int:
    print(
        "SKIPPED: KVM cannot boot a Debian kernel on this machine. Without --need-kvm it is emulated, which takes an hour."
    )
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run", description="Prove the local backend in a virtual machine.")
    parser.add_argument("--suite", action="append", choices=image.SUITES, help="Debian suite, may be repeated (trixie)")
    parser.add_argument("--scene", action="append", default=[], help="only this scene, may be repeated")
    parser.add_argument("--pytest", action="append", default=[], help="a further argument for pytest, as --pytest=-x")
    parser.add_argument("--command", help="run this shell command as root instead of the scenes")
    parser.add_argument("--accel", choices=list(machine.ACCELERATORS), help="default: kvm where it boots, else tcg")
    parser.add_argument("--need-kvm", action="store_true", help="without KVM do nothing but say so")
    parser.add_argument("--mirror", metavar="URL", help="Debian archive; default: the one of this machine's apt")
    parser.add_argument("--results", type=Path, help="folder for junit files, logs and figures")
    return parser.parse_args()


def _play(suite: str, made: image.Image, accel: str, options: argparse.Namespace) -> bool:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cloche-vm-") as temporary:
        disk, tar = Path(temporary, "project.img"), Path(temporary, "results.tar")
        slow = 1 if accel == "kvm" else 10
        project.make(
            disk, {"scenes": options.scene, "pytest": options.pytest, "command": options.command, "slow": slow}
        )
        print(f"\n### Debian {suite}, {accel}", flush=True)
        ended = machine.boot(made, disk, accel, tar, TIMEOUT_S[accel])
        if options.results and tar.exists() and tar.stat().st_size:
            folder = options.results / suite
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with tarfile.open(tar) as archive:
                archive.extractall(folder, filter="data")
        passed = ended and _verdict(tar)
    word = "passed" if passed else "FAILED"
    print(f"### Debian {suite}, {accel}: {word} in {time.monotonic() - begin:.0f} s", flush=True)
    return passed


def _verdict(tar: Path) -> bool:
    """Whether the guest wrote that all went well. Nothing written is no."""
    try:
        with tarfile.open(tar) as archive:
            verdict = archive.extractfile("verdict")
            return verdict is not None and verdict.read() == b"passed"
    except (tarfile.TarError, KeyError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main())
