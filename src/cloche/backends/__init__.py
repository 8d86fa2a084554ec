"""Engines. A folder per backend, strangers to each other, and here the one table that names them.

Nothing is imported before its mode is asked for: an engine's client costs nothing to those who do not use it, and the
package imports where an engine cannot work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from cloche.backends.contract import Backend
from cloche.settings import Mode, Settings

BackendFactory: TypeAlias = Callable[[Settings, str], Backend]
"""Makes a backend from the settings and the name of the owner that its boxes carry. Does no I/O."""


def _disabled(settings: Settings, owner: str) -> Backend:
    from cloche.backends.disabled import DisabledBackend

    return DisabledBackend(settings, owner)


def _local(settings: Settings, owner: str) -> Backend:
    from cloche.backends.local.backend import LocalBackend

    return LocalBackend(settings, owner)


def _docker(settings: Settings, owner: str) -> Backend:
    from cloche.backends.docker.backend import DockerBackend

    return DockerBackend(settings, owner)


def _kubernetes(settings: Settings, owner: str) -> Backend:
    from cloche.backends.kubernetes.backend import KubernetesBackend

    return KubernetesBackend(settings, owner)


def _opensandbox(settings: Settings, owner: str) -> Backend:
    from cloche.backends.opensandbox.backend import OpenSandboxBackend

    return OpenSandboxBackend(settings, owner)


TABLE: Mapping[str, BackendFactory] = MappingProxyType(
    {
        Mode.DISABLED: _disabled,
        Mode.LOCAL: _local,
        Mode.DOCKER: _docker,
        Mode.KUBERNETES: _kubernetes,
        Mode.OPENSANDBOX: _opensandbox,
    }
)
"""The modes of this version."""
