"""The conformance suite, over every mode that works here."""

from __future__ import annotations

from collections import Counter

from cloche.testing.conformance import PARTS, ConformanceSuite


class TestConformance(ConformanceSuite):
    """Gives nothing of its own: the fixture ``target`` is that of ``tests/conftest.py``."""


def test_no_test_hides_another() -> None:
    """The parts of the suite have no two tests of one name, of which only the first would be run."""
    names = Counter(name for part in PARTS for name in vars(part) if name.startswith("test_"))
    assert not [name for name, count in names.items() if count > 1]
    assert len(names) == len([name for name in dir(TestConformance) if name.startswith("test_")])
