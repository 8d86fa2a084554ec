"""What an engine leaves in the kernel's cgroups: folders below one of its own name, in every hierarchy."""

from __future__ import annotations

import os
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
SECONDS = 10.0
"""A cgroup can be removed only when the kernel has let go of its last process."""


def folders(name: str) -> list[Path]:
    """The folders of that name, in cgroup v2 and in every hierarchy of v1."""
    return [path for path in (ROOT / name, *ROOT.glob(f"*/{name}")) if path.is_dir()]


def make(name: str) -> None:
    """Make one of that name in every hierarchy, for an engine that wants to find it."""
    tops = [path for path in ROOT.iterdir() if path.joinpath("cgroup.procs").exists()]
    unified = ROOT.joinpath("cgroup.procs").exists()
    for top in [ROOT] if unified else tops:
        top.joinpath(name).mkdir(exist_ok=True)


def remove(name: str, *, ours: bool = True) -> None:
    """Remove them and all below, whose processes must have been killed. Where they are not ``ours``, only what nobody uses.

    Raises:
        OSError: a process is still there.
    """
    end = time.monotonic() + (SECONDS if ours else 0)
    for top in folders(name):
        for path, _, _ in os.walk(top, topdown=False):
            try:
                _rmdir(path, end)
            except OSError:
                if ours:
                    raise


def _rmdir(path: str, end: float) -> None:
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return
