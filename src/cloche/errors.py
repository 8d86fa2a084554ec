"""The one tree of errors.

    ClocheError
    ├── InvalidSpec                 invalid-spec
    │   ├── ScriptNotFound          script-not-found
    │   ├── ScriptTooLarge          script-too-large
    │   └── WorkspaceTooLarge       workspace-too-large
    ├── InvalidSettings             invalid-settings
    ├── SandboxDisabled             sandbox-disabled
    ├── InterpreterMissing          interpreter-missing
    ├── IsolationUnavailable        isolation-unavailable
    ├── QueueTimeout                queue-timeout
    ├── TooManyRuns                 too-many-runs
    └── EngineError                 (what an engine did to us)
        ├── BackendUnavailable      backend-unavailable
        ├── ImageUnavailable        image-unavailable
        ├── Unschedulable           unschedulable
        ├── QuotaExceeded           quota-exceeded
        ├── StartTimeout            start-timeout
        ├── PermissionDenied        permission-denied
        ├── EngineLost              engine-lost
        └── ProtocolError           protocol-error

An error is *our* failure: the run could not happen, or its end is not known. What a program did (a non-zero exit, a
timeout, too much memory) is a :class:`cloche.Result`, never an error. Each class has a stable ``code``; each error says
in its ``hint`` what to do next. ``retryable`` means that the same call may succeed later without any change.
"""

from __future__ import annotations

from typing import ClassVar


class ClocheError(Exception):
    """Base of every error that cloche raises on purpose.

    Attributes:
        code: stable kebab-case name of the kind of failure.
        message: one sentence with the facts.
        hint: one sentence that says what to do.
        retryable: whether the same call may succeed later, unchanged.
    """

    code: ClassVar[str] = "error"
    default_hint: ClassVar[str] = "Run again with CLOCHE_LOG=debug and report what it prints."
    default_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint: str = self.default_hint if hint is None else hint
        self.retryable: bool = self.default_retryable if retryable is None else retryable

    def __str__(self) -> str:
        return f"{self.message} {self.hint}"


class InvalidSpec(ClocheError):
    """The run as described cannot exist: a bad limit, a NUL in an argument, a path out of the workspace."""

    code = "invalid-spec"
    default_hint = "Correct the spec and run again."


class ScriptNotFound(InvalidSpec):
    """The script is missing, is not a regular file, or cannot be read."""

    code = "script-not-found"
    default_hint = "Check the path; with a workspace it is relative to the workspace."


class ScriptTooLarge(InvalidSpec):
    """The script is larger than CLOCHE_MAX_SCRIPT_BYTES."""

    code = "script-too-large"
    default_hint = "Move data out of the script into the workspace, or raise CLOCHE_MAX_SCRIPT_BYTES."


class WorkspaceTooLarge(InvalidSpec):
    """Workspace and stdin together are larger than CLOCHE_MAX_WORKSPACE_BYTES."""

    code = "workspace-too-large"
    default_hint = "Deliver less (only what the script reads), or raise CLOCHE_MAX_WORKSPACE_BYTES."


class InvalidSettings(ClocheError):
    """A setting is unknown, malformed, or contradicts another."""

    code = "invalid-settings"
    default_hint = "Correct the environment variable; docs/settings.md lists them all."


class SandboxDisabled(ClocheError):
    """Script execution is switched off (mode ``disabled``)."""

    code = "sandbox-disabled"
    default_hint = "Set CLOCHE_MODE to a mode that runs scripts, such as local."


class InterpreterMissing(ClocheError):
    """The box has no program that could run the script."""

    code = "interpreter-missing"
    default_hint = "Install the interpreter where the box can see it, use an image that has it, or pass another one."


class IsolationUnavailable(ClocheError):
    """The isolation floor cannot be met here; nothing was started."""

    code = "isolation-unavailable"
    default_hint = "Use a mode with stronger isolation, or lower CLOCHE_MIN_ISOLATION if you accept the risk."


class QueueTimeout(ClocheError):
    """The run waited for a free place longer than CLOCHE_QUEUE_TIMEOUT."""

    code = "queue-timeout"
    default_hint = "Try again later, or raise CLOCHE_MAX_CONCURRENT or CLOCHE_QUEUE_TIMEOUT."
    default_retryable = True


class TooManyRuns(ClocheError):
    """A service has as many runs waiting as it takes, or a caller as many as it may have."""

    code = "too-many-runs"
    default_hint = "Wait for other runs to end and try again."
    default_retryable = True


class EngineError(ClocheError):
    """What an engine did to us. Never raised itself."""

    code = "engine-error"


class BackendUnavailable(EngineError):
    """The chosen engine cannot be used here."""

    code = "backend-unavailable"
    default_hint = "Start or repair the engine, or choose another mode with CLOCHE_MODE."


class ImageUnavailable(EngineError):
    """The image cannot be had by the engine."""

    code = "image-unavailable"
    default_hint = "Check CLOCHE_IMAGE and the engine's access to its registry."


class Unschedulable(EngineError):
    """The engine found no place for the box in time."""

    code = "unschedulable"
    default_hint = "Ask for less memory or CPU, or give the cluster more room."
    default_retryable = True


class QuotaExceeded(EngineError):
    """A quota of the engine forbids one more box."""

    code = "quota-exceeded"
    default_hint = "Wait for other runs to end, or raise the quota."
    default_retryable = True


class StartTimeout(EngineError):
    """The box was not ready within CLOCHE_START_TIMEOUT."""

    code = "start-timeout"
    default_hint = "Look at the engine's load, or raise CLOCHE_START_TIMEOUT."
    default_retryable = True


class PermissionDenied(EngineError):
    """The engine or the system refused us a right that is needed."""

    code = "permission-denied"
    default_hint = "Grant the right that the message names."


class EngineLost(EngineError):
    """The box or the connection to it went away, and how the program ended is not known."""

    code = "engine-lost"
    default_hint = "Look at the engine's own log; the script may have run in part."


class ProtocolError(EngineError):
    """What came out of the box is not what the supervisor writes."""

    code = "protocol-error"
    default_hint = "Check that nothing else writes to the box's output, then report this."
