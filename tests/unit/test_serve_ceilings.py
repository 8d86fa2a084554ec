"""What a request to the service may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from cloche import InvalidSpec, Settings, Spec
from cloche.server.ceilings import check

SCRIPT: dict[str, Any] = {"name": "a.sh", "content": "true"}
SETTINGS = Settings(
    serve_max_timeout=100,
    serve_max_memory="1Gi",
    serve_max_cpus=2,
    serve_max_pids=64,
    serve_images=("python:3.13", "team/*"),
    image="base:1",
    pids=32,
)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"timeout": 100, "memory": "1Gi", "cpus": 2, "pids": 64},
        {"image": "base:1"},
        {"image": "python:3.13"},
        {"image": "team/a:2"},
        {"network": "none"},
    ],
)
def test_allowed(asked: dict[str, Any]) -> None:
    """What lies within the operator's bounds goes, and so does a request that asks for nothing."""
    check(Spec(**SCRIPT, **asked), SETTINGS)


@pytest.mark.parametrize(
    ("asked", "setting"),
    [
        ({"timeout": 101}, "CLOCHE_SERVE_MAX_TIMEOUT"),
        ({"memory": 2**30 + 1}, "CLOCHE_SERVE_MAX_MEMORY"),
        ({"cpus": 2.5}, "CLOCHE_SERVE_MAX_CPUS"),
        ({"pids": 65}, "CLOCHE_SERVE_MAX_PIDS"),
        ({"network": "open"}, "CLOCHE_SERVE_NETWORK"),
        ({"image": "python:3.12"}, "CLOCHE_SERVE_IMAGES"),
        ({"image": "python:3.13-slim"}, "CLOCHE_SERVE_IMAGES"),
        ({"image": "other/team/a"}, "CLOCHE_SERVE_IMAGES"),
    ],
)
def test_refused(asked: dict[str, Any], setting: str) -> None:
    """What lies beyond is refused, and the hint names the setting that would allow it."""
    with pytest.raises(InvalidSpec) as caught:
        check(Spec(**SCRIPT, **asked), SETTINGS)
    assert setting in caught.value.hint


def test_the_services_own_defaults_are_allowed() -> None:
    """A bound below what the service gives those who ask for nothing does not forbid to ask for just that."""
    check(Spec(**SCRIPT, timeout=60, pids=128), Settings(serve_max_timeout=1, serve_max_pids=4))


def test_everything_can_be_allowed() -> None:
    """`*` stands for any image, and an open network can be given."""
    check(Spec(**SCRIPT, image="any/thing", network="open"), Settings(serve_images=("*",), serve_network="open"))
