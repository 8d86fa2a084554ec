"""The command is the same over every engine: two kinds of them are enough here."""

from __future__ import annotations

import pytest
from tests.modes import ready

from cloche.testing.conformance import Target


@pytest.fixture(params=["local", "docker"])
def target(request: pytest.FixtureRequest, _targets: dict[str, Target]) -> Target:
    """As in the suites, with fewer modes."""
    if request.param not in _targets:
        _targets[request.param] = ready(request.param)
    return _targets[request.param]
