"""What this machine's own apt knows: where Debian's archive is, and the way there."""

from __future__ import annotations

import shlex
import subprocess


def sites() -> list[str]:
    """Debian archives that apt uses; none before its first update."""
    ask = ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Label: Debian", "Component: main"]
    return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()


def proxies() -> dict[str, str]:
    """apt's proxies, as variables for debootstrap's wget."""
    found = {}
    for scheme in ("http", "https"):
        ask = ["apt-config", "shell", "proxy", f"Acquire::{scheme}::Proxy"]
        answer = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
        if answer:
            found[f"{scheme}_proxy"] = shlex.split(answer)[0].removeprefix("proxy=")
    return found
