"""The result of a run, and the fold that makes it from the run's events. Pure."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal, NoReturn, assert_never, cast

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator
from typing_extensions import TypedDict

from cloche.errors import ClocheError
from cloche.events import Artifact, Event, Finished, Outcome, Output, Started, Usage
from cloche.isolation import Isolation

PHASES = ("queued", "prepare", "start", "run", "collect", "cleanup", "total")
"""The fields of :class:`Timings`, in the order in which the phases follow."""


class Timings(TypedDict):
    """How long each phase took, in milliseconds; None where the run did not come so far, or it is not known yet."""

    queued: float | None
    """Waiting for a free place."""
    prepare: float | None
    """Reading script and workspace."""
    start: float | None
    """From asking the engine for a box to the first instruction of the script."""
    run: float | None
    """Wall clock of the script."""
    collect: float | None
    """From the script's end to the last frame: collecting artifacts."""
    cleanup: float | None
    """Removing the box. None when the result was handed out before."""
    total: float | None
    """From the call to the result, the cleanup included if it was waited for."""


def timings(**known: float | None) -> Timings:
    """Timings with the phases that are known, in milliseconds; the others are None."""
    return cast("Timings", {name: known.get(name) for name in PHASES})


class ErrorInfo(BaseModel):
    """Why a run could not happen: a :class:`cloche.ClocheError` as a value."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    code: str
    """Stable kebab-case name of the kind of failure."""
    message: str
    hint: str
    """What to do."""
    retryable: bool
    """Whether the same call may succeed later, unchanged."""

    @classmethod
    def of(cls, error: ClocheError) -> ErrorInfo:
        """The error as a value."""
        return cls(code=error.code, message=error.message, hint=error.hint, retryable=error.retryable)


class ArtifactInfo(BaseModel):
    """A file that the script left in /output. ``sha256`` is over the bytes that were delivered."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    path: str
    """Relative to /output, ``/`` between parts. Bytes that are not UTF-8 are lone surrogates (:func:`os.fsencode`)."""
    size: int = Field(ge=0)
    """Of the whole file, in bytes."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    truncated: bool
    """Whether only the file's beginning was delivered."""

    _data: bytes | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, artifact: Artifact) -> ArtifactInfo:
        """The description of a delivered artifact, together with its bytes."""
        info = cls(
            path=artifact.path,
            size=artifact.size,
            sha256=hashlib.sha256(artifact.data).hexdigest(),
            truncated=artifact.truncated,
        )
        info._data = artifact.data
        return info

    @property
    def data(self) -> bytes:
        """The delivered bytes.

        Raises:
            LookupError: this result was read from JSON, which carries no artifact's data.
        """
        if self._data is None:
            raise LookupError(f"the data of {self.path!r} is not here: a result in JSON describes artifacts only")
        return self._data


class Result(BaseModel):
    """How a run ended and what it gave. The names of the fields are a promise, in Python and in JSON alike.

    ``outcome`` is ``failed`` only in JSON, with the reason in ``error``: in Python a run that could not happen raises.
    Where a stream is truncated its head and its tail were kept, and stand here one after the other.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    outcome: Outcome | Literal["failed"]
    exit_code: int | None = Field(default=None, ge=0, le=255)
    """None unless the outcome is ``exited``."""
    signal: str | None = None
    """A name such as ``SIGKILL`` when the outcome is ``signaled``, else None."""
    stdout: str = ""
    """UTF-8, with U+FFFD for what is not. The exact bytes are ``stdout_raw``."""
    stderr: str = ""
    stdout_bytes: int = Field(default=0, ge=0)
    """How many bytes the script wrote, kept or not."""
    stderr_bytes: int = Field(default=0, ge=0)
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    artifacts: tuple[ArtifactInfo, ...] = ()
    artifacts_skipped: int = Field(default=0, ge=0)
    """Entries of /output that were not collected: links, devices, fifos, files over a bound."""
    mode: str | None = None
    """What ran it. None only when the settings did not tell."""
    isolation: Isolation | None = None
    """The level in force. None when no box was chosen."""
    fallback_from: str | None = None
    """The mode that was asked for, when another one ran it."""
    guarantees: tuple[str, ...] = ()
    """The names of the guarantees in force, such as ``network``. What they mean and how they are known, the posture says."""
    timings_ms: Timings = Field(default_factory=timings)
    usage: Usage = Field(default_factory=Usage)
    error: ErrorInfo | None = None

    _stdout_raw: bytes | None = PrivateAttr(default=None)
    _stderr_raw: bytes | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _consistent(self) -> Result:
        if (self.outcome == "failed") is not (self.error is not None):
            raise ValueError("error goes with the outcome failed, and only with it")
        if (self.outcome == Outcome.EXITED) is not (self.exit_code is not None):
            raise ValueError("exit_code goes with the outcome exited, and only with it")
        if (self.outcome == Outcome.SIGNALED) is not (self.signal is not None):
            raise ValueError("signal goes with the outcome signaled, and only with it")
        return self

    @classmethod
    def failed(cls, run_id: str, error: ClocheError, mode: str | None = None) -> Result:
        """The result of a run that could not happen, for JSON."""
        return Fold(run_id, mode).failed(error)

    @property
    def ok(self) -> bool:
        """Whether the script ran to its end and exited with 0."""
        return self.outcome == Outcome.EXITED and self.exit_code == 0

    @property
    def stdout_raw(self) -> bytes:
        """The exact bytes that were kept of stdout (of a result read from JSON: its text, encoded)."""
        return self.stdout.encode() if self._stdout_raw is None else self._stdout_raw

    @property
    def stderr_raw(self) -> bytes:
        """The exact bytes that were kept of stderr (of a result read from JSON: its text, encoded)."""
        return self.stderr.encode() if self._stderr_raw is None else self._stderr_raw

    def artifact(self, path: str) -> ArtifactInfo:
        """The artifact with this path below /output.

        Raises:
            KeyError: the script left no such file, or it was not collected.
        """
        for artifact in self.artifacts:
            if artifact.path == path:
                return artifact
        names = ", ".join(a.path for a in self.artifacts) or "none"
        raise KeyError(f"no artifact {path!r}; collected: {names}")

    def _with_raw(self, stdout: bytes, stderr: bytes) -> Result:
        self._stdout_raw, self._stderr_raw = stdout, stderr
        return self

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, the same on the command line and over HTTP. Holds text, numbers, lists and dicts only."""
        out = {name: getattr(self, name) for name in type(self).model_fields}
        out["outcome"] = str(self.outcome)
        out["isolation"] = None if self.isolation is None else str(self.isolation)
        out["artifacts"] = [{**a.model_dump(), "path": _valid_text(a.path)} for a in self.artifacts]
        out["guarantees"] = list(self.guarantees)
        out["timings_ms"] = dict(self.timings_ms)
        out["usage"] = {
            "cpu_ms": self.usage.cpu_ms,
            "peak_memory_bytes": self.usage.peak_memory_bytes,
            "oom_kills": self.usage.oom_kills,
        }
        out["error"] = None if self.error is None else self.error.model_dump()
        return out

    def raise_for_error(self) -> Result:
        """This result, unless its outcome is ``failed``.

        Raises:
            ClocheError: the error that this result describes; its class is the one with that code.
        """
        if self.error is not None:
            _raise(self.error)
        return self


