"""Which modes ``auto`` tries on this machine, in which order, and why not the others. Looks at settings and at names of files;
nothing here asks a network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cloche.settings import Mode, Settings

TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 (its path)
"""What Kubernetes puts into a pod that may speak to it (kubernetes.io, "Accessing the Kubernetes API from a Pod")."""
DOCKER_SOCKET = "/var/run/docker.sock"
"""Where a daemon listens of which nothing is said."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mode, why one would take it when it works, and why it need not even be tried; empty: it has to be."""

    mode: Mode
    why: str
    why_not: str = ""


def candidates(settings: Settings) -> tuple[Candidate, ...]:
    """All that come into question, the best one first.

    Whoever put cloche into a pod wants its cluster; whoever configured a service, that; a daemon isolates more than ``local``
    does, which is there where nothing else is.
    """
    return (
        Candidate(Mode.KUBERNETES, "this is a pod with rights in the namespace", _no_pod(settings)),
        Candidate(
            Mode.OPENSANDBOX,
            "a service is configured and answers",
            "" if settings.opensandbox_api_url is not None else "CLOCHE_OPENSANDBOX_API_URL is not set",
        ),
        Candidate(Mode.DOCKER, "a daemon answers", _no_daemon(settings)),
        Candidate(Mode.LOCAL, "it needs no engine"),
    )


def _no_pod(settings: Settings) -> str:
    if settings.kube_api_host is None:
        return "this is no pod of a cluster"
    return "" if os.path.exists(TOKEN) else "this pod has no token of a service account"


def _no_daemon(settings: Settings) -> str:
    """Why there cannot be one. An address, a context or a configuration file of Docker's may lead to one."""
    host = settings.docker_host
    if host is not None and host.startswith("unix://"):
        path = host.removeprefix("unix://")
        return "" if os.path.exists(path) else f"there is no {path}"
    folder = settings.docker_config or os.path.join(os.path.expanduser("~"), ".docker")
    told = host is not None or settings.docker_context is not None
    if told or os.path.exists(DOCKER_SOCKET) or os.path.exists(os.path.join(folder, "config.json")):
        return ""
    return f"there is no {DOCKER_SOCKET}"
