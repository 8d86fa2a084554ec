"""The JSON form of events and results, both ways: for ``--json``, and for whoever sends events over a connection. Pure.

Reading is strict: a field that is missing, unknown, or of another type is refused, so that two versions that do not
understand each other say so. An event is an object with its kind in ``event``; bytes are base64.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, TypeVar, assert_never, cast

from pydantic import ValidationError

from cloche.errors import ProtocolError
from cloche.events import Artifact, Event, Finished, Outcome, Output, Started, StreamName, Usage
from cloche.isolation import Isolation
from cloche.result import PHASES, Result

_T = TypeVar("_T")


def event_to_dict(event: Event) -> dict[str, Any]:
    """The JSON form of an event: text, numbers, lists and dicts only."""
    match event:
        case Started():
            return {
                "event": "started",
                "run_id": event.run_id,
                "mode": event.mode,
                "isolation": str(event.isolation),
                "fallback_from": event.fallback_from,
                "guarantees": list(event.guarantees),
            }
        case Output():
            return {"event": "output", "stream": event.stream, "offset": event.offset, "data": _to_base64(event.data)}
        case Artifact():
            return {
                "event": "artifact",
                **_path_to_dict(event.path),
                "size": event.size,
                "truncated": event.truncated,
                "data": _to_base64(event.data),
            }
        case Finished():
            return _finished_to_dict(event)
        case _:
            assert_never(event)


def event_from_dict(value: object) -> Event:
    """The event that :func:`event_to_dict` made this of.

    Raises:
        ProtocolError: it is the JSON form of no event.
    """
    fields = _Fields(value, "an event")
    kind = fields.text("event")
    event: Event
    match kind:
        case "started":
            event = Started(
                fields.text("run_id"),
                fields.text("mode"),
                _member(Isolation, fields.text("isolation")),
                fields.text_or_none("fallback_from"),
                fields.texts("guarantees"),
            )
        case "output":
            event = Output(_stream(fields.text("stream")), fields.count("offset"), fields.data("data"))
        case "artifact":
            event = Artifact(
                _path(fields), fields.count("size"), fields.data("data"), truncated=fields.flag("truncated")
            )
        case "finished":
            event = _finished(fields)
        case _:
            raise ProtocolError(f"There is no event {kind!r}.")
    fields.end()
    return event


def result_to_dict(result: Result) -> dict[str, Any]:
    """The JSON form of a result."""
    return result.to_dict()


def result_from_dict(value: object) -> Result:
    """The result with this JSON form. The data of its artifacts is not in it.

    Raises:
        ProtocolError: it is the JSON form of no result.
    """
    fields = _Fields(value, "a result")
    for name in Result.model_fields:
        fields.take(name)
    fields.end()
    try:
        result = Result.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as exc:
        where = ".".join(map(str, exc.errors()[0]["loc"])) or "its fields contradict each other"
        raise ProtocolError(f"This is not the JSON form of a result: {where}.") from None
    if result.to_dict() != value:  # inner objects have defaults, which nobody may rely on
        raise ProtocolError("This is not the JSON form of a result: an inner field is missing.")
    return result


def _finished_to_dict(event: Finished) -> dict[str, Any]:
    return {
        "event": "finished",
        "outcome": str(event.outcome),
        "exit_code": event.exit_code,
        "signal": event.signal,
        "stdout_bytes": event.stdout_bytes,
        "stderr_bytes": event.stderr_bytes,
        "stdout_truncated": event.stdout_truncated,
        "stderr_truncated": event.stderr_truncated,
        "artifacts_skipped": event.artifacts_skipped,
        "run_ms": event.run_ms,
        "usage": {
            "cpu_ms": event.usage.cpu_ms,
            "peak_memory_bytes": event.usage.peak_memory_bytes,
            "oom_kills": event.usage.oom_kills,
        },
        "timings_ms": {phase: event.timings_ms.get(phase) for phase in PHASES},
    }


def _finished(fields: _Fields) -> Finished:
    usage = _Fields(fields.take("usage"), "usage")
    timings = _Fields(fields.take("timings_ms"), "timings_ms")
    event = Finished(
        _member(Outcome, fields.text("outcome")),
        exit_code=fields.count_or_none("exit_code"),
        signal=fields.text_or_none("signal"),
        stdout_bytes=fields.count("stdout_bytes"),
        stderr_bytes=fields.count("stderr_bytes"),
        stdout_truncated=fields.flag("stdout_truncated"),
        stderr_truncated=fields.flag("stderr_truncated"),
        artifacts_skipped=fields.count("artifacts_skipped"),
        run_ms=fields.amount("run_ms"),
        usage=Usage(usage.amount_or_none("cpu_ms"), usage.count_or_none("peak_memory_bytes"), usage.count("oom_kills")),
        timings_ms={phase: timings.amount_or_none(phase) for phase in PHASES},
    )
    usage.end()
    timings.end()
    return event


class _Fields:
    """The fields of a JSON object, each to be taken once, with its type."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise ProtocolError(f"The JSON form of {what} is an object.")
        self._left: dict[object, object] = dict(value)
        self._what = what

    def end(self) -> None:
        """Refuse what was not taken."""
        if self._left:
            raise ProtocolError(f"The JSON form of {self._what} has no field {next(iter(self._left))!r}.")

    def take(self, name: str) -> object:
        if name not in self._left:
            raise ProtocolError(f"The JSON form of {self._what} lacks the field {name!r}.")
        return self._left.pop(name)

    def text(self, name: str) -> str:
        return self._typed(name, str)

    def text_or_none(self, name: str) -> str | None:
        return self._optional(name, str)

    def texts(self, name: str) -> tuple[str, ...]:
        found = self._typed(name, list)
        if not all(isinstance(text, str) for text in found):
            raise self._wrong(name)
        return tuple(found)

    def flag(self, name: str) -> bool:
        return self._typed(name, bool)

    def count(self, name: str) -> int:
        return self._at_least_0(name, self._typed(name, int))

    def count_or_none(self, name: str) -> int | None:
        value = self._optional(name, int)
        return None if value is None else self._at_least_0(name, value)

    def amount(self, name: str) -> float:
        value = self.amount_or_none(name)
        if value is None:
            raise self._wrong(name)
        return value

    def amount_or_none(self, name: str) -> float | None:
        value = self.take(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0):
            raise self._wrong(name)
        return None if value is None else float(cast("float", value))

    def data(self, name: str) -> bytes:
        return _from_base64(self.text(name), f"the field {name!r} of {self._what}")

    def has(self, name: str) -> bool:
        return name in self._left

    def _typed(self, name: str, kind: type[_T]) -> _T:
        value = self.take(name)
        # A bool is an int to Python, not to JSON.
        if type(value) is not kind:
            raise self._wrong(name)
        return value

    def _optional(self, name: str, kind: type[_T]) -> _T | None:
        if name in self._left and self._left[name] is None:
            del self._left[name]
            return None
        return self._typed(name, kind)

    def _at_least_0(self, name: str, value: int) -> int:
        if value < 0:
            raise self._wrong(name)
        return value

    def _wrong(self, name: str) -> ProtocolError:
        return ProtocolError(f"The field {name!r} of {self._what} has the wrong type or value.")


def _member(kind: type[_T], value: str) -> _T:
    try:
        return kind(value)  # type: ignore[call-arg]
    except ValueError:
        raise ProtocolError(f"{value!r} is no {kind.__name__.lower()}.") from None


def _stream(name: str) -> StreamName:
    if name not in {"stdout", "stderr"}:
        raise ProtocolError(f"There is no stream {name!r}.")
    return cast("StreamName", name)


def _path_to_dict(path: str) -> dict[str, str]:
    """A path as text; one that is not UTF-8 also as the bytes that it is, in ``raw_path``."""
    raw = path.encode("utf-8", "surrogateescape")
    text = raw.decode("utf-8", "replace")
    return {"path": text} if text == path else {"path": text, "raw_path": _to_base64(raw)}


def _path(fields: _Fields) -> str:
    text = fields.text("path")
    if not fields.has("raw_path"):
        return text
    return fields.data("raw_path").decode("utf-8", "surrogateescape")


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _from_base64(text: str, what: str) -> bytes:
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ProtocolError(f"{what[:1].upper()}{what[1:]} is not base64.") from None
