"""helm, from its Go module."""

from __future__ import annotations

from pathlib import Path

from tests.engines.docker.binaries import Module

VERSION = "4.3.1"
HELM = Module(
    "helm",
    # Unstamped it calls itself v4.3, which tools that compare versions do not take for one.
    ldflags=f"-X helm.sh/helm/v4/internal/version.version=v{VERSION}",
    modules=Path(__file__).parent / "modules",
)


def obtain() -> Path:
    """The program."""
    return HELM.obtain() / "helm"
