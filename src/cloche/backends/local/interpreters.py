"""Which program of the host runs a script, and what must be shown of the host for it to work. Blocks: it asks the program.

A program below /usr needs nothing more. One that lives elsewhere (pyenv, a virtual environment, conda, nvm) is asked where its
parts are, and just those are shown. A folder that holds a home is never shown as a whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cloche.backends.local.manifest import Bind
from cloche.errors import InterpreterMissing

ASK_TIMEOUT_S = 20.0
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
_BOX_PATH = ("/usr/local/bin", "/usr/bin", "/bin")
_PYTHON_PARTS = """
import json, os, sys, sysconfig
paths = sysconfig.get_paths()
print(json.dumps({
    "executable": sys.executable,
    "base_executable": os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
    "prefixes": sorted({sys.prefix, sys.base_prefix, sys.base_exec_prefix}),
    "libraries": sorted({paths["stdlib"], paths["platstdlib"]}),
}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A program that can run scripts in a box. ``path`` is None when the box's own PATH leads to it."""

    name: str
    path: str | None
    binds: tuple[Bind, ...] = ()


def find(name: str) -> Interpreter:
    """The program of that bare name on cloche's PATH, else on the system's.

    Raises:
        InterpreterMissing: there is none, or it does not tell where its parts are.
    """
    found = shutil.which(name) or shutil.which(name, path=":".join(_BOX_PATH))
    if found is None:
        raise InterpreterMissing(
            f"{name} is not on this machine's PATH.", hint=f"Install {name}, or pass another interpreter."
        )
    if _is_system(os.path.realpath(found)) and not _in_virtual_environment(found):
        on_path = shutil.which(name, path=":".join(_BOX_PATH))
        if on_path is not None and os.path.realpath(on_path) == os.path.realpath(found):
            return Interpreter(name, None)
        return Interpreter(name, os.path.realpath(found))
    if re.fullmatch(r"(python|pypy)[\d.]*", name):
        return _python(name, found)
    return _program(name, found)


def _is_system(path: str) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in _SYSTEM)


def _in_virtual_environment(program: str) -> bool:
    return (Path(program).parent.parent / "pyvenv.cfg").is_file()


def is_broad(folder: str) -> bool:
    """Whether a folder is too much to show: it holds somebody's home, or is one."""
    home = os.path.realpath(os.path.expanduser("~"))
    real = os.path.realpath(folder)
    homes = {home, "/root", "/home", "/Users", "/tmp", "/var", "/etc", "/opt", "/srv", "/mnt", "/run", "/media"}
    return any(f"{known}/".startswith(f"{real.rstrip('/')}/") for known in homes) or Path(real).parent == Path("/home")


def _ask(command: list[str], name: str) -> list[str]:
    """The lines of a program's answer. In ``/``, where no file of a project tells a version manager otherwise.

    Raises:
        InterpreterMissing: it does not answer.
        OSError: the machine has no room for one more process.
    """
    try:
        answer = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=True, cwd="/"
        )
    except (OSError, subprocess.SubprocessError) as exc:
        if isinstance(exc, OSError) and exc.errno in _NO_ROOM:
            raise
        raise InterpreterMissing(
            f"{name} ({command[0]}) does not say where its parts are: {exc}.",
            hint=f"Run {command[0]} by hand, or put a working {name} first on the PATH.",
        ) from exc
    return answer.stdout.strip().splitlines()


def _python(name: str, found: str) -> Interpreter:
    parts = json.loads(_ask([found, "-I", "-c", _PYTHON_PARTS], name)[-1])
    shown: list[str] = list(parts["libraries"])
    for prefix in parts["prefixes"]:
        if (Path(prefix) / "pyvenv.cfg").is_file() and not is_broad(prefix):
            shown.append(prefix)  # made for this interpreter alone
        elif not is_broad(prefix):
            shown.append(f"{prefix}/lib")  # of a shared prefix such as ~/.local only what programs load
    base = parts["base_executable"]
    shown += [base, *_libraries(base)]
    return Interpreter(name, parts["executable"], _binds(shown, (parts["executable"],)))


_QUESTIONS = {
    "node": ["-p", "process.execPath"],
    "ruby": ["-rrbconfig", "-e", "puts RbConfig.ruby, $LOAD_PATH"],
    "perl": ["-e", "print join qq(\n), $^X, @INC"],
    "php": ["-r", "echo PHP_BINARY, PHP_EOL, PHP_EXTENSION_DIR;"],
}
"""How a language's program is asked for its own path, and then for the folders it loads from."""


def _program(name: str, found: str) -> Interpreter:
    """Any other program: itself and its shared libraries, and the folders that it says it loads from.

    A shim (a script that starts the real one) is asked for it, where the language has words for that.
    """
    path, *folders = _ask([found, *_QUESTIONS[name]], name) if name in _QUESTIONS else [found]
    path = os.path.realpath(path)
    loaded = [folder for folder in folders if folder.startswith("/") and not is_broad(folder)]
    return Interpreter(name, path, _binds([path, *loaded, *_libraries(path)], ()))


def _libraries(program: str) -> list[str]:
    """Shared libraries outside the system's folders, as the loader finds them."""
    try:
        answer = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False)  # noqa: S603, S607
    except OSError:
        return []
    paths = re.findall(r"=> (/\S+) \(0x", answer.stdout)
    return [path for path in paths if not _is_system(os.path.realpath(path))]


def _names(path: str) -> Iterator[str]:
    """The path, where each link on its way leads, and where it ends."""
    for _ in range(40):  # as many as the kernel follows (Linux, fs/namei.c MAXSYMLINKS)
        yield path
        if not os.path.islink(path):
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    yield os.path.realpath(path)


def _binds(paths: list[str], links: tuple[str, ...]) -> tuple[Bind, ...]:
    """Each path under its own name, and where a link on the way leads; what lies inside another one is left out."""
    wanted = {name for path in (*paths, *links) for name in _names(path)}
    kept: list[str] = []
    for path in sorted(wanted):
        if not _is_system(path) and os.path.exists(path) and not any(path.startswith(k + "/") for k in kept):
            kept.append(path)
    return tuple(Bind(os.path.realpath(path), path) for path in kept)
