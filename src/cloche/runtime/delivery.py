"""Spec → bundle: which program runs the script, with what argv and environment, and what is delivered beside it.

Blocks where it reads the host's files.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from cloche.errors import InvalidSpec, ScriptNotFound, ScriptTooLarge
from cloche.runtime.workspace import Budget, open_file, read_all, read_workspace, resolve_inside
from cloche.spec import Limits, Spec, encode
from cloche.supervisor.bundle import Bundle, Entry, File, Folder, Link

WORKSPACE = "/workspace"
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}

_BY_SUFFIX = {
    ".py": "python3",
    ".sh": "bash",
    ".bash": "bash",
    ".js": "node",
    ".mjs": "node",
    ".rb": "ruby",
    ".pl": "perl",
    ".php": "php",
}
# A bare interpreter: one of the usual folders and a name, or env and a name; no arguments.
_SHEBANG = re.compile(
    rb"#![ \t]*(?:(?:/usr)?/bin/env[ \t]+|(?:/usr(?:/local)?)?/bin/)([A-Za-z0-9][A-Za-z0-9._+-]{0,63})[ \t]*\r?(?:\n|\Z)"
)
_WITH_WORKSPACE = "To run a script of a folder, give the folder as workspace and the script as a path inside it."


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may be delivered, in bytes."""

    script_bytes: int
    workspace_bytes: int
    """Workspace and stdin together."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A bundle, and the program that the box must have for it. None: what is to run comes with it."""

    bundle: Bundle
    interpreter: str | None


def deliver(spec: Spec, limits: Limits, bounds: Bounds) -> Delivery:
    """Read what ``spec`` names and make the bundle.

    Raises:
        ScriptNotFound: the script is missing, is no file, or cannot be read.
        ScriptTooLarge, WorkspaceTooLarge: over the bounds; found out before all is read.
        InvalidSpec: the workspace holds what cannot be delivered.
    """
    budget = Budget(bounds.workspace_bytes)
    budget.take(len(spec.stdin or b""))
    if spec.workspace is None:
        script = _alone(spec, bounds.script_bytes)
        budget.take(len(script.data))
        path, entries = script.path, [*_folders(script.path), script]
    else:
        path, script, entries = _with_workspace(spec, spec.workspace, bounds.script_bytes, budget)
    interpreter = spec.interpreter or choose_interpreter(path, script.data)
    bundle = Bundle(
        argv=[interpreter, f"{WORKSPACE}/{path}", *spec.args],
        env=ENVIRONMENT | spec.env,
        limits=limits,
        entries=entries,
        stdin=spec.stdin,
    )
    return Delivery(bundle, interpreter)


def choose_interpreter(path: str, data: bytes) -> str:
    """The bare name of the program that runs a script: by its suffix, else by its first line, else ``sh``."""
    by_suffix = _BY_SUFFIX.get(os.path.splitext(path)[1].lower())
    if by_suffix is not None:
        return by_suffix
    shebang = _SHEBANG.match(data[:256])
    return shebang[1].decode() if shebang else "sh"


def _alone(spec: Spec, bound: int) -> File:
    if spec.content is not None and spec.name is not None:
        return _inline(spec.content, spec.name, bound)
    path = spec.script or ""
    try:
        fd = open_file(path)
    except OSError as exc:
        if os.path.isdir(path):  # Windows refuses to open a folder
            raise _not_a_file(path, stat.S_IFDIR) from None
        raise _cannot_read(path, exc) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _not_a_file(path, status.st_mode)
        data = read_all(fd, bound) if status.st_size <= bound else None
    except OSError as exc:
        raise _cannot_read(path, exc) from None
    finally:
        os.close(fd)
    if data is None:
        raise _too_large(path, bound)
    return File(os.path.basename(path), data, executable=bool(status.st_mode & 0o111))


def _inline(content: str, name: str, bound: int) -> File:
    try:
        data = encode(content)
    except UnicodeEncodeError:
        raise InvalidSpec("The content is not text that UTF-8 can carry.") from None
    if len(data) > bound:
        raise _too_large(name, bound)
    return File(name, data)


def _with_workspace(spec: Spec, root: Path, bound: int, budget: Budget) -> tuple[str, File, list[Entry]]:
    if spec.content is not None and spec.name is not None:
        inline = _inline(spec.content, spec.name, bound)
        budget.take(len(inline.data))
        return spec.name, inline, _put(inline, read_workspace(root, budget))
    path = spec.script or ""
    _look_ahead(root, path, bound)
    entries = read_workspace(root, budget)
    by_path = {entry.path: entry for entry in entries}
    links = {entry.path: entry.target for entry in entries if isinstance(entry, Link)}
    script = by_path.get(resolve_inside(path, "", links) or "")
    if not isinstance(script, File):
        raise _missing(path, root)
    if len(script.data) > bound:
        raise _too_large(path, bound)
    return path, script, entries


def _look_ahead(root: Path, path: str, bound: int) -> None:
    """Tell a missing or huge script at once, not after the whole workspace was read. What counts is what is read then."""
    try:
        status = os.stat(root / path)
    except (FileNotFoundError, NotADirectoryError):
        if root.is_dir() and not os.path.lexists(root / path):
            raise _missing(path, root) from None
        return
    except OSError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise _not_a_file(path, status.st_mode)
    if status.st_size > bound:
        raise _too_large(path, bound)


def _put(script: File, entries: list[Entry]) -> list[Entry]:
    """The entries with ``script`` among them, in the place of a file of the same name."""
    by_path = {entry.path: entry for entry in entries}
    if isinstance(by_path.get(script.path), Folder):
        raise InvalidSpec(f"The workspace has a folder where the script is to be: {script.path!r}.")
    missing = [folder for folder in _folders(script.path) if folder.path not in by_path]
    for folder in _folders(script.path):
        if not isinstance(by_path.get(folder.path, folder), Folder):
            raise InvalidSpec(f"The script's folder {folder.path!r} is not a folder in the workspace.")
    return [entry for entry in entries if entry.path != script.path] + missing + [script]


def _folders(path: str) -> list[Entry]:
    parts = path.split("/")[:-1]
    return [Folder("/".join(parts[: i + 1])) for i in range(len(parts))]


def _missing(path: str, root: Path) -> ScriptNotFound:
    inside = path.removeprefix(os.fspath(root) + "/")
    hint = f"The path is relative to the workspace: give {inside!r}." if inside != path else None
    return ScriptNotFound(f"There is no script {path!r} in the workspace {os.fspath(root)!r}.", hint=hint)


def _cannot_read(path: str, exc: OSError) -> ScriptNotFound:
    if isinstance(exc, FileNotFoundError):
        return ScriptNotFound(f"There is no script at {path!r}.")
    return ScriptNotFound(
        f"The script {path!r} cannot be read: {exc.strerror}.", hint="Check its path and permissions."
    )


def _not_a_file(path: str, mode: int) -> ScriptNotFound:
    if stat.S_ISDIR(mode):
        return ScriptNotFound(f"{path!r} is a folder, not a script.", hint=_WITH_WORKSPACE)
    return ScriptNotFound(f"{path!r} is not a regular file.", hint="Give a file; text can be given as content.")


def _too_large(path: str, bound: int) -> ScriptTooLarge:
    return ScriptTooLarge(f"The script {path!r} is larger than {bound} bytes.")
