"""Whether what a client was told of a run is true, given what happened to the run. Pure.

A run to which nothing happened has one result. A run that was cancelled has that one, or is cancelled. One that was in the way of
a fault may also have failed, honestly: with an error that says that it is not known how it ended. Nothing makes another result
true.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.soak.kinds import OUTPUT_BYTES
from tests.soak.plan import Fault, Run

ABANDONED = "abandoned"
"""The outcome of a call that was cancelled: nobody is told anything."""
DIED = "died"
"""The outcome of a run whose client was killed."""
BOX_LOST = frozenset({"engine-lost", "backend-unavailable"})
"""What may be said of a run whose box was killed: while it ran, or while it was being made."""
ENGINE_AWAY = BOX_LOST | {"start-timeout", "queue-timeout", "image-unavailable", "unschedulable", "quota-exceeded"}
"""What may be said of a run in whose time the engine was restarted; a cluster that does not count counts what is gone."""


@dataclass(frozen=True)
class Told:
    """What a client says of a run: the fields of a result, with the exact bytes of the streams."""

    outcome: str
    exit_code: int | None = None
    signal: str | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    artifacts: Mapping[str, tuple[int, str, bool]] = field(default_factory=dict)
    """Size, digest, and whether it was cut, by path."""
    mode: str | None = None
    fallback_from: str | None = None
    error: Mapping[str, Any] | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Told:
        """From a worker's line."""
        return cls(
            outcome=found["outcome"],
            exit_code=found.get("exit_code"),
            signal=found.get("signal"),
            stdout=base64.b64decode(found.get("stdout_raw", "")),
            stderr=base64.b64decode(found.get("stderr_raw", "")),
            stdout_bytes=found.get("stdout_bytes", 0),
            stderr_bytes=found.get("stderr_bytes", 0),
            stdout_truncated=found.get("stdout_truncated", False),
            stderr_truncated=found.get("stderr_truncated", False),
            artifacts={
                each["path"]: (each["size"], each["sha256"], each["truncated"]) for each in found.get("artifacts", ())
            },
            mode=found.get("mode"),
            fallback_from=found.get("fallback_from"),
            error=found.get("error"),
        )

    @property
    def counted(self) -> str:
        """What it is counted as."""
        return self.shown if self.error is not None else self.outcome

    @property
    def shown(self) -> str:
        """In some words."""
        match self.outcome:
            case "exited":
                return f"exited {self.exit_code}"
            case "signaled":
                return f"signaled {self.signal}"
            case "failed" if self.error is not None:
                return f"failed {self.error['code']}"
            case _:
                return self.outcome


def judge(run: Run, told: Told, faults: frozenset[Fault]) -> str:
    """What is wrong with it; nothing where it may be so. ``faults`` are those that may have met the run."""
    return "; ".join(_complaints(run, told, faults))


def _complaints(run: Run, told: Told, faults: frozenset[Fault]) -> Iterator[str]:
    expected = run.made.expected
    match told.outcome:
        case "abandoned":
            if run.cancel is None or run.cancel.by != "task":
                yield "the call ended as if it had been cancelled, and nobody did that"
            return
        case "died":
            if Fault.KILL_CLIENT not in faults:
                yield "its client died, and nobody killed it"
            return
        case "failed":
            yield from _dishonest(told, faults)
        case "cancelled" if run.cancel is not None:
            pass
        case outcome if outcome == expected.outcome:
            yield from _other_end(run, told)
        case _:
            yield f"it was told as {told.shown}, and only {_shown(run)} is true"
    if told.outcome in {"failed", "cancelled"}:
        yield from _no_beginning("stdout", told.stdout, expected.stdout)
        yield from _no_beginning("stderr", told.stderr, expected.stderr)
    if told.outcome != "failed" and told.mode != run.mode:
        yield f"it was run in the mode {told.mode}"
    if told.fallback_from is not None:
        yield f"something took the place of {told.fallback_from}"
    for path, (size, digest, truncated) in told.artifacts.items():
        if (size, digest, truncated) != _artifact(run, path):
            yield f"the artifact {path} is not what the script left"


def _dishonest(told: Told, faults: frozenset[Fault]) -> Iterator[str]:
    error = told.error or {}
    code = error.get("code")
    allowed: frozenset[str] = frozenset()
    if Fault.KILL_BOX in faults:
        allowed |= BOX_LOST
    if Fault.RESTART_ENGINE in faults:
        allowed |= ENGINE_AWAY
    if code not in allowed:
        yield f"it failed with {code}, which nothing explains: {error.get('message')}"
    if not error.get("hint"):
        yield f"the error {code} does not say what to do"
    if faults == {Fault.RESTART_ENGINE} and code in ENGINE_AWAY - {"engine-lost"} and not error.get("retryable"):
        yield f"the engine was away for a moment, and yet {code} is not called retryable: {error.get('message')}"
    if faults == {Fault.KILL_BOX} and code == "engine-lost" and error.get("retryable"):
        yield "its box was killed, the script may have run, and yet it is called retryable"


def _other_end(run: Run, told: Told) -> Iterator[str]:
    expected = run.made.expected
    if (told.exit_code, told.signal) != (expected.exit_code, expected.signal):
        yield f"it was told as {told.shown}, and only {_shown(run)} is true"
    yield from _other_stream("stdout", told.stdout, told.stdout_bytes, told.stdout_truncated, expected.stdout)
    yield from _other_stream("stderr", told.stderr, told.stderr_bytes, told.stderr_truncated, expected.stderr)
    if missing := sorted(expected.artifacts.keys() - told.artifacts.keys()):
        yield f"artifacts are missing: {', '.join(missing)}"


def _other_stream(name: str, kept: bytes, size: int, truncated: bool, whole: bytes) -> Iterator[str]:
    if size != len(whole):
        yield f"{name} is said to have had {size} bytes instead of {len(whole)}"
    if truncated is not (len(whole) > OUTPUT_BYTES):
        yield f"{name} of {len(whole)} bytes is said to be {'cut' if truncated else 'whole'}"
    if not truncated and kept != whole:
        yield f"{name} has other bytes than were written ({len(kept)} of {len(whole)})"
    part = OUTPUT_BYTES // 4
    ends = whole.startswith(kept[:part]) and whole.endswith(kept[-part:]) and _is_head_and_tail(kept, whole)
    if truncated and not (2 * part <= len(kept) <= OUTPUT_BYTES and ends):
        yield f"{name} was cut, and what was kept ({len(kept)} bytes) is not its head and its tail"


def _no_beginning(name: str, kept: bytes, whole: bytes) -> Iterator[str]:
    if not whole.startswith(kept) and not _is_head_and_tail(kept, whole):
        yield f"{name} has bytes that the script did not write"


def _is_head_and_tail(kept: bytes, whole: bytes) -> bool:
    head = next((i for i, (a, b) in enumerate(zip(kept, whole, strict=False)) if a != b), min(len(kept), len(whole)))
    return whole.endswith(kept[head:])


def _artifact(run: Run, path: str) -> tuple[int, str, bool] | None:
    data = run.made.expected.artifacts.get(path)
    return None if data is None else (len(data), hashlib.sha256(data).hexdigest(), False)


def _shown(run: Run) -> str:
    expected = run.made.expected
    return Told(expected.outcome, expected.exit_code, expected.signal).shown
