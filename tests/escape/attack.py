"""Our side of an attack: put it together, run it in a box, and judge what it says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cloche
from cloche.testing.conformance import assert_exited

PREAMBLE = Path(__file__).with_name("attacker.py").read_text()

REFUSED = frozenset({"EPERM", "EACCES", "EROFS", "ENOSYS", "ENOENT", "ESRCH", "nothing gained"})
"""The answers that mean no. Others (EINVAL, EFAULT, EBADF …) mean that the attempt got past the guard, or was none."""

ENDING = "the attack is over\n"
FILLER = "0123456789abcdef" * 8192
"""128 KiB written after the attack: it must all arrive."""


def script(attempts: Mapping[str, str], setup: str = "", after: str = "") -> str:
    """An attack as the text of a script: each attempt is an expression, see ``attacker.py``."""
    lines = [PREAMBLE, setup]
    lines += [f"attempt({name!r}, lambda: ({expression}))" for name, expression in attempts.items()]
    lines += [after, f"sys.stdout.write('0123456789abcdef' * 8192 + {ENDING!r})", f"sys.stderr.write({ENDING!r})"]
    return "\n".join(lines) + "\n"


def verdicts(stdout: str) -> dict[str, dict[str, str]]:
    """What the attacker reported, by attempt."""
    found: dict[str, dict[str, str]] = {}
    for line in stdout.splitlines():
        if line.startswith("VERDICT "):
            said = json.loads(line.removeprefix("VERDICT "))
            name = said.pop("attempt")
            assert name not in found, f"{name} was attempted twice"
            found[name] = said
    return found


def judge(stdout: str, attempts: Iterable[str], also_refused: Iterable[str] = ()) -> None:
    """Every attempt was made, and every one was refused."""
    said = verdicts(stdout)
    assert said.keys() == set(attempts), f"never made: {set(attempts) - said.keys()}"
    allowed = REFUSED | set(also_refused)
    gained = {name: how["gained"] for name, how in said.items() if "gained" in how}
    unclear = {name: how for name, how in said.items() if "gained" not in how and how.get("refused") not in allowed}
    assert not gained, f"these attempts succeeded: {gained}"
    assert not unclear, f"these attempts got past the guard, or were none: {unclear}"


async def attack(
    sandbox: cloche.Sandbox,
    attempts: Mapping[str, str],
    *,
    setup: str = "",
    after: str = "",
    also_refused: Iterable[str] = (),
    no_gain_in_a_guest: Iterable[str] = (),
    **fields: Any,
) -> cloche.Result:
    """Make the attempts in a box: every one must be made and refused, and the run must end as if there had been none.

    ``no_gain_in_a_guest`` names those that are left out where the box has a kernel of its own: what they reach is of that
    kernel alone (gVisor lets everybody do these things).
    """
    if (await sandbox.posture()).isolation is cloche.Isolation.KERNEL:
        attempts = {name: code for name, code in attempts.items() if name not in set(no_gain_in_a_guest)}
    result = await sandbox.run(cloche.Spec(name="attack.py", content=script(attempts, setup, after), **fields))
    assert_unharmed(result)
    judge(result.stdout, attempts, also_refused)
    return result


def assert_unharmed(result: cloche.Result) -> None:
    """The run exited with 0 and its output is complete: nothing in it was lost, added or cut."""
    assert_exited(result)
    assert result.stdout.endswith(FILLER + ENDING)
    assert result.stderr.endswith(ENDING)
    assert result.stdout_bytes == len(result.stdout_raw)
    assert not result.stdout_truncated
