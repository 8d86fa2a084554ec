"""Names of images, and how far a pull is."""

from __future__ import annotations

import pytest

from cloche.backends.docker.images import Reference, parse_reference
from cloche.backends.docker.pull import Progress

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("image", "reference", "registry", "asked_for"),
    [
        ("python", Reference("python", None, None), "docker.io", "latest"),
        ("python:3.12-slim", Reference("python", "3.12-slim", None), "docker.io", "3.12-slim"),
        ("library/python:3", Reference("library/python", "3", None), "docker.io", "3"),
        ("ghcr.example/a/b", Reference("ghcr.example/a/b", None, None), "ghcr.example", "latest"),
        ("localhost/a:1", Reference("localhost/a", "1", None), "localhost", "1"),
        ("127.0.0.1:5000/a", Reference("127.0.0.1:5000/a", None, None), "127.0.0.1:5000", "latest"),
        ("127.0.0.1:5000/a:2", Reference("127.0.0.1:5000/a", "2", None), "127.0.0.1:5000", "2"),
        (f"python@{DIGEST}", Reference("python", None, DIGEST), "docker.io", DIGEST),
        (f"r.example:1/a:2@{DIGEST}", Reference("r.example:1/a", "2", DIGEST), "r.example:1", DIGEST),
    ],
)
def test_reference(image: str, reference: Reference, registry: str, asked_for: str) -> None:
    """A name is taken apart as Docker does it; without a tag ``latest`` is asked for, never all tags."""
    found = parse_reference(image)
    assert (found, found.registry, found.pulled_tag) == (reference, registry, asked_for)


def test_progress() -> None:
    """Layers are added up; a layer that is complete counts whole, and words that make no sense change nothing."""
    progress = Progress("python:3")
    mib = 2**20
    assert progress.add({"status": "Pulling from library/python", "id": "3"}) == "pulling python:3"
    first = {"status": "Downloading", "id": "a", "progressDetail": {"current": mib, "total": 4 * mib}}
    assert progress.add(first) == "pulling python:3: 1.0 of 4.0 MiB"
    second = {"status": "Downloading", "id": "b", "progressDetail": {"current": 0, "total": 2 * mib}}
    assert progress.add(second) == "pulling python:3: 1.0 of 6.0 MiB"
    assert progress.add({"status": "Download complete", "id": "a"}) == "pulling python:3: 4.0 of 6.0 MiB"
    assert progress.add({"status": 7, "id": [], "progressDetail": None}) == "pulling python:3: 4.0 of 6.0 MiB"
    assert progress.add({"status": "Pull complete", "id": "b"}) == "pulling python:3: 6.0 MiB are here, unpacking"
