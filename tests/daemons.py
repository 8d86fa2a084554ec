"""What cloche has on Docker's daemons, seen past it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.engines.docker.api import Engine

HOSTS = ("CLOCHE_TEST_DOCKER_HOST", "CLOCHE_TEST_DOCKER_OLD_HOST", "CLOCHE_TEST_PODMAN_HOST")


def engine(host: str) -> Engine:
    """The engine at an address such as unix:///path."""
    return Engine(Path(host.removeprefix("unix://")), timeout=30)


def count_boxes(host: str) -> int:
    """Containers of cloche's that run now."""
    return len(_containers(host, status=["running", "created"]))


def remains(host: str, others: frozenset[str] = frozenset()) -> Iterator[str]:
    """Containers of cloche's, whatever their state, as text; without those of ``others``, owners that live elsewhere."""
    for found in _containers(host):
        if found["Labels"].get("cloche.owner") not in others:
            yield f"container {found['Names'][0]} ({found['State']}) of {host}"


def all_remains(others: frozenset[str]) -> Iterator[str]:
    """The same, of all daemons that the tests know."""
    for variable in HOSTS:
        if host := os.environ.get(variable):
            yield from remains(host, others)


def _containers(host: str, **filters: list[str]) -> list[dict[str, Any]]:
    query = json.dumps({"label": ["cloche.expires"], **filters})
    found: list[dict[str, Any]] = engine(host).get("/containers/json", all=1, filters=query)
    return found
