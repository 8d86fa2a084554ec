"""The cluster's programs, from their Go modules. containerd and runc are those of the docker engines."""

from __future__ import annotations

from pathlib import Path

from tests.engines.docker.binaries import CONTAINERD, RUNC, Module

FOLDER = Path(__file__).parent / "modules"
STAMP = "k8s.io/component-base/version"
VERSION = (1, 37, 2)
MAJOR, MINOR, PATCH = VERSION

KUBERNETES = Module(
    "kubernetes",
    # Unstamped it calls itself v0.0.0-master, and clients then take it for older than all they know.
    ldflags=f"-X {STAMP}.gitVersion=v{MAJOR}.{MINOR}.{PATCH} -X {STAMP}.gitMajor={MAJOR} -X {STAMP}.gitMinor={MINOR}",
    modules=FOLDER,
)
ETCD = Module("etcd", modules=FOLDER, program="etcd")
CNI = Module("cni", modules=FOLDER)
MODULES = (RUNC, CONTAINERD, ETCD, CNI, KUBERNETES)


def obtain() -> list[Path]:
    """Folders with all programs, for a PATH."""
    return [module.obtain() for module in MODULES]
