"""Bad input: a clear error with its code and a hint, in Python, in JSON and on the terminal; nothing is started."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cloche
from cloche.testing.conformance.target import Suite, Target
from cloche.testing.conformance.terminal import command


def _missing(folder: Path) -> list[str]:
    return [str(folder / "missing.py")]


def _folder(folder: Path) -> list[str]:
    return [str(folder)]


def _unreadable(folder: Path) -> list[str]:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    path = folder / "closed.py"
    path.write_text("pass")
    path.chmod(0)
    return [str(path)]


def _fifo(folder: Path) -> list[str]:
    os.mkfifo(folder / "fifo.py")
    return [str(folder / "fifo.py")]


def _large(folder: Path) -> list[str]:
    (folder / "large.py").write_bytes(b"#" * (512 * 1024 + 1))
    return [str(folder / "large.py")]


def _with(*options: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "fine.py").write_text("print('must not run')")
        return [*options, str(folder / "fine.py")]

    return make


def _in_workspace(script: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "skill").mkdir()
        (folder / "outside.py").write_text("print('must not run')")
        return ["--workspace", str(folder / "skill"), script.format(folder=folder)]

    return make


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str, dict[str, str]]] = {
    # what: (how the arguments are made, the code, further settings)
    "missing script": (_missing, "script-not-found", {}),
    "a folder": (_folder, "script-not-found", {}),
    "unreadable": (_unreadable, "script-not-found", {}),
    "a fifo": (_fifo, "script-not-found", {}),
    "a device": (lambda _: ["/dev/zero"], "script-not-found", {}),
    "too large a script": (_large, "script-too-large", {}),
    "missing workspace": (_with("--workspace", "/nowhere/at/all"), "invalid-spec", {}),
    "a script above the workspace": (_in_workspace("../outside.py"), "invalid-spec", {}),
    "an absolute script with a workspace": (_in_workspace("{folder}/outside.py"), "invalid-spec", {}),
    "a script missing in the workspace": (_in_workspace("missing.py"), "script-not-found", {}),
    "negative time": (_with("--timeout=-1"), "invalid-spec", {}),
    "no time": (_with("--timeout=0"), "invalid-spec", {}),
    "endless time": (_with("--timeout=inf"), "invalid-spec", {}),
    "no number": (_with("--timeout=nan"), "invalid-spec", {}),
    "a century": (_with("--timeout=3153600000"), "invalid-spec", {}),
    "no memory": (_with("--memory=1"), "invalid-spec", {}),
    "nonsense for memory": (_with("--memory=lots"), "invalid-spec", {}),
    "negative memory": (_with("--memory=-1Mi"), "invalid-spec", {}),
    "absurd memory": (_with("--memory=999999999G"), "invalid-spec", {}),
    "no pids": (_with("--pids=0"), "invalid-spec", {}),
    "negative cpus": (_with("--cpus=-1"), "invalid-spec", {}),
    "a variable for the loader": (_with("--env", "LD_PRELOAD=/tmp/x.so"), "invalid-spec", {}),
    "an interpreter with a path": (_with("--interpreter", "/bin/sh"), "invalid-spec", {}),
    "a missing interpreter": (_with("--interpreter", "no-such-program"), "interpreter-missing", {}),
    "unknown network": (_with("--network", "moon"), "invalid-spec", {}),
    "unknown level": (_with("--min-isolation", "total"), "invalid-spec", {}),
    "out of reach": (_with("--min-isolation", "kernel"), "isolation-unavailable", {}),
    "unknown setting": (_with(), "invalid-settings", {"CLOCHE_TIMEOUTT": "1"}),
    "broken setting": (_with(), "invalid-settings", {"CLOCHE_TIMEOUT": "soon"}),
    "absurd setting": (_with(), "invalid-settings", {"CLOCHE_MEMORY": "-5"}),
    "unknown mode": (_with(), "invalid-settings", {"CLOCHE_MODE": "teleport"}),
}


USAGE = {
    "no script": [],
    "unknown option": ["--colour", "red", "main.py"],
    "a variable without a name": ["--env", "=x", "main.py"],
    "a variable without a value": ["--env", "X", "main.py"],
}


class Refusals(Suite):
    """What is refused before anything starts."""

    @pytest.mark.parametrize("what", USAGE)
    def test_usage(self, target: Target, what: str) -> None:
        """A command line that cannot be understood ends with 2, says why on stderr, and prints nothing on stdout."""
        done = subprocess.run(
            command("run", *USAGE[what]),
            env=target.command_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize("what", REFUSED)
    def test_refused(self, target: Target, tmp_path: Path, what: str) -> None:
        """The command says on stderr what is wrong and what to do, or prints it as JSON; it ends with 125 and runs nothing."""
        make, code, settings = REFUSED[what]
        runtimes = {"CLOCHE_DOCKER_RUNTIME", "CLOCHE_KUBE_RUNTIME_CLASS"}
        if what == "out of reach" and runtimes & target.environ.keys():
            pytest.skip("this mode may have a kernel of its own")
        args = make(tmp_path)
        on_terminal, as_json = self._both(args, target.command_environment(**settings))
        result = json.loads(as_json)
        assert result["outcome"] == "failed"
        error = result["error"]
        assert error["code"] == code, error
        # However the terminal's lines are broken.
        shown = "".join(on_terminal.split())
        for part in (error["code"], error["message"], error["hint"]):
            assert part
            assert "".join(part.split()) in shown, f"{part!r} is not in {on_terminal!r}"
        raised = cloche.Result.model_validate(result)
        with pytest.raises(cloche.ClocheError) as caught:
            raised.raise_for_error()
        assert caught.value.code == code

    @staticmethod
    def _both(args: list[str], environ: dict[str, str]) -> tuple[str, str]:
        """What the refused command says: on stderr, and with --json on stdout."""
        commands = [command("run", *args), command("run", "--json", *args)]
        started = [
            subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for argv in commands
        ]
        (out, err), (json_out, json_err) = [process.communicate(timeout=60) for process in started]
        assert [process.returncode for process in started] == [125, 125], err + json_err
        assert out == ""
        assert "Traceback" not in err + json_err
        return err, json_out

    async def test_python_raises_the_same(self, sandbox: cloche.Sandbox, tmp_path: Path) -> None:
        """In Python the same refusals are errors of one tree, with their codes."""
        (tmp_path / "large.py").write_bytes(b"#" * (512 * 1024 + 1))
        cases: list[tuple[cloche.Spec, type[cloche.ClocheError]]] = [
            (cloche.Spec(script=str(tmp_path / "missing.py")), cloche.ScriptNotFound),
            (cloche.Spec(script=str(tmp_path)), cloche.ScriptNotFound),
            (cloche.Spec(script=str(tmp_path / "large.py")), cloche.ScriptTooLarge),
            (cloche.Spec(name="main.py", content="#" * (512 * 1024 + 1)), cloche.ScriptTooLarge),
            (cloche.Spec(script="missing.py", workspace=tmp_path), cloche.ScriptNotFound),
            (cloche.Spec(script="main.py", workspace=tmp_path / "missing"), cloche.InvalidSpec),
        ]
        for spec, error in cases:
            with pytest.raises(error) as caught:
                await sandbox.run(spec)
            assert caught.value.hint
            assert not caught.value.retryable

    @pytest.mark.parametrize(
        "name", ["../evil.py", "/etc/evil.py", "a/../../evil.py", "a//b.py", "./x.py", "", "a\0b.py"]
    )
    def test_names_that_traverse(self, in_environment: Target, tmp_path: Path, name: str) -> None:
        """A script's name that leaves the workspace is refused, with and without a workspace."""
        given: list[dict[str, Any]] = [{}, {"workspace": tmp_path}]
        for fields in given:
            with pytest.raises(cloche.InvalidSpec):
                cloche.run(name=name, content="print(1)", **fields)
        with pytest.raises(cloche.InvalidSpec):
            cloche.run(name, workspace=tmp_path)
