"""How callers may use cloche, as far as types tell. Checked by mypy and pyright; never run."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import cloche


def simple_call() -> int | None:
    result = cloche.run("report.py", args=["--month", "5"], stdin=b"data", timeout=10, memory="128Mi")
    assert_type(result, cloche.Result)
    assert_type(result.ok, bool)
    assert_type(result.stdout, str)
    assert_type(result.stdout_raw, bytes)
    assert_type(result.artifacts, tuple[cloche.ArtifactInfo, ...])
    assert_type(result.signal, str | None)
    return result.exit_code


async def with_settings() -> cloche.Result:
    settings = cloche.Settings(mode=cloche.Mode.LOCAL, max_concurrent=2)
    assert_type(cloche.Settings.from_env(), cloche.Settings)
    async with cloche.Sandbox(settings) as sandbox:
        return await sandbox.run(cloche.Spec(script="x.py", workspace=Path("skill"), env={"LANG": "C"}))


async def streamed() -> bytes:
    spec = cloche.Spec(script="scripts/report.py", workspace=Path("skill"), args=("a", "b"))
    out = b""
    async with cloche.Sandbox.from_env() as sandbox:
        assert_type(sandbox, cloche.Sandbox)
        assert_type(sandbox.mode, str)
        assert_type(await sandbox.posture(), cloche.Posture)
        assert_type(await sandbox.run(spec), cloche.Result)
        async for event in sandbox.stream(spec):
            match event:
                case cloche.Started(run_id=run_id):
                    assert_type(run_id, str)
                case cloche.Output(data=data):
                    out += data
                case cloche.Artifact(path=path):
                    assert_type(path, str)
                case cloche.Finished(outcome=outcome):
                    assert_type(outcome, cloche.Outcome)
    return out


def refused() -> tuple[str, str, bool]:
    try:
        cloche.run("missing.py")
    except cloche.ScriptNotFound as error:
        return error.code, error.hint, error.retryable
    except cloche.ClocheError as error:
        return error.code, error.message, error.retryable
    return "", "", False


def floor(posture: cloche.Posture) -> bool:
    return posture.available and posture.isolation >= cloche.Isolation.NAMESPACE


# What the types must refuse; mypy complains when one of these is suddenly right.
cloche.run("x.py", timout=10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
cloche.run("x.py", args=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
