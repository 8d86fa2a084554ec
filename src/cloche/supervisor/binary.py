"""Finds the supervisor that the wheel carries, one static program per architecture."""

from __future__ import annotations

import platform
from importlib import resources
from pathlib import Path

from cloche.errors import BackendUnavailable

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
"""What the kernel, Docker and Kubernetes call the two architectures."""


def machine_name(machine: str | None = None) -> str:
    """An architecture (None: this machine's) by the name that the supervisors have, ``x86_64`` or ``aarch64``.

    Raises:
        BackendUnavailable: there is no supervisor for it.
    """
    machine = platform.machine() if machine is None else machine
    known = _MACHINES.get(machine.lower())
    if known is None:
        raise BackendUnavailable(
            f"There is no supervisor for the architecture {machine}.",
            hint="Run on x86_64 or aarch64, or use the remote mode.",
        )
    return known


def supervisor_path(machine: str | None = None) -> Path:
    """Path of the supervisor for an architecture (``x86_64``, ``amd64``, ``aarch64``, ``arm64``), by default this one's.

    Raises:
        BackendUnavailable: there is no supervisor for the architecture, or this installation was made without it.
    """
    known = machine_name(machine)
    path = Path(str(resources.files("cloche.supervisor") / "bin" / f"cloche-supervisor-{known}"))
    if not path.is_file():
        raise BackendUnavailable(
            f"This installation of cloche has no supervisor for {known}.",
            hint="Install the published wheel, which has both architectures, or build from source with pip install .",
        )
    return path
