"""The service's image, equal to what ``deploy/images/cloche/Dockerfile`` gives where that needs a registry.

Its configuration is read from that file, its packages are those that are pinned beside it, and cloche is the wheel of this
checkout. Other is Python: Debian's own.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

from tests.engines.docker import host
from tests.engines.service import dockerfile, layers
from tests.engines.service.archive import Layered
from tests.engines.service.layers import Layer

ROOT = Path(__file__).parents[3]
HERE = ROOT / "deploy" / "images" / "cloche"
PLACE = "opt/cloche"
"""Where the Dockerfile has its environment, without the first slash."""
NAME = "cloche-test/service:1"
BUILT_FROM = ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE")
NOT_IN_WHEELS = {"__pycache__", "bin"}


def _sources() -> str:
    """A hash of all that a wheel is built from."""
    whole = hashlib.sha256()
    for path in [*sorted(ROOT.joinpath("src").rglob("*")), *(ROOT / name for name in BUILT_FROM)]:
        short = path.relative_to(ROOT)
        if path.is_file() and not NOT_IN_WHEELS & set(short.parts):
            content = path.read_bytes()
            whole.update(f"{short} {len(content)}\n".encode() + content)
    return whole.hexdigest()


def build_wheel(folder: Path) -> Path:
    """A wheel of this checkout, in a folder that is empty or has none."""
    # Without an environment of its own for the build: that would be asked of the registry for every change.
    host.run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def _make_wheel(tree: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        layers.install(tree / PLACE, PLACE, str(build_wheel(Path(folder))))


def service() -> Layered:
    """The image, of the sources as they are now."""
    packages = layers.environment("cloche-test/service-packages:1", PLACE, HERE / "requirements.txt")
    wheel = Layer("cloche-test/service-wheel:1", (), _make_wheel, _sources())
    return Layered(NAME, (layers.BASE, packages, wheel), dockerfile.stages(HERE / "Dockerfile")[-1].config())
