"""What every mode of cloche must do, as a test suite that anybody can run over a backend or a configuration of their own.

    from cloche.testing.conformance import ConformanceSuite, Target

    class TestMine(ConformanceSuite):
        @pytest.fixture
        def target(self) -> Target:
            return Target("docker", {"CLOCHE_IMAGE": "registry.example/python:3"}, frozenset({"python3", "sh", "bash"}))

It needs pytest, with anyio's plugin (installed with anyio). Tests of interpreters that the target does not offer are
skipped; with ``CLOCHE_MUST_WORK=docker`` in the environment that is a failure. Each part can also be collected alone.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{part}"
        for part in (
            "artifacts",
            "clock",
            "crowd",
            "departures",
            "endings",
            "inputs",
            "limits",
            "refusals",
            "streams",
            "target",
            "workspaces",
        )
    )
)

from cloche.testing.conformance.artifacts import Artifacts  # noqa: E402 -- assertions are rewritten on import
from cloche.testing.conformance.clock import Clock  # noqa: E402
from cloche.testing.conformance.crowd import Crowd  # noqa: E402
from cloche.testing.conformance.departures import Departures  # noqa: E402
from cloche.testing.conformance.endings import Endings  # noqa: E402
from cloche.testing.conformance.inputs import Inputs  # noqa: E402
from cloche.testing.conformance.limits import Limits  # noqa: E402
from cloche.testing.conformance.refusals import Refusals  # noqa: E402
from cloche.testing.conformance.streams import Streams  # noqa: E402
from cloche.testing.conformance.target import Suite, Target, absent, assert_exited, must_work, python, shell  # noqa: E402
from cloche.testing.conformance.workspaces import Interpreters, Workspaces  # noqa: E402

PARTS = (Endings, Streams, Inputs, Workspaces, Interpreters, Artifacts, Limits, Clock, Departures, Crowd, Refusals)


class ConformanceSuite(
    Endings, Streams, Inputs, Workspaces, Interpreters, Artifacts, Limits, Clock, Departures, Crowd, Refusals
):
    """All parts. A subclass whose name begins with ``Test`` gives the fixture ``target``."""


__all__ = [
    "PARTS",
    "Artifacts",
    "Clock",
    "ConformanceSuite",
    "Crowd",
    "Departures",
    "Endings",
    "Inputs",
    "Interpreters",
    "Limits",
    "Refusals",
    "Streams",
    "Suite",
    "Target",
    "Workspaces",
    "absent",
    "assert_exited",
    "must_work",
    "python",
    "shell",
]
