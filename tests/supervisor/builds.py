"""The builds of the supervisor that are tested, and the small C programs of this folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloche.supervisor.binary import supervisor_path
from cloche.testing.conformance import must_work

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "cloche" / "supervisor" / "c"
HERE = Path(__file__).parent
CFLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
REPORTS_IN_BOX = "/sanitizer"
QEMU = ("qemu-aarch64-static", "qemu-aarch64")


@dataclass(frozen=True, slots=True)
class Build:
    """One binary. A sanitized one writes its reports into ``reports``."""

    name: str
    path: Path
    reports: Path | None = None

    def environment(self, reports: str) -> dict[str, str]:
        """What a sanitized binary must be told, when it sees its folder of reports under that name."""
        if self.reports is None:
            return {}
        # LeakSanitizer stops its process with ptrace, which a process that is not dumpable refuses.
        options = (
            f"log_path={reports}/report:exitcode=99:detect_leaks=0:detect_stack_use_after_return=1:print_stacktrace=1"
        )
        return {"ASAN_OPTIONS": options, "UBSAN_OPTIONS": options}

    def reported(self) -> str:
        """What the sanitizers found since the last call."""
        found = []
        for path in sorted(self.reports.iterdir()) if self.reports else ():
            found.append(path.read_text(errors="replace"))
            path.unlink()
        return "\n".join(found)


def absent(reason: str) -> None:
    """Skip, or fail where the local mode must work: an absent tool hides what it would have found."""
    if must_work("local"):
        pytest.fail(f"CLOCHE_MUST_WORK names local, but {reason}", pytrace=False)
    pytest.skip(reason)


def shipped(folder: Path) -> Build:
    """The one that runs use, copied to where any uid can reach it."""
    return Build("shipped", Path(shutil.copy(supervisor_path(), folder / "cloche-supervisor")))


def sanitized(folder: Path, sources: Path = SOURCES) -> Build:
    """A build with AddressSanitizer and UndefinedBehaviorSanitizer."""
    reports = folder / "reports"
    reports.mkdir()
    reports.chmod(0o1777)
    program = folder / "cloche-supervisor"
    for compiler in ("clang", "gcc"):
        if shutil.which(compiler) and _compiled([compiler, *CFLAGS, *SANITIZERS], sorted(sources.glob("*.c")), program):
            return Build("sanitized", program, reports)
    absent("no compiler here has AddressSanitizer (Debian: clang, or gcc with libasan)")
    raise AssertionError


def bundle_driver(folder: Path) -> Path:
    """Prints what the C bundle reader makes of its input; see bundle_driver.c."""
    if shutil.which("cc") is None:
        absent("there is no C compiler")
    # The rest of the supervisor is linked too: the reader uses its number parser.
    program = folder / "bundle-driver"
    sources = [*sorted(SOURCES.glob("*.c")), HERE / "bundle_driver.c"]
    compile_c(["cc", *CFLAGS, "-O1", "-Dmain=supervisor_main", f"-I{SOURCES}"], sources, program)
    return program


def filter_dump(folder: Path, arch: str) -> list[str]:
    """The command that prints the system call filter as it is for an architecture; see filter_dump.c."""
    program = folder / f"filter-dump-{arch}"
    flags = [*CFLAGS, f"-I{SOURCES}"]
    if arch == os.uname().machine and shutil.which("cc"):
        compile_c(["cc", *flags], [HERE / "filter_dump.c"], program)
        return [str(program)]
    compile_c([*zig(arch), *flags], [HERE / "filter_dump.c"], program)
    return [str(program)] if arch == os.uname().machine else [qemu(), str(program)]


def aarch64(folder: Path) -> Build:
    """The supervisor for aarch64, compiled as the published one."""
    zig("aarch64")
    # With the hook that makes wheels; it needs hatchling, which only developers have.
    import hatch_build

    return Build("aarch64", hatch_build.build(["aarch64"], folder, everywhere=True)[0])


def zig(arch: str) -> list[str]:
    """The command of zig's C compiler."""
    if importlib.util.find_spec("ziglang") is None:
        absent("zig is not installed (pip install ziglang)")
    # Without a cache every compilation builds the C library again, which takes half a minute.
    os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(ROOT / "build" / "zig-cache"))
    os.environ.setdefault("ZIG_LOCAL_CACHE_DIR", os.environ["ZIG_GLOBAL_CACHE_DIR"])
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-musl"]


def qemu() -> str:
    """The path of the emulator for programs of aarch64."""
    for name in QEMU:
        if found := shutil.which(name):
            return found
    absent("there is no qemu for programs of aarch64 (Debian: qemu-user-static)")
    raise AssertionError


def compile_c(command: Sequence[str], sources: Sequence[Path], program: Path) -> None:
    """Compile; the compiler's words are the failure."""
    done = subprocess.run([*command, "-o", program, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _compiled(command: Sequence[str], sources: Sequence[Path], program: Path) -> bool:
    probe = subprocess.run(
        [*command, "-o", program, "-xc", "-"],
        input="int main(void) { return 0; }",
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode == 0:
        compile_c(command, sources, program)
    return probe.returncode == 0
