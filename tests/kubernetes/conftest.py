"""What the tests of the kubernetes mode stand on: the cluster that the environment names, and its parts where it is ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests import clusters, modes
from tests.engines.kubernetes.cluster import Cluster
from tests.kubernetes import deployment
from tests.kubernetes.deployment import Api

from cloche.testing.conformance import Target, absent

ABSENT = "127.0.0.1:1/absent:1"
"""An image that no registry has: nothing listens there."""
MALFORMED = "Not/An Image"


@pytest.fixture(scope="session")
def kubernetes() -> Target:
    """The cluster, under no more rights than the Role of deploy/kubernetes gives."""
    return modes.ready("kubernetes")


@pytest.fixture(scope="session")
def admin(kubernetes: Target) -> Api:
    """The same cluster, past cloche, as its administrator."""
    del kubernetes
    return clusters.administrator(os.environ[deployment.KUBECONFIG])


@pytest.fixture(scope="session")
def cluster(kubernetes: Target) -> Cluster:
    """The same cluster, whose parts can be stopped."""
    del kubernetes
    folder = os.environ.get("CLOCHE_TEST_KUBERNETES_FOLDER", "")
    if not folder:
        absent("kubernetes", "CLOCHE_TEST_KUBERNETES_FOLDER is not set: the parts of this cluster cannot be stopped")
    return Cluster.attach(Path(folder))


@pytest.fixture(scope="module")
def any_image(kubernetes: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """The cluster with images on its list that cannot be had."""
    administrator = deployment.admin()
    images = [*deployment.IMAGES, ABSENT, MALFORMED]
    ours = deployment.deploy(administrator, tmp_path_factory.mktemp("kubernetes"), images)
    yield replace(kubernetes, environ={**kubernetes.environ, "CLOCHE_KUBE_CONFIG": str(ours)})
    deployment.deploy(administrator, tmp_path_factory.mktemp("kubernetes"))
