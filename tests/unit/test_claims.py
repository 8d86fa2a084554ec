"""When the lock of a dead owner may go."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fcntl", reason="such locks need Unix")

from cloche.backends import owners
from cloche.backends.claims import Keeper

pytestmark = pytest.mark.anyio

HERE = f"test engine {secrets.token_hex(4)}"
ELSEWHERE = f"test engine {secrets.token_hex(4)}"


@pytest.fixture
def dead() -> Iterator[Path]:
    """The file of an owner that is dead."""
    name = f"o{secrets.token_hex(8)}"
    owners.Owner(owners.state_folder(), name).close(left=True)
    path = owners.state_folder() / f"{name}.owner"
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("lines", "stays"),
    [
        ([HERE], True),
        ([HERE, 5.0], True),
        ([HERE, owners.FINISH_S - 20], True),
        ([HERE, owners.FINISH_S + 5], False),
        ([HERE, "found dead at noon"], True),
        ([ELSEWHERE, owners.FINISH_S + 5], True),
        ([HERE, ELSEWHERE, owners.FINISH_S + 5], True),
        ([HERE, "/sys/fs/cgroup", owners.FINISH_S + 5], True),
    ],
    ids=["new", "just-found", "soon", "later", "unreadable", "elsewhere", "both", "cgroups"],
)
async def test_forgotten(dead: Path, lines: list[str | float], *, stays: bool) -> None:
    """A dead owner's file goes when his engine has had the time to finish, unless he has things elsewhere too.

    A number among the lines: so many seconds ago a sweep found him dead.
    """
    found = [f"found dead at {time.time() - line:.0f}" if isinstance(line, float) else line for line in lines]
    dead.write_text("".join(f"{line}\n" for line in found))
    await Keeper("oself", HERE).forget_the_dead()
    assert dead.exists() == stays
