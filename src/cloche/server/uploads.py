"""What a request brings: a spec, and maybe a workspace, unpacked into a folder that goes with the run.

All folders lie in one of the process's own. It is locked as long as the process lives, so that the next service on the machine
can remove what a killed one left.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from anyio import CancelScope, to_thread
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from cloche._kit.archive import ArchiveError, ArchiveTooLarge, unpack
from cloche.errors import InvalidSpec, WorkspaceTooLarge
from cloche.runtime.workspace import MAX_ENTRIES
from cloche.server.problems import HttpProblem
from cloche.settings import Settings
from cloche.spec import MAX_STRINGS_BYTES, Spec

PREFIX = "cloche-serve-"
LOCK = "lock"
_SLACK = 2**20
"""For the form around a spec."""
_MAX_PARTS = 8
_PARTS = frozenset({"spec", "workspace", "stdin"})


class Job:
    """A spec and the folder that it needs. An async context; leaving it removes the folder."""

    def __init__(self, spec: Spec, folder: Path | None = None) -> None:
        self.spec = spec
        self._folder = folder

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            with CancelScope(shield=True):
                await to_thread.run_sync(_remove, self._folder)


class Uploads:
    """Reads requests into jobs. ``settings`` has the bounds, ``mode`` is the one in use."""

    def __init__(self, settings: Settings, mode: str, place: Path) -> None:
        self._workspace_bytes = settings.workspace_bytes(mode)
        # A character of JSON may take six bytes (\u0001), base64 four for three.
        self._json_bytes = 6 * (settings.max_script_bytes + MAX_STRINGS_BYTES) + self._workspace_bytes * 4 // 3 + _SLACK
        self._place = place

    @property
    def max_body_bytes(self) -> int:
        """The largest request that is read. An archive is at most as large as what may be in it, and its headers."""
        return self._json_bytes + 2 * self._workspace_bytes + MAX_ENTRIES * 512

    async def read(self, request: Request) -> Job:
        """The job that a request describes.

        Raises:
            InvalidSpec: it describes none. WorkspaceTooLarge: the workspace is larger than it may be.
            HttpProblem: its body is of no kind that is known.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return Job(_spec(await request.body()))
        if kind == "multipart/form-data":
            return await self._read_form(request)
        raise HttpProblem(
            415,
            "unsupported-media-type",
            f"A run is described by application/json or multipart/form-data, not by {kind[:80] or 'nothing'}.",
            hint="Set Content-Type.",
        )

    async def _read_form(self, request: Request) -> Job:
        try:
            async with request.form(
                max_files=_MAX_PARTS, max_fields=_MAX_PARTS, max_part_size=self._json_bytes
            ) as form:
                return await self._from_form(form)
        except MultiPartException as exc:
            raise InvalidSpec(f"The form cannot be read: {exc.message}.") from None

    async def _from_form(self, form: FormData) -> Job:
        if unknown := sorted(set(form) - _PARTS):
            raise InvalidSpec(
                f"The form has a part {unknown[0][:80]!r}.", hint="Allowed are spec, workspace and stdin."
            )
        if "spec" not in form:
            raise InvalidSpec("The form has no part spec.", hint="Send the spec as JSON in a part of that name.")
        fields: dict[str, Any] = {}
        if "stdin" in form:
            fields["stdin"] = await _bytes(form["stdin"], self._workspace_bytes)
        text = await _bytes(form["spec"], self._json_bytes)
        if "workspace" not in form:
            return Job(_spec(text, **fields))
        workspace = form["workspace"]
        if not isinstance(workspace, UploadFile):
            raise InvalidSpec("The part workspace is no file.", hint="Send a tar or zip file, with a file name.")
        return await self._unpacked(text, workspace.file, fields)

    async def _unpacked(self, text: bytes, archive: IO[bytes], fields: Mapping[str, Any]) -> Job:
        folder = Path(await to_thread.run_sync(lambda: tempfile.mkdtemp(dir=self._place)))
        try:
            spec = _spec(text, workspace=folder, **fields)
            await to_thread.run_sync(self._unpack, archive, folder)
        except BaseException:
            await Job(Spec(content="", name="x"), folder).aclose()
            raise
        return Job(spec, folder)

    def _unpack(self, archive: IO[bytes], folder: Path) -> None:
        try:
            unpack(archive, folder, size=self._workspace_bytes, entries=MAX_ENTRIES)
        except ArchiveTooLarge as exc:
            raise WorkspaceTooLarge(
                f"{str(exc).rstrip('.')}: more than {self._workspace_bytes} bytes or {MAX_ENTRIES} entries."
            ) from None
        except ArchiveError as exc:
            raise InvalidSpec(
                str(exc), hint="Send a tar (plain, gzip, bzip2, xz) or zip file of the folder's content."
            ) from None


@contextmanager
def place_for_uploads() -> Iterator[Path]:
    """A folder of this process's own; those of dead ones are removed."""
    above = Path(tempfile.gettempdir())
    for name in os.listdir(above):
        if name.startswith(PREFIX):
            with suppress(OSError):
                _remove_if_dead(above / name)
    place = Path(tempfile.mkdtemp(prefix=PREFIX))
    with _locked(place / LOCK):
        try:
            yield place
        finally:
            _remove(place)


def _remove_if_dead(place: Path) -> None:
    """Raises: OSError: its process lives, or it is somebody else's."""
    if place.is_symlink() or place.stat().st_uid != os.geteuid():
        return
    with _locked(place / LOCK):
        _remove(place)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises: OSError: somebody holds it."""
    import fcntl

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _remove(folder: Path) -> None:
    def mend(call: Callable[..., Any], path: str, _: object) -> None:
        with suppress(OSError):
            os.chmod(os.path.dirname(path), 0o700)
            call(path)

    shutil.rmtree(folder, onerror=mend)


def _spec(text: bytes, **fields: Any) -> Spec:
    """The spec in a text, with fields that came another way.

    Raises:
        InvalidSpec: it is none, or names what lies on the service's own machine.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidSpec(f"The spec is not JSON: {exc}.") from None
    if not isinstance(given, dict):
        raise InvalidSpec("The spec is no JSON object.")
    if "workspace" in given:
        raise InvalidSpec(
            "workspace cannot be a path here.", hint="Send the folder as a tar or zip file, in a part named workspace."
        )
    if "stdin" in given and "stdin" in fields:
        raise InvalidSpec("stdin came twice, in the spec and as a part.", hint="Send it one way.")
    if given.get("script") is not None and "workspace" not in fields:
        raise InvalidSpec(
            "A script is a path inside a workspace here, and there is none.",
            hint="Send the script's text as content with a name, or its folder in a part named workspace.",
        )
    if isinstance(given.get("stdin"), str):
        fields["stdin"] = _base64(given["stdin"])
    return Spec.model_validate({**given, **fields})


def _base64(text: str) -> bytes:
    import base64
    import binascii

    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise InvalidSpec(
            "stdin is not base64.", hint="Encode it, or send it as it is in a part named stdin."
        ) from None


async def _bytes(part: UploadFile | str, bound: int) -> bytes:
    if isinstance(part, str):
        return part.encode("utf-8", "surrogateescape")
    data = await part.read(bound + 1)
    if len(data) > bound:
        raise WorkspaceTooLarge(f"Workspace and stdin together are larger than {bound} bytes.")
    return data
