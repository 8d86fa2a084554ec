"""What a request brings: a spec, and maybe a workspace, unpacked into a folder that goes with the run.

All folders lie in one of the process's own. It is locked as long as the process lives, so that the next service on the machine
can remove what a killed one left.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from anyio import CancelScope, CapacityLimiter, to_thread
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cloche._kit.archive import ArchiveError, ArchiveTooLarge, unpack
from cloche.errors import ClocheError, InvalidSettings, InvalidSpec, TooManyRuns, WorkspaceTooLarge
from cloche.runtime.workspace import MAX_ENTRIES
from cloche.server import ceilings
from cloche.server.problems import HttpProblem
from cloche.settings import Settings
from cloche.spec import MAX_ARGS, MAX_ENV, MAX_STRINGS_BYTES, Spec

PREFIX = "cloche-serve-"
LOCK = "lock"
_SLACK = 2**20
"""For the form around a spec."""
_TRIES = 10
_AT_A_TIME = 4
"""Requests of the largest size that are held at a time; or many more that are smaller."""
_UNPACKED_AT_A_TIME = 4
"""More would keep the loop from its turn, and fill the disk before it is counted."""
_MAX_PARTS = 8
_QUICK_BYTES = 64 * 1024
"""A spec of this size is read in less time than handing it to a thread takes."""
_PARTS = frozenset({"spec", "workspace", "stdin"})


class Room:
    """What requests may hold at a time, in bytes: those that are read, and those whose runs wait or go on."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size

    def take(self, size: int) -> None:
        """Raises: TooManyRuns: there is not so much left."""
        if size > self._left:
            raise TooManyRuns(f"What runs that wait have brought takes all the room there is, {self._size} bytes.")
        self._left -= size

    def give_back(self, size: int) -> None:
        """What was taken."""
        self._left += size


