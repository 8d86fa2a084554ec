"""Asks a doctor in a process of its own, as users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def doctor(
    mode: str, *options: str, path: Path | None = None, settings: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    """Exit status and report. ``path`` is a folder that is searched for programs first."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("CLOCHE_")} | dict(settings or {})
    if path is not None:
        env["PATH"] = f"{path}:{env['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "cloche", "doctor", "--mode", mode, "--json", *options],
        env=env,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def broken(report: Any) -> set[str]:
    """What a run counts on and does not have."""
    return {g["name"] for g in report["guarantees"] if g["needed"] and g["state"] == "not-in-force"}


def states(report: Any) -> dict[str, str]:
    """By the guarantees' names."""
    return {g["name"]: g["state"] for g in report["guarantees"]}
