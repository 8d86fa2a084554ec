"""How a run's end becomes a process's exit status."""

from __future__ import annotations

from typing import assert_never

from cloche._kit.signals import signal_number
from cloche.errors import (
    BackendUnavailable,
    ClocheError,
    EngineLost,
    ImageUnavailable,
    InterpreterMissing,
    InvalidSettings,
    InvalidSpec,
    IsolationUnavailable,
    PermissionDenied,
    ProtocolError,
    QueueTimeout,
    QuotaExceeded,
    SandboxDisabled,
    ScriptNotFound,
    ScriptTooLarge,
    StartTimeout,
    TooManyRuns,
    Unschedulable,
    WorkspaceTooLarge,
)
from cloche.events import Outcome
from cloche.result import Result

USAGE = 2
TIMED_OUT = 124
"""As timeout(1) has it."""
NOT_RUN = 125
"""cloche could not run the script: as env(1), timeout(1) and docker run have it for themselves."""
CANCELLED = 130
OUT_OF_MEMORY = 137
"""128 + SIGKILL, which is what the kernel ends a program with."""
SIGNAL_BASE = 128

OF_ERROR: dict[type[ClocheError], int] = dict.fromkeys(
    (
        BackendUnavailable,
        EngineLost,
        ImageUnavailable,
        InterpreterMissing,
        InvalidSettings,
        InvalidSpec,
        IsolationUnavailable,
        PermissionDenied,
        ProtocolError,
        QueueTimeout,
        QuotaExceeded,
        SandboxDisabled,
        ScriptNotFound,
        ScriptTooLarge,
        StartTimeout,
        TooManyRuns,
        Unschedulable,
        WorkspaceTooLarge,
    ),
    NOT_RUN,
)
"""Every error that can be raised. One status: scripts tell the errors apart by the code in the JSON result."""


def status_of_error(error: ClocheError) -> int:
    """The status for a run that could not happen."""
    return OF_ERROR.get(type(error), NOT_RUN)


def status_of_result(result: Result) -> int:
    """The status for a result."""
    outcome = result.outcome
    match outcome:
        case "failed":
            return NOT_RUN
        case Outcome.EXITED:
            return result.exit_code or 0
        case Outcome.SIGNALED:
            return SIGNAL_BASE + signal_number(result.signal or "SIGKILL")
        case Outcome.TIMED_OUT:
            return TIMED_OUT
        case Outcome.OUT_OF_MEMORY:
            return OUT_OF_MEMORY
        case Outcome.CANCELLED:
            return CANCELLED
        case _:
            assert_never(outcome)