class Fold:
    """Makes the result from a run's events, one by one. Keeps what the events carry and nothing else.

    ``run_id``, ``mode``, ``isolation``, ``fallback_from`` and ``guarantees`` hold until a ``Started`` event brings
    them: a run can end before it started.
    """

    def __init__(
        self,
        run_id: str = "",
        mode: str | None = None,
        isolation: Isolation | None = None,
        fallback_from: str | None = None,
        guarantees: tuple[str, ...] = (),
    ) -> None:
        self._identity: dict[str, Any] = {
            "run_id": run_id,
            "mode": mode,
            "isolation": isolation,
            "fallback_from": fallback_from,
            "guarantees": guarantees,
        }
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._artifacts: list[ArtifactInfo] = []
        self._finished: Finished | None = None

    @property
    def ended(self) -> bool:
        """Whether ``Finished`` has come, so that there is a result."""
        return self._finished is not None

    def add(self, event: Event) -> None:
        """Take in the next event.

        Raises:
            ValueError: an event after the last one.
        """
        if self._finished is not None:
            raise ValueError("an event after Finished")
        match event:
            case Started():
                self._identity = {
                    "run_id": event.run_id,
                    "mode": event.mode,
                    "isolation": event.isolation,
                    "fallback_from": event.fallback_from,
                    "guarantees": event.guarantees,
                }
            case Output():
                (self._stdout if event.stream == "stdout" else self._stderr).extend(event.data)
            case Artifact():
                self._artifacts.append(ArtifactInfo.of(event))
            case Finished():
                self._finished = event
            case _:
                assert_never(event)

    def result(self) -> Result:
        """The result, once ``Finished`` has come.

        Raises:
            ValueError: the events so far do not end a run.
        """
        end = self._finished
        if end is None:
            raise ValueError("the run has not finished: no Finished event came")
        return self._make(
            outcome=end.outcome,
            exit_code=end.exit_code,
            signal=end.signal,
            stdout_bytes=end.stdout_bytes,
            stderr_bytes=end.stderr_bytes,
            stdout_truncated=end.stdout_truncated,
            stderr_truncated=end.stderr_truncated,
            artifacts_skipped=end.artifacts_skipped,
            timings_ms=timings(**end.timings_ms),
            usage=end.usage,
        )

    def failed(self, error: ClocheError) -> Result:
        """The result of a run that ended with ``error``. What came before it is kept."""
        return self._make(
            outcome="failed",
            stdout_bytes=len(self._stdout),
            stderr_bytes=len(self._stderr),
            error=ErrorInfo.of(error),
        )

    def _make(self, **fields: Any) -> Result:
        stdout, stderr = bytes(self._stdout), bytes(self._stderr)
        return Result(  # noqa: SLF001 (the fold is the other half of this class)
            **self._identity,
            stdout=stdout.decode("utf-8", "replace"),
            stderr=stderr.decode("utf-8", "replace"),
            artifacts=tuple(self._artifacts),
            **fields,
        )._with_raw(stdout, stderr)


def _valid_text(text: str) -> str:
    """Text that every JSON reader accepts: bytes that are not UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _raise(info: ErrorInfo) -> NoReturn:
    raise error_class(info.code)(info.message, hint=info.hint, retryable=info.retryable)


def error_class(code: str) -> type[ClocheError]:
    """The class of the error with this code; the base class for a code that this version does not know."""
    return _classes().get(code, ClocheError)


def _classes() -> dict[str, type[ClocheError]]:
    found: dict[str, type[ClocheError]] = {}
    open_classes: list[type[ClocheError]] = [ClocheError]
    while open_classes:
        cls = open_classes.pop()
        open_classes += cls.__subclasses__()
        if cls.__module__ == ClocheError.__module__:
            found[cls.code] = cls
    return found
