"""The second disk: the project's wheel and its tests, as they stand in the checkout now, and what is to be done with them."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.engines.vm.image import ROOT, disk_from, run

SPARE_BYTES = 2**25


def make(disk: Path, plan: Mapping[str, object]) -> None:
    """Build the wheel and lay it with the tests and the plan on a disk."""
    with tempfile.TemporaryDirectory(prefix="cloche-vm-") as temporary:
        tree = Path(temporary, "tree")
        skip = shutil.ignore_patterns("__pycache__")
        for name in ("tests", "examples"):
            shutil.copytree(ROOT / name, tree / name, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", tree)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tree / "wheel")]
        run(*pip, str(ROOT))
        tree.joinpath("plan.json").write_text(json.dumps(plan))
        disk_from(tree, disk, SPARE_BYTES)
