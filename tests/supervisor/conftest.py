"""The builds, made once in a session, and a bench for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.supervisor import builds
from tests.supervisor.harness import Bench, public_folder


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder for what these tests build."""
    with public_folder() as path:
        yield path


@pytest.fixture(scope="session", params=["shipped", "sanitized"])
def bench(request: pytest.FixtureRequest, folder: Path) -> Bench:
    """Boxes of each build in turn."""
    place = folder / request.param
    place.mkdir()
    make = builds.shipped if request.param == "shipped" else builds.sanitized
    return Bench(make(place), place)


@pytest.fixture(scope="session")
def shipped(folder: Path) -> Bench:
    """Boxes of the shipped build alone, for what depends on time or takes long."""
    place = folder / "shipped-alone"
    place.mkdir()
    return Bench(builds.shipped(place), place)
