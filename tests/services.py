"""What cloche has in the OpenSandbox services of the tests, seen past it, as their API shows it."""

from __future__ import annotations

import json
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.engines.opensandbox import images

PREFIXES = {"opensandbox": images.PREFIXES["current"], "opensandbox-old": images.PREFIXES["old"]}
"""The services by the name of their mode, and how the variables begin by which a test finds each."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Service:
    """One that is up."""

    url: str
    key: str
    docker_host: str
    """The daemon on which its sandboxes are; empty where that is not known."""

    def ask(self, method: str, path: str, **query: str) -> Any:
        """An answer of its API; None: there is no such thing."""
        full = f"{self.url}/v1{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        request = urllib.request.Request(full, method=method, headers={"OPEN-SANDBOX-API-KEY": self.key})
        try:
            with _DIRECT.open(request, timeout=30) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        return json.loads(body) if body else None

    def boxes(self) -> list[dict[str, Any]]:
        """All sandboxes of cloche's."""
        found: list[dict[str, Any]] = self.ask("GET", "/sandboxes", metadata="cloche-kind=box", pageSize="200")["items"]
        return found


def find(mode: str) -> Service | None:
    """The service of a mode, where the environment says that there is one."""
    prefix = PREFIXES[mode]
    if not (url := os.environ.get(f"{prefix}_API_URL")):
        return None
    return Service(url, os.environ.get(f"{prefix}_API_KEY", ""), os.environ.get(f"{prefix}_DOCKER_HOST", ""))


def remains(service: Service, others: frozenset[str] = frozenset()) -> Iterator[str]:
    """Its sandboxes of cloche's, as text; without those of ``others``, owners that live elsewhere."""
    for box in service.boxes():
        if box["metadata"].get("cloche-owner") not in others:
            yield f"sandbox {box['id']} ({box['status']['state']}) of {service.url}"


def all_remains(others: frozenset[str]) -> Iterator[str]:
    """The same, of all services that the tests know."""
    for mode in PREFIXES:
        if (service := find(mode)) is not None:
            yield from remains(service, others)
