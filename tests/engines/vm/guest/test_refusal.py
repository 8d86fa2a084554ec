"""Where the kernel forbids user namespaces: a clean refusal with the hint that helps, and nothing left."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.engines.vm.guest.stage import CHOSEN, cgroups, none_left, python

import cloche

pytestmark = pytest.mark.anyio

HINT = CHOSEN.removeprefix("refused:")


async def test_in_python() -> None:
    """Opening or running raises ``backend-unavailable`` (or isolation-unavailable); the hint names the setting."""
    before = cgroups()
    with pytest.raises(cloche.ClocheError) as caught:
        async with cloche.Sandbox.from_env({"CLOCHE_MODE": "local"}) as sandbox:
            await sandbox.run(python("pass"))
    assert caught.value.code in {"backend-unavailable", "isolation-unavailable"}
    assert HINT in caught.value.hint, caught.value
    left = none_left(before)
    assert not left, left


def test_on_the_command_line() -> None:
    """``cloche run --json`` ends with 125 and one result that says the same."""
    before = cgroups()
    environ = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG", "XDG_RUNTIME_DIR"}}
    command = [sys.executable, "-m", "cloche", "run", "--mode", "local", "--json", "/dev/stdin"]
    script = os.path.join(os.environ["SCENE_RESULTS"], "script.py")
    with open(script, "w", encoding="utf-8") as file:
        file.write("pass\n")
    command[-1] = script
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 125, done.stderr
    result = json.loads(done.stdout)
    assert result["outcome"] == "failed"
    assert result["error"]["code"] in {"backend-unavailable", "isolation-unavailable"}
    assert HINT in result["error"]["hint"]
    left = none_left(before)
    assert not left, left
