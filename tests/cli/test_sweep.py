"""`cloche sweep` over every mode: what the dead left is told, and goes; what lives stays."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests import crowds

from cloche.testing.conformance import Target


def sweep(target: Target, *args: str, **settings: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one."""
    command = [sys.executable, "-m", "cloche", "sweep", *args]
    done = subprocess.run(
        command, env=target.command_environment(**settings), capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


def found(target: Target, *args: str) -> list[dict[str, Any]]:
    """What one told as JSON."""
    status, stdout, stderr = sweep(target, "--json", *args)
    answer = json.loads(stdout)
    assert (status, answer["error"], stderr) == (0, None, "")
    assert answer["dry_run"] == ("--dry-run" in args)
    leftovers: list[dict[str, Any]] = answer["leftovers"]
    return leftovers


def test_what_a_killed_client_left_is_told_and_goes(target: Target) -> None:
    """After kill -9 of a client --dry-run names what it left and changes nothing; sweep removes it, and then nothing is left."""
    crowds.kill_in_the_middle(target, 2)
    would = found(target, "--dry-run")
    assert would
    assert not any(each["removed"] for each in would)
    again = {each["name"] for each in found(target, "--dry-run")}
    gone = found(target)
    names = {each["name"] for each in would}
    # A box that dies with its client may be gone in between.
    assert again <= names
    assert {each["name"] for each in gone} <= again
    assert all(each["removed"] and each["reason"] for each in gone)
    assert found(target, "--dry-run") == []
    assert sweep(target)[2].endswith("nothing is left of the dead\n")


def test_a_living_run_is_not_touched(target: Target) -> None:
    """While a client's runs go on, neither kind of sweep finds anything."""
    seen: list[list[dict[str, Any]]] = []

    def look() -> None:
        seen.extend([found(target, "--dry-run"), found(target)])

    crowds.kill_in_the_middle(target, 1, look)
    assert seen == [[], []]
    found(target)


def test_an_engine_that_is_away_is_an_error(target: Target) -> None:
    """Where the engine cannot be used the exit status is 125, and nothing takes its place; in JSON the reason is the error."""
    settings = {"CLOCHE_MODE": "opensandbox", "CLOCHE_OPENSANDBOX_API_URL": "http://127.0.0.1:9"}
    status, stdout, stderr = sweep(target, "--json", **settings)
    assert (status, stderr) == (125, "")
    assert json.loads(stdout)["error"]["code"] == "backend-unavailable"
    status, stdout, stderr = sweep(target, **settings)
    assert (status, stdout) == (125, "")
    assert "[backend-unavailable]" in stderr
