"""Compiles the supervisor: the static program that is a box's first process (``src/cloche/supervisor/c``).

Hatchling calls :class:`SupervisorHook` when it builds a wheel or an editable install; ``python hatch_build.py`` does the
same by hand. The result is one Linux program per architecture, ``cloche-supervisor-x86_64`` and ``…-aarch64``. The wheel
stays ``py3-none-any``: on macOS and Windows the programs are data that is sent to a container engine.

The compiler is the machine's own where it can link statically for the machine's own architecture. Everything else
(another architecture, no compiler, no static libc, not Linux) is done by ``zig cc``, which comes from PyPI and is asked
for only then. ``CLOCHE_BUILD_ARCHS=all`` builds every architecture with zig, whatever compilers are there: published
wheels are made so, because zig's musl gives the same bytes on every machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
SOURCES = ROOT / "src" / "cloche" / "supervisor" / "c"
BINARIES = ROOT / "src" / "cloche" / "supervisor" / "bin"
ARCHITECTURES = ("x86_64", "aarch64")
ZIG_REQUIREMENT = "ziglang==0.17.1"
"""One version, so that published wheels are reproducible."""

_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_PROBE = """
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
int main(int argc, char **argv) { return printf("%s%d", argv[0], argc) < 0; }
"""
"""Needs a libc to link statically and the kernel's headers, which is what compilers without zig may lack."""

WARNINGS = (
    "-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wcast-qual -Wcast-align -Wformat=2 -Wundef "
    "-Wstrict-prototypes -Wmissing-prototypes -Wold-style-definition -Wpointer-arith -Wwrite-strings -Wvla "
    "-Wnull-dereference -Wimplicit-fallthrough"
).split()
# A released source meets compilers that are newer than it is; their new warnings are no reason to refuse an install.
STRICT = () if (ROOT / "PKG-INFO").exists() else ("-Werror",)
HARDENING = (
    "-fPIE -fstack-protector-strong -fno-strict-aliasing -fno-delete-null-pointer-checks "
    "-Wl,-z,relro,-z,now,-z,noexecstack -Wl,--build-id=none -s"
).split()
# What a compiler may not know yet; each is used where it compiles.
OPTIONAL = (
    "-fstack-clash-protection",
    "-ftrivial-auto-var-init=zero",
    "-fcf-protection=full",
    "-mbranch-protection=standard",
    "-fzero-call-used-regs=used-gpr",
)
_ZIG_FLAGS = {
    # zig's musl has no fortified functions, and -target …-musl is static without being asked.
    "x86_64": ("-fcf-protection=full",),
    "aarch64": ("-mbranch-protection=standard",),
}


class BuildError(Exception):
    """The supervisor cannot be built here; the message says what would help."""


class Compiler(NamedTuple):
    """A command that turns C files into a static program for one architecture.

    No dataclass: those need their module in ``sys.modules``, where hatchling does not put this one.
    """

    command: tuple[str, ...]
    flags: tuple[str, ...]

    def compile(self, sources: Sequence[Path], output: Path) -> None:
        """Write the program ``output``.

        Raises:
            BuildError: the compiler refused; its words are in the message.
        """
        # Names relative to the sources' folder: no path of this machine gets into the program.
        folder = sources[0].parent
        command = [*self.command, "-O2", "-std=gnu11", "-D_GNU_SOURCE", *WARNINGS, *STRICT, *HARDENING]
        command += [*self.flags, "-o", str(output.absolute()), *(source.name for source in sources)]
        with _zig_cache() as env:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        output.chmod(0o755)


def host_architecture() -> str:
    """The machine's architecture, in the kernel's words."""
    machine = platform.machine().lower()
    return _MACHINES.get(machine, machine)


def wanted_architectures(choice: str | None = None) -> tuple[str, ...]:
    """What to build: ``all``, a list with commas, or (None, empty) the machine's own.

    A machine that cannot run boxes itself (macOS, Windows) sends them elsewhere, so it gets all.

    Raises:
        BuildError: an architecture that is not supported.
    """
    if choice == "all":
        return ARCHITECTURES
    if choice:
        names = tuple(choice.split(","))
        if unknown := set(names) - set(ARCHITECTURES):
            raise BuildError(f"CLOCHE_BUILD_ARCHS: {', '.join(sorted(unknown))} is none of {', '.join(ARCHITECTURES)}")
        return names
    host = host_architecture()
    return (host,) if sys.platform == "linux" and host in ARCHITECTURES else ARCHITECTURES


def native_compiler() -> Compiler | None:
    """The machine's C compiler, if it can link statically, with the hardening that it knows."""
    if sys.platform != "linux":
        return None
    # CC may carry arguments, as in "ccache gcc".
    named = shlex.split(os.environ.get("CC", ""))
    for words in ([named] if named else []) + [["cc"], ["gcc"], ["clang"]]:
        command = tuple(words)
        if shutil.which(command[0]) is None:
            continue
        for linking in ("-static-pie", "-static"):
            compiler = Compiler(command, ("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", linking))
            if not _compiles(compiler):
                continue
            for flag in OPTIONAL:
                more = Compiler(command, (*compiler.flags, flag))
                compiler = more if _compiles(more) else compiler
            return compiler
    return None


