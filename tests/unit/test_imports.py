"""The package imports quickly, and where the Linux-only modules are not."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import cloche

SOURCES = Path(cloche.__file__).parent


def python(source: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ELSEWHERE = """
    import asyncio, importlib.util, os, pathlib, sys

    # What the machinery below loads for itself before the doors close: on another system it would load its own.
    import anyio, anyio._backends._asyncio, anyio.to_thread, click, importlib.metadata, logging, sysconfig, zoneinfo
    from pydantic import BaseModel, TypeAdapter
    sysconfig.get_config_vars()

    class Absent:
        names = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "spwd", "crypt"}
        def find_spec(self, name, path=None, target=None):
            if name in self.names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in Absent.names:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Absent())
    # What os has on Linux and not on Windows (and, some of it, not on macOS).
    for name in ("fork", "geteuid", "getuid", "getegid", "getgid", "setsid", "mkfifo", "memfd_create", "pidfd_open",
                 "sched_getaffinity", "getresuid", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY",
                 "O_PATH", "O_TMPFILE", "killpg", "chown", "getxattr", "WNOHANG", "pipe2", "posix_spawn"):
        if hasattr(os, name):
            delattr(os, name)
    os.supports_dir_fd = set()
    os.supports_fd = set()
    sys.platform = PLATFORM
"""


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_every_public_name_elsewhere(platform: str) -> None:
    """Where the Linux-only modules are blocked, every public name can be had, and the command line starts."""
    names = python(
        ELSEWHERE.replace("PLATFORM", repr(platform))
        + """
    import cloche
    for name in cloche.__all__:
        getattr(cloche, name)
    import cloche.wire, cloche.testing.fake
    from cloche.cli import main
    assert main(["--version"]) == 0
    """
    )
    assert names.startswith("cloche ")


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_local_elsewhere(platform: str) -> None:
    """Where there is no Linux, local says that it needs it, and names the modes that work there."""
    said = python(
        ELSEWHERE.replace("PLATFORM", repr(platform))
        + """
    import cloche
    try:
        cloche.run(content="print(1)", name="a.py")
    except cloche.BackendUnavailable as error:
        print(error.message, error.hint)
    """
    )
    assert "Linux" in said
    assert "docker" in said


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_runtime_elsewhere(platform: str, tmp_path: Path) -> None:
    """The runtime itself delivers a folder and writes artifacts where there are no descriptors of folders."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "data").write_text("x")
    (tmp_path / "in" / "main.py").write_text("")
    said = python(
        ELSEWHERE.replace("PLATFORM", repr(platform))
        + f"""
    import anyio, cloche
    from cloche.cli.save import save
    from cloche.supervisor.frames import File, FileData
    from cloche.testing.fake import FakeBackend, Play, begin, end
    async def main():
        engine = FakeBackend([Play([*begin(), File("d/a.txt", 1, False), FileData(b"x"), end()])])
        async with cloche.Sandbox(backends={{"local": engine.factory}}) as sandbox:
            result = await sandbox.run(cloche.Spec(script="main.py", workspace={str(tmp_path / "in")!r}))
        print([entry.path for entry in engine.boxes[0].bundle.entries])
        save(pathlib.Path({str(tmp_path / "out")!r}), result.artifacts)
    anyio.run(main)
    """
    )
    assert said == "['main.py', 'sub', 'sub/data']\n"
    assert (tmp_path / "out" / "d" / "a.txt").read_text() == "x"


def test_import_is_quick() -> None:
    """`import cloche` loads neither pydantic nor an event loop; names load what they need."""
    loaded = python("""
        import sys
        import cloche
        print(*[name for name in ("pydantic", "anyio", "asyncio", "click", "rich", "logging") if name in sys.modules])
        assert cloche.Spec.__name__ == "Spec"
        assert "pydantic" in sys.modules
    """)
    assert loaded == "\n"


def test_a_run_loads_nothing_it_does_not_need() -> None:
    """The library needs neither the command line's packages nor the test engine."""
    loaded = python("""
        import sys
        import cloche
        cloche.Sandbox, cloche.run, cloche.Result, cloche.Settings
        print(*[name for name in ("click", "rich", "cloche.cli", "cloche.testing", "pytest") if name in sys.modules])
    """)
    assert loaded == "\n"


def test_public_names() -> None:
    """Every public name exists, is listed, and is found where __init__ says; others are an AttributeError."""
    assert set(cloche.__all__) <= set(dir(cloche))
    for name in cloche.__all__:
        assert getattr(cloche, name) is not None
    assert {name for name in cloche.__all__ if name != "__version__"} == set(cloche._MODULE)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cloche.nonsense


def test_typed() -> None:
    """The package says that it is typed."""
    assert (SOURCES / "py.typed").is_file()
