"""A run → the request that asks a service for it. Pure."""

from __future__ import annotations

import base64
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from cloche._kit.http import Pieces
from cloche.isolation import Isolation
from cloche.runtime.delivery import WORKSPACE
from cloche.settings import Settings
from cloche.spec import Spec
from cloche.supervisor.bundle import Bundle, Entry, File, Folder, Link

MAX_INLINE_STDIN_BYTES = 256 * 1024
"""More is sent as it is, not as base64 inside of JSON."""
_SETTABLE = ("timeout", "memory", "cpus", "pids", "image")
"""Fields of a spec that a setting of the same name stands in for."""
_END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


def given(spec: Spec, settings: Settings, name: str) -> Any:
    """What the caller says: in the spec, else by a setting that is set, else nothing, and the service's own holds."""
    value = getattr(spec, name)
    if value is None and name in settings.model_fields_set:
        return getattr(settings, name)
    return value


def floor(spec: Spec, settings: Settings) -> Isolation:
    """The least isolation. It is always told: whoever asks here must not get less because the service is content with less."""
    return spec.min_isolation or settings.min_isolation


def body(spec: Spec, settings: Settings, bundle: Bundle, boundary: str) -> dict[str, Any] | Pieces:
    """What is sent: JSON where it is small and text, else a form with the files in a tar. ``bundle`` has what ``spec`` names,
    read and checked.
    """
    fields = _fields(spec, settings)
    path = bundle.argv[1].removeprefix(f"{WORKSPACE}/")
    stdin = spec.stdin
    if spec.workspace is None and len(stdin or b"") <= MAX_INLINE_STDIN_BYTES:
        (script,) = [entry for entry in bundle.entries if isinstance(entry, File)]
        try:
            content = script.data.decode()
        except UnicodeDecodeError:
            pass  # JSON cannot carry it
        else:
            inline = {} if stdin is None else {"stdin": base64.b64encode(stdin).decode("ascii")}
            return {**fields, "name": path, "content": content, **inline}
    parts = [
        ("spec", "application/json", [json.dumps({**fields, "script": path}).encode()]),
        ("workspace", "application/x-tar", list(tar(bundle.entries))),
    ]
    if stdin is not None:
        parts.append(("stdin", "application/octet-stream", [stdin]))
    return form(parts, boundary)


def _fields(spec: Spec, settings: Settings) -> dict[str, Any]:
    """The fields of the spec but for script, stdin and workspace."""
    fields = {name: given(spec, settings, name) for name in _SETTABLE}
    fields["interpreter"] = spec.interpreter
    fields["args"] = list(spec.args) or None
    fields["env"] = spec.env or None
    fields["network"] = str(spec.network)
    fields["min_isolation"] = str(floor(spec, settings))
    return {name: value for name, value in fields.items() if value is not None}


def form(parts: Sequence[tuple[str, str, Sequence[bytes]]], boundary: str) -> Pieces:
    """A form of files (RFC 7578): each with its name, its type and its content in pieces."""
    pieces: list[bytes] = []
    for name, kind, content in parts:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\nContent-Type: {kind}\r\n\r\n'
        pieces += [head.encode("ascii"), *content, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode("ascii"))
    return Pieces(f"multipart/form-data; boundary={boundary}", pieces)


def tar(entries: Sequence[Entry]) -> Iterator[bytes]:
    """A tar of a workspace, in pieces; files are the very bytes of their entries."""
    for entry in entries:
        info = tarfile.TarInfo(entry.path)
        match entry:
            case Folder():
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            case Link():
                info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, entry.target
            case File():
                info.size, info.mode = len(entry.data), 0o755 if entry.executable else 0o644
        # GNU's form takes names of any length and of any bytes.
        yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        if isinstance(entry, File) and entry.data:
            yield entry.data
            yield bytes(-len(entry.data) % tarfile.BLOCKSIZE)
    yield _END_OF_TAR
