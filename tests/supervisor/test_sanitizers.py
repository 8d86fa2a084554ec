"""That the sanitized build is what it says, so that its silence means something."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.supervisor import builds
from tests.supervisor.harness import Bench

MISTAKE = """
	static char *volatile room;
	int n = 2147483647;
	if (run.o.nofile == 1) { room = malloc(3); room[getpid() + 2] = 1; free(room); }
	if (run.o.nofile == 2 && (n += getpid()) == 5) return 1;
"""
"""Chosen by an option: past the end of the heap's room, and past the greatest int."""


def test_a_mistake_is_reported(folder: Path) -> None:
    """A memory error or undefined behaviour in PID 1 of a box fails the test that it happens in, with the report."""
    place = folder / "mistaken"
    sources = place / "c"
    shutil.copytree(builds.SOURCES, sources)
    main = sources / "main.c"
    right = main.read_text()
    wrong = right.replace("\tframe_hello();\n", f"\tframe_hello();\n\t{{ {MISTAKE} }}\n")
    assert wrong != right
    main.write_text(wrong)
    bench = Bench(builds.sanitized(place, sources), place)
    assert bench.shell("true").end.exit_code == 0
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        bench.shell("true", "--nofile", "1")
    with pytest.raises(AssertionError, match="signed integer overflow"):
        bench.shell("true", "--nofile", "2")
