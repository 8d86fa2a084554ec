"""What cloche has in the cluster of the tests, seen past it, as the administrator sees it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from tests.kubernetes import deployment
from tests.kubernetes.deployment import KUBECONFIG, NAMESPACE, Api

from cloche.backends.kubernetes import names


@functools.cache
def administrator(kubeconfig: str) -> Api:
    """The API server of a configuration file, as its user."""
    return Api(Path(kubeconfig))


def count_boxes(kubeconfig: str) -> int:
    """Jobs of cloche's that are there."""
    return len(list(_names(kubeconfig, "jobs")))


def remains(kubeconfig: str) -> Iterator[str]:
    """Everything of cloche's runs in the namespace, as text."""
    for kind in ("jobs", "configmaps", "pods"):
        for name in _names(kubeconfig, kind):
            yield f"{kind.removesuffix('s')} {name} of {NAMESPACE}"


def all_remains() -> Iterator[str]:
    """The same, of the cluster that the tests know, if they know one."""
    if kubeconfig := os.environ.get(KUBECONFIG):
        yield from remains(kubeconfig)


def _names(kubeconfig: str, kind: str) -> Iterator[str]:
    path = deployment.jobs() if kind == "jobs" else deployment.core(kind)
    answer = administrator(kubeconfig).ask("GET", f"{path}?labelSelector={names.OURS.replace('=', '%3D')}")
    assert answer.status == 200, answer.body
    for item in answer.body["items"]:
        if names.LABEL_RUN in item["metadata"]["labels"]:
            yield item["metadata"]["name"]
