"""What the tests of the chart stand on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.chart import rendering
from tests.chart.rendering import Helm

from cloche.testing.conformance import absent


@pytest.fixture(scope="session")
def program() -> Path:
    try:
        return rendering.find()
    except rendering.AbsentError as exc:
        absent("helm", str(exc))
        raise


@pytest.fixture(scope="session")
def helm(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """A helm that knows no cluster."""
    return Helm(program, tmp_path_factory.mktemp("helm"))