def zig_compiler(arch: str) -> Compiler:
    """zig's C compiler for ``arch``.

    Raises:
        BuildError: the package ziglang is not installed.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError(
            f"No C compiler here links statically for {arch}, and ziglang is not installed. "
            f"Run: pip install '{ZIG_REQUIREMENT}'"
        )
    command = (sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-musl")
    return Compiler(command, _ZIG_FLAGS[arch])


def needs_zig(archs: Sequence[str], *, everywhere: bool) -> bool:
    """Whether one of ``archs`` can only be built with zig, or ``everywhere`` asks for it."""
    return everywhere or set(archs) != {host_architecture()} or native_compiler() is None


def program(arch: str, target: Path) -> Path:
    """Where the supervisor for ``arch`` is in the folder ``target``."""
    return target / f"cloche-supervisor-{arch}"


def outdated(archs: Sequence[str], target: Path) -> list[str]:
    """Those of ``archs`` whose program is missing in ``target``, or not newer than everything it is made from."""
    newest = max(path.stat().st_mtime for path in [*SOURCES.glob("*.[ch]"), Path(__file__)])
    paths = {arch: program(arch, target) for arch in archs}
    return [arch for arch, path in paths.items() if not path.exists() or path.stat().st_mtime <= newest]


def build(archs: Sequence[str], target: Path, *, everywhere: bool) -> list[Path]:
    """Compile the supervisor for ``archs`` into the folder ``target``; what is newer than all sources is kept.

    Raises:
        BuildError: there is no compiler for an architecture, or it refused.
    """
    sources = sorted(SOURCES.glob("*.c"))
    if not sources:
        raise BuildError(f"no C sources in {SOURCES}")
    target.mkdir(parents=True, exist_ok=True)
    native = None if everywhere else native_compiler()
    for arch in outdated(archs, target):
        path = program(arch, target)
        compiler = native if native is not None and arch == host_architecture() else zig_compiler(arch)
        # Replaced in one step: a run may be starting the old one.
        fresh = path.with_suffix(f".{os.getpid()}.new")
        try:
            compiler.compile(sources, fresh)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    return [program(arch, target) for arch in archs]


def _compiles(compiler: Compiler) -> bool:
    with tempfile.TemporaryDirectory(prefix="cloche-probe-") as folder:
        source = Path(folder) / "probe.c"
        source.write_text(_PROBE)
        try:
            compiler.compile([source], Path(folder) / "probe")
        except BuildError:
            return False
        return True


@contextmanager
def _zig_cache() -> Iterator[dict[str, str]]:
    """The environment for a compiler; zig's caches (80 MB) go where the caller says, else away again."""
    with tempfile.TemporaryDirectory(prefix="cloche-zig-", ignore_cleanup_errors=True) as folder:
        yield {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder, **os.environ}


class SupervisorHook(BuildHookInterface):  # type: ignore[type-arg] # generic over a builder's config that we do not read
    """Adds the compiled supervisor to the wheel; for an editable install, to the source tree."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """zig, when it is needed."""
        choice = os.environ.get("CLOCHE_BUILD_ARCHS")
        return [ZIG_REQUIREMENT] if needs_zig(wanted_architectures(choice), everywhere=choice == "all") else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile. ``version`` is ``standard`` or ``editable``."""
        choice = os.environ.get("CLOCHE_BUILD_ARCHS")
        archs = wanted_architectures(choice)
        if version == "editable":
            build(archs, BINARIES, everywhere=choice == "all")
            return
        self._folder = tempfile.TemporaryDirectory(prefix="cloche-build-")
        for path in build(archs, Path(self._folder.name), everywhere=choice == "all"):
            build_data["force_include"][str(path)] = f"cloche/supervisor/bin/{path.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled, now that the wheel holds it."""
        del build_data, artifact_path
        if version != "editable":
            self._folder.cleanup()


def main() -> int:
    """Build by hand; the arguments are described by ``--help``."""
    parser = argparse.ArgumentParser(description="Compile cloche's supervisor into the source tree.")
    parser.add_argument("--archs", default=os.environ.get("CLOCHE_BUILD_ARCHS"), help="all, or names with commas")
    parser.add_argument("--requires", action="store_true", help="only print what must be installed first, if anything")
    options = parser.parse_args()
    try:
        archs = wanted_architectures(options.archs)
        if options.requires:
            todo = outdated(archs, BINARIES) if importlib.util.find_spec("ziglang") is None else []
            if todo and needs_zig(todo, everywhere=options.archs == "all"):
                print(ZIG_REQUIREMENT)
            return 0
        built = build(archs, BINARIES, everywhere=options.archs == "all")
        # What was built for another architecture before is of older sources, perhaps, and would be tested as if not.
        for arch in set(ARCHITECTURES) - set(archs):
            program(arch, BINARIES).unlink(missing_ok=True)
        for path in built:
            print(f"{path.relative_to(ROOT)}  {path.stat().st_size} bytes")
    except BuildError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
