"""Run untrusted scripts in isolation, with one result contract that is true on every engine.

    result = cloche.run("report.py", args=["--month", "5"], stdin=data, timeout=10)

    async with cloche.Sandbox.from_env() as sandbox:
        result = await sandbox.run(cloche.Spec(script="report.py", workspace="skills/report"))

A name is imported when it is first used: ``import cloche`` costs next to nothing, and works where no engine does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloche.errors import (
        BackendUnavailable,
        ClocheError,
        EngineError,
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
    from cloche.events import Artifact, Event, Finished, Outcome, Output, Started, Usage
    from cloche.isolation import Guarantee, Isolation, Posture, State
    from cloche.result import ArtifactInfo, ErrorInfo, Fold, Result, Timings
    from cloche.runtime import Sandbox, new_run_id, run
    from cloche.settings import Mode, Settings
    from cloche.spec import Limits, Network, Spec

    __version__: str

_HOME = {
    "errors": (
        "BackendUnavailable ClocheError EngineError EngineLost ImageUnavailable InterpreterMissing InvalidSettings "
        "InvalidSpec IsolationUnavailable PermissionDenied ProtocolError QueueTimeout QuotaExceeded SandboxDisabled "
        "ScriptNotFound ScriptTooLarge StartTimeout TooManyRuns Unschedulable WorkspaceTooLarge"
    ),
    "events": "Artifact Event Finished Outcome Output Started Usage",
    "isolation": "Guarantee Isolation Posture State",
    "result": "ArtifactInfo ErrorInfo Fold Result Timings",
    "runtime": "Sandbox new_run_id run",
    "settings": "Mode Settings",
    "spec": "Limits Network Spec",
}
_MODULE = {name: f"cloche.{module}" for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "Artifact",
    "ArtifactInfo",
    "BackendUnavailable",
    "ClocheError",
    "EngineError",
    "EngineLost",
    "ErrorInfo",
    "Event",
    "Finished",
    "Fold",
    "Guarantee",
    "ImageUnavailable",
    "InterpreterMissing",
    "InvalidSettings",
    "InvalidSpec",
    "Isolation",
    "IsolationUnavailable",
    "Limits",
    "Mode",
    "Network",
    "Outcome",
    "Output",
    "PermissionDenied",
    "Posture",
    "ProtocolError",
    "QueueTimeout",
    "QuotaExceeded",
    "Result",
    "Sandbox",
    "SandboxDisabled",
    "ScriptNotFound",
    "ScriptTooLarge",
    "Settings",
    "Spec",
    "StartTimeout",
    "Started",
    "State",
    "Timings",
    "TooManyRuns",
    "Unschedulable",
    "Usage",
    "WorkspaceTooLarge",
    "__version__",
    "new_run_id",
    "run",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: object = version("cloche")
        except PackageNotFoundError:  # a source tree on the path, not installed
            value = "0+unknown"
    elif name in _MODULE:
        value = getattr(importlib.import_module(_MODULE[name]), name)
    else:
        raise AttributeError(f"module 'cloche' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