class Job:
    """A spec and the folder that it needs. An async context; leaving it removes the folder, and gives its room back."""

    def __init__(self, spec: Spec, room: Room, folder: Path | None = None, folder_bytes: int = 0) -> None:
        self.spec = spec
        self._room = room
        self._folder = folder
        self._held = folder_bytes

    def hold(self, size: int) -> None:
        """Take over so much of the room, which was taken already."""
        self._held += size

    def retold(self, error: ClocheError) -> ClocheError:
        """The same error without the folder's path, which is of no use to the caller and none of his business."""
        if self._folder is None:
            return error
        message, hint = (text.replace(str(self._folder), "workspace") for text in (error.message, error.hint))
        return type(error)(message, hint=hint, retryable=error.retryable)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Remove the folder, and give the room back."""
        held, self._held = self._held, 0
        self._room.give_back(held)
        if self._folder is not None:
            with CancelScope(shield=True):
                await to_thread.run_sync(_remove, self._folder)


class Uploads:
    """Reads requests into jobs. ``settings`` has the bounds, ``mode`` is the one in use."""

    def __init__(self, settings: Settings, mode: str, place: Path) -> None:
        self._settings = settings
        self._workspace_bytes = settings.workspace_bytes(mode)
        # A character of JSON may take six bytes (\u0001), base64 four for three.
        self._json_bytes = 6 * (settings.max_script_bytes + MAX_STRINGS_BYTES) + self._workspace_bytes * 4 // 3 + _SLACK
        # In a text, or between values, of which each takes tens of bytes of memory and two of JSON.
        self._commas = settings.max_script_bytes + MAX_STRINGS_BYTES + MAX_ENV + MAX_ARGS + _SLACK
        self._place = place
        self._unpackers = CapacityLimiter(_UNPACKED_AT_A_TIME)
        self.room = Room(_AT_A_TIME * self.max_body_bytes)

    @property
    def max_body_bytes(self) -> int:
        """The largest request that is read. An archive is at most as large as what may be in it, and its headers."""
        return self._json_bytes + 2 * self._workspace_bytes + MAX_ENTRIES * 512

    async def read(self, request: Request) -> Job:
        """The job that a request describes. It takes over what room the request has.

        Raises:
            InvalidSpec: it describes none, or one that asks for too much.
            WorkspaceTooLarge: the workspace is larger than it may be.
            HttpProblem: its body is of no kind that is known.
            TooManyRuns: there is no room for it.
        """
        job = await self._read(request)
        try:
            ceilings.check(job.spec, self._settings)
        except InvalidSpec:
            await job.aclose()
            raise
        job.hold(request.state.body.hand_over())
        return job

    async def _read(self, request: Request) -> Job:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return Job(await self._spec(await request.body()), self.room)
        if kind == "multipart/form-data":
            return await self._read_form(request)
        raise HttpProblem(
            415,
            "unsupported-media-type",
            f"A run is described by application/json or multipart/form-data, not by {kind[:80] or 'nothing'}.",
            hint="Set Content-Type.",
        )

    async def _read_form(self, request: Request) -> Job:
        # Some of Python's encodings take quadratic time, and the request may name any of them.
        _, options = parse_options_header(request.headers["content-type"])
        if options.get(b"charset", b"utf-8").lower() != b"utf-8":
            raise HttpProblem(
                415, "unsupported-media-type", "The form has another charset than utf-8.", hint="Leave it out."
            )
        try:
            async with request.form(
                max_files=_MAX_PARTS, max_fields=_MAX_PARTS, max_part_size=self._json_bytes
            ) as form:
                return await self._from_form(form)
        except HTTPException as exc:  # what starlette makes of its own MultiPartException
            raise InvalidSpec(f"The form cannot be read: {exc.detail.rstrip('.')}.") from None

    async def _from_form(self, form: FormData) -> Job:
        if unknown := sorted(set(form) - _PARTS):
            raise InvalidSpec(
                f"The form has a part {unknown[0][:80]!r}.", hint="Allowed are spec, workspace and stdin."
            )
        if len(form.multi_items()) > len(form):
            raise InvalidSpec("The form has a part twice.", hint="Send each part once.")
        if "spec" not in form:
            raise InvalidSpec("The form has no part spec.", hint="Send the spec as JSON in a part of that name.")
        fields: dict[str, Any] = {}
        if "stdin" in form:
            fields["stdin"] = await _bytes(form["stdin"], self._workspace_bytes)
        text = await _bytes(form["spec"], self._json_bytes)
        if "workspace" not in form:
            return Job(await self._spec(text, **fields), self.room)
        workspace = form["workspace"]
        if not isinstance(workspace, UploadFile):
            raise InvalidSpec("The part workspace is no file.", hint="Send a tar or zip file, with a file name.")
        return await self._unpacked(text, workspace.file, fields)

    async def _spec(self, text: bytes, **fields: Any) -> Spec:
        """Raises: InvalidSpec: it is none."""
        if text.count(b",") > self._commas:
            raise InvalidSpec("The spec holds more values than a spec can.")
        if len(text) <= _QUICK_BYTES:
            return _spec(text, **fields)
        return await to_thread.run_sync(lambda: _spec(text, **fields))

    async def _unpacked(self, text: bytes, archive: IO[bytes], fields: Mapping[str, Any]) -> Job:
        folder = Path(await to_thread.run_sync(lambda: tempfile.mkdtemp(dir=self._place)))
        try:
            spec = await self._spec(text, workspace=folder, **fields)
            size = await to_thread.run_sync(self._unpack, archive, folder, limiter=self._unpackers)
            self.room.take(size)
        except BaseException:
            with CancelScope(shield=True):
                await to_thread.run_sync(_remove, folder)
            raise
        return Job(spec, self.room, folder, size)

    def _unpack(self, archive: IO[bytes], folder: Path) -> int:
        try:
            return unpack(archive, folder, size=self._workspace_bytes, entries=MAX_ENTRIES)
        except ArchiveTooLarge as exc:
            raise WorkspaceTooLarge(
                f"{str(exc).rstrip('.')}: more than {self._workspace_bytes} bytes or {MAX_ENTRIES} entries."
            ) from None
        except ArchiveError as exc:
            raise InvalidSpec(
                str(exc), hint="Send a tar (plain, gzip, bzip2, xz) or zip file of the folder's content."
            ) from None


@asynccontextmanager
async def open_place() -> AsyncIterator[Path]:
    """:func:`place_for_uploads` for a loop: a dead service may have left much."""
    with ExitStack() as held:
        place = await to_thread.run_sync(held.enter_context, place_for_uploads())
        ends = held.pop_all()
    try:
        yield place
    finally:
        with CancelScope(shield=True):
            await to_thread.run_sync(ends.close)


@contextmanager
def place_for_uploads() -> Iterator[Path]:
    """A folder of this process's own; those of dead ones are removed.

    Raises:
        InvalidSettings: there is no place for it.
    """
    with ExitStack() as held:
        try:
            above = Path(tempfile.gettempdir())
            for name in os.listdir(above):
                if name.startswith(PREFIX):
                    with suppress(OSError):
                        _remove_if_dead(above / name)
            place = _new_place(held)
        except OSError as exc:
            raise InvalidSettings(
                f"There is no place for what requests bring: {exc.strerror}.",
                hint="Set TMPDIR to a folder that the service can write.",
            ) from None
        held.callback(_remove, place)
        yield place


def _new_place(held: ExitStack) -> Path:
    """A new folder, locked as long as ``held`` is. Raises: OSError: there is none."""
    for _ in range(_TRIES):
        place = Path(tempfile.mkdtemp(prefix=PREFIX))
        # Until it is locked, another service that begins at this moment may take it for a dead one's.
        with suppress(FileNotFoundError, BlockingIOError), ExitStack() as tried:
            tried.enter_context(_locked(place / LOCK))
            if (place / LOCK).exists():
                held.push(tried.pop_all())
                return place
    raise OSError(errno.EBUSY, "other services remove it")


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
    """All of it was made here, and can be removed; what cannot all the same is the next service's."""
    shutil.rmtree(folder, ignore_errors=True)


def _spec(text: bytes, **fields: Any) -> Spec:
    """The spec in a text, with fields that came another way.

    Raises:
        InvalidSpec: it is none, or names what lies on the service's own machine.
    """
    try:
        given = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
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


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ: of two of one name, who is in between may have looked at the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON's")


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
