"""Every command that prints for machines, where nothing can be printed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMANDS = (
    ["sweep", "--mode", "disabled", "--json"],
    ["doctor", "--mode", "disabled", "--json"],
    ["doctor", "--mode", "disabled"],
    ["run", "--mode", "disabled", "--json", "none.sh"],
)


def cloche(command: list[str], stdout: int) -> tuple[int, str]:
    """Exit status and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "cloche", *command], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(command: list[str]) -> None:
    """That stdout cannot be written is told in one line, and is a failure of cloche's."""
    with open("/dev/full", "wb") as full:
        assert cloche(command, full.fileno()) == (125, "cloche: stdout cannot be written: No space left on device\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_reads(command: list[str]) -> None:
    """That nobody reads is no failure: nothing is said, and the status is what it would have been."""
    reader, writer = os.pipe()
    os.close(reader)
    status, stderr = cloche(command, writer)
    os.close(writer)
    assert (status, stderr) == (cloche(command, subprocess.DEVNULL)[0], "")
