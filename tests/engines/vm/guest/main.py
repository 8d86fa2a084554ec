"""Runs in the guest, as root, at the end of boot: plays the scenes and hands the results out. Standard library only."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
import traceback
from pathlib import Path

PROJECT = Path("/srv/cloche")
RESULTS = Path("/var/results")
SAYING = "/dev/virtio-ports/cloche.said"
SENDING = "/dev/virtio-ports/cloche.made"


def main() -> None:
    """Install the wheel, play, send."""
    # What this and everything below it says goes out through the port.
    while not os.path.exists(SAYING):  # udev makes the names when it comes to it
        time.sleep(0.1)
    said = os.open(SAYING, os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    plan = json.loads(PROJECT.joinpath("plan.json").read_text())
    RESULTS.mkdir()
    verdict = "failed"
    try:
        wheel = next(PROJECT.joinpath("wheel").glob("*.whl"))
        subprocess.run(["/opt/cloche/bin/pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
        if plan["command"]:
            done = subprocess.run(plan["command"], shell=True, check=False, cwd="/", env=os.environ | {"HOME": "/root"})
            passed = done.returncode == 0
        else:
            import scenes  # type: ignore[import-not-found]  # beside this file

            passed = scenes.play(plan["scenes"], plan["pytest"], plan["slow"], RESULTS)
        verdict = "passed" if passed else "failed"
    except Exception:  # noqa: BLE001 -- whatever it is must reach the other side
        traceback.print_exc()
    RESULTS.joinpath("verdict").write_text(verdict)
    with open(SENDING, "wb", buffering=0) as port, tarfile.open(fileobj=port, mode="w|") as archive:
        for path in sorted(RESULTS.iterdir()):
            archive.add(path, path.name)


main()
