"""Every kind of bad input is a clear error with its code and a hint, in Python, as JSON and on the terminal.

Nothing is started for any of them, so no engine is needed: the mode is `local`, and where the refusal comes only after the
engine was asked, the test runs over a fake one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import cloche
from cloche.runtime import MODES
from cloche.settings import Settings
from cloche.testing.fake import FakeBackend

UNPRIVILEGED = 65534


@dataclass(frozen=True)
class Case:
    """One bad input: as fields of a spec, as options, with the environment that goes with it."""

    name: str
    code: str
    words: str
    fields: Mapping[str, object] = field(default_factory=dict)
    options: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)


SCRIPT = {"script": "ok.py"}
CASES = [
    Case("missing script", "script-not-found", "no script", {"script": "nope.py"}, ["nope.py"]),
    Case("folder as script", "script-not-found", "is a folder", {"script": "folder"}, ["folder"]),
    Case("unreadable script", "script-not-found", "Permission denied", {"script": "closed.py"}, ["closed.py"]),
    Case(
        "large script",
        "script-too-large",
        "larger than 100 bytes",
        {"script": "large.py"},
        ["large.py"],
        {"CLOCHE_MAX_SCRIPT_BYTES": "100"},
    ),
    Case(
        "missing script in a workspace",
        "script-not-found",
        "no script",
        {"script": "nope.py", "workspace": "folder"},
        ["--workspace", "folder", "nope.py"],
    ),
    Case(
        "script out of the workspace",
        "invalid-spec",
        "stay inside",
        {"script": "../ok.py", "workspace": "folder"},
        ["--workspace", "folder", "../ok.py"],
    ),
    Case(
        "missing workspace",
        "invalid-spec",
        "workspace",
        {**SCRIPT, "workspace": "nope"},
        ["--workspace", "nope", "ok.py"],
    ),
    Case(
        "large workspace",
        "workspace-too-large",
        "larger than 50 bytes",
        {"script": "small.py", "workspace": "full"},
        ["--workspace", "full", "small.py"],
        {"CLOCHE_MAX_WORKSPACE_BYTES": "50"},
    ),
    Case("negative timeout", "invalid-spec", "timeout", {**SCRIPT, "timeout": -1}, ["--timeout=-1", "ok.py"]),
    Case("no timeout", "invalid-spec", "timeout", {**SCRIPT, "timeout": 0}, ["--timeout", "0", "ok.py"]),
    Case(
        "endless timeout", "invalid-spec", "timeout", {**SCRIPT, "timeout": float("inf")}, ["--timeout", "inf", "ok.py"]
    ),
    Case(
        "timeout of a year", "invalid-spec", "timeout", {**SCRIPT, "timeout": 31536000}, ["--timeout", "8760h", "ok.py"]
    ),
    Case("odd timeout", "invalid-spec", "timeout", {**SCRIPT, "timeout": "soon"}, ["--timeout", "soon", "ok.py"]),
    Case("too little memory", "invalid-spec", "memory", {**SCRIPT, "memory": 1}, ["--memory", "1", "ok.py"]),
    Case("odd memory", "invalid-spec", "memory", {**SCRIPT, "memory": "lots"}, ["--memory", "lots", "ok.py"]),
    Case("absurd memory", "invalid-spec", "memory", {**SCRIPT, "memory": 2**60}, ["--memory", str(2**60), "ok.py"]),
    Case("negative CPUs", "invalid-spec", "cpus", {**SCRIPT, "cpus": -1}, ["--cpus=-1", "ok.py"]),
    Case("too few pids", "invalid-spec", "pids", {**SCRIPT, "pids": 1}, ["--pids", "1", "ok.py"]),
    Case("odd network", "invalid-spec", "network", {**SCRIPT, "network": "some"}, ["--network", "some", "ok.py"]),
    Case(
        "odd isolation",
        "invalid-spec",
        "min_isolation",
        {**SCRIPT, "min_isolation": "strong"},
        ["--min-isolation", "strong", "ok.py"],
    ),
    Case(
        "odd interpreter",
        "invalid-spec",
        "interpreter",
        {**SCRIPT, "interpreter": "/bin/sh"},
        ["--interpreter", "/bin/sh", "ok.py"],
    ),
    Case(
        "loader variable",
        "invalid-spec",
        "LD_PRELOAD",
        {**SCRIPT, "env": {"LD_PRELOAD": "x"}},
        ["--env", "LD_PRELOAD=x", "ok.py"],
    ),
    Case("unknown mode", "invalid-settings", "dokcer", SCRIPT, ["ok.py"], {"CLOCHE_MODE": "dokcer"}),
    Case(
        "remote, and no address",
        "backend-unavailable",
        "No cloche service is configured",
        SCRIPT,
        ["ok.py"],
        {"CLOCHE_MODE": "remote", "CLOCHE_FALLBACK": "false"},
    ),
    Case("disabled", "sandbox-disabled", "switched off", SCRIPT, ["ok.py"], {"CLOCHE_MODE": "disabled"}),
    Case(
        "disabled, and no script",
        "sandbox-disabled",
        "switched off",
        {"script": "nope"},
        ["nope"],
        {"CLOCHE_MODE": "disabled"},
    ),
    Case("unknown variable", "invalid-settings", "CLOCHE_TIMOUT", SCRIPT, ["ok.py"], {"CLOCHE_TIMOUT": "1"}),
    Case("broken value", "invalid-settings", "CLOCHE_MEMORY='lots'", SCRIPT, ["ok.py"], {"CLOCHE_MEMORY": "lots"}),
    Case(
        "broken alias",
        "invalid-settings",
        "WEKNORA_SANDBOX_TIMEOUT='-5'",
        SCRIPT,
        ["ok.py"],
        {"WEKNORA_SANDBOX_TIMEOUT": "-5"},
    ),
    Case(
        "more isolation than there is",
        "isolation-unavailable",
        "kernel is required",
        {**SCRIPT, "min_isolation": "kernel"},
        ["--min-isolation", "kernel", "ok.py"],
    ),
]
ON_THE_COMMAND_LINE_ONLY = [
    Case("missing stdin", "invalid-spec", "stdin cannot be read", options=["--stdin", "nope", "ok.py"]),
    Case(
        "large stdin",
        "workspace-too-large",
        "larger than",
        options=["--stdin", "large.py", "ok.py"],
        environ={"CLOCHE_MAX_WORKSPACE_BYTES": "100"},
    ),
    Case("file as output", "invalid-spec", "is not a folder", options=["--output", "ok.py", "ok.py"]),
    Case("mode as an option", "invalid-settings", "mode='dokcer'", options=["--mode", "dokcer", "ok.py"]),
]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_command = pytest.mark.parametrize("case", CASES + ON_THE_COMMAND_LINE_ONLY, ids=lambda case: case.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that everybody can read, with good and bad scripts in it."""
    for made in tmp_path.parents:
        # What pytest made for this session is closed to others; what is above it is the machine's.
        if not made.name.startswith("pytest-"):
            break
        made.chmod(0o755)
    tmp_path.chmod(0o755)
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "small.py").write_text("")
    (tmp_path / "full" / "data").write_text("x" * 60)
    (tmp_path / "ok.py").write_text("print('started')")
    (tmp_path / "large.py").write_text("#" * 101)
    (tmp_path / "closed.py").write_text("")
    (tmp_path / "closed.py").chmod(0)
    return tmp_path


def command(case: Case, folder: Path, *more: str) -> subprocess.CompletedProcess[bytes]:
    """The command as an ordinary user, who may not read everything."""
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    # The interpreter of the tests may live where an ordinary user cannot look; loaded modules stay loaded.
    start = (
        "import os, sys, cloche.cli.commands, cloche.backends.local.backend, cloche.backends.disabled, importlib.readers\n"
        f"if os.geteuid() == 0 and {case.words == 'Permission denied'}:\n    os.setresuid({f'{UNPRIVILEGED}, ' * 3})\n"
        "from cloche.cli import main\nsys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", start, "run", *more, *case.options],
        env=environ | {"CLOCHE_MODE": "local"} | dict(case.environ),
        cwd=folder,
        capture_output=True,
        timeout=60,
        check=False,
    )


@each_case
async def test_python(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python bad input raises the error with its code, and a hint; no box is made."""
    monkeypatch.chdir(folder)
    engine = FakeBackend()
    table = {mode: factory for mode, factory in MODES.items() if mode != "local"} | {"local": engine.factory}
    if case.words == "Permission denied" and os.geteuid() == 0:
        os.seteuid(UNPRIVILEGED)
    try:
        with pytest.raises(cloche.ClocheError) as caught:
            async with cloche.Sandbox(Settings.from_env(case.environ), backends=table) as sandbox:
                await sandbox.run(cloche.Spec(**case.fields))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
    assert caught.value.code == case.code
    assert case.words in caught.value.message
    assert caught.value.hint
    assert engine.boxes == []


@each_command
def test_json(case: Case, folder: Path) -> None:
    """With --json bad input is a failed Result on stdout, and nothing else; the status is 125."""
    done = command(case, folder, "--json")
    assert done.returncode == 125, done.stderr
    form = json.loads(done.stdout)
    assert form.keys() == cloche.Result.model_fields.keys()
    assert form["outcome"] == "failed"
    assert form["error"]["code"] == case.code
    assert case.words in form["error"]["message"]
    assert form["error"]["hint"]


@each_command
def test_terminal(case: Case, folder: Path) -> None:
    """On the terminal bad input is one line with the facts and the code, and one with what to do; stdout stays empty."""
    done = command(case, folder)
    assert done.returncode == 125, done.stderr
    assert done.stdout == b""
    facts, hint = done.stderr.decode().splitlines()
    assert facts.startswith("cloche: ")
    assert case.words in facts
    assert facts.endswith(f"[{case.code}]")
    assert hint.startswith("cloche: hint: ")


@pytest.mark.parametrize(
    "options", [[], ["--nonsense", "ok.py"], ["--env", "novalue", "ok.py"], ["--env", "=x", "ok.py"], ["--timeout"]]
)
def test_usage(options: list[str], folder: Path) -> None:
    """A command line that is none has the status 2 and says how to use it."""
    done = command(Case("", "", "", options=options), folder)
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"Error: " in done.stderr


def test_nothing_is_left(folder: Path) -> None:
    """A refused run with --output makes no folder."""
    done = command(Case("", "", "", options=["--output", "new/out", "nope.py"]), folder)
    assert done.returncode == 125
    assert not (folder / "new").exists()


def test_spec_by_hand() -> None:
    """A NUL, or a script and its content both, is refused in a sentence that says so."""
    for fields, words in (
        ({"script": "a", "args": ("a\0b",)}, "NUL"),
        ({"script": "a", "content": "x"}, "either script"),
        ({}, "either script"),
        ({"content": "x"}, "needs a name"),
        ({"script": "a", "nonsense": 1}, "nonsense"),
        ({"script": "a", "stdin": 5}, "stdin"),
        ({"script": "a", "env": {"A": 5}}, "env.A"),
    ):
        with pytest.raises(cloche.InvalidSpec, match=words) as caught:
            cloche.Spec(**fields)
        assert caught.value.message.endswith(".")


LONG = "a" * 256


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"script": f"{LONG}.py", "workspace": "w"}, "longer than 255 bytes"),
        ({"content": "", "name": "é" * 128}, "longer than 255 bytes"),
        ({"content": "", "name": "/".join(["a" * 200] * 20)}, "longer than 4000 bytes"),
        ({"script": "a", "env": {f"A{i}": "" for i in range(16_001)}}, "more than 16000"),
        ({"script": "a", "args": ("x" * 131_000,) * 41}, "arguments and environment together"),
        ({"script": "a\ud800"}, "script holds a lone surrogate"),
        ({"content": "", "name": "a\ud800"}, "name holds a lone surrogate"),
        ({"script": "a", "workspace": "w\ud800"}, "workspace holds a lone surrogate"),
        ({"script": "a", "workspace": "w\0"}, "workspace holds a NUL"),
        ({"script": "a", "args": ("\ud800",)}, "argument 1 holds a lone surrogate"),
        ({"script": "a", "env": {"A": "\ud800"}}, "variable A holds a lone surrogate"),
        ({"script": "a", "env": {"\ud800": "a"}}, "name of an environment variable holds a lone surrogate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_box_can_receive(fields: dict[str, object], words: str) -> None:
    """What the supervisor's reader would refuse, or no byte stands for, is refused by the spec in words."""
    with pytest.raises(cloche.InvalidSpec, match=f"(?i){words}") as caught:
        cloche.Spec(**fields)
    assert caught.value.code == "invalid-spec"
    assert len(caught.value.message) < 300


def test_undecodable_bytes_are_kept() -> None:
    """The surrogates that stand for bytes of the host's names and arguments are accepted."""
    spec = cloche.Spec(script="a\udcff", args=("\udcff",), env={"A": "\udcff"}, workspace=Path("w\udcff"))
    assert spec.args == ("\udcff",)


def test_script_named_with_its_workspace(folder: Path) -> None:
    """A script that is named from outside its workspace is refused with the name that it has inside."""
    done = command(Case("", "", "", options=["--workspace", "full", "full/small.py"]), folder)
    assert done.returncode == 125
    assert b"relative to the workspace: give 'small.py'" in done.stderr


def test_output_without_a_current_folder(folder: Path) -> None:
    """A relative --output in a folder that was removed is refused without a traceback."""
    (folder / "gone").mkdir()
    start = "import os, sys; from cloche.cli import main; os.rmdir(os.getcwd()); sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", start, "run", "--output", "out", str(folder / "ok.py")],
        cwd=folder / "gone",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 125
    assert b"current folder does not exist any more. [invalid-spec]" in done.stderr
    assert b"Traceback" not in done.stderr


def test_secrets_are_not_repeated() -> None:
    """An error about a spec repeats neither the environment's values nor stdin."""
    for fields in ({"env": {"TOKEN": 12345}}, {"stdin": 12345}, {"env": {"LD_PRELOAD": "12345"}}):
        with pytest.raises(cloche.InvalidSpec) as caught:
            cloche.Spec(script="a", **fields)
        assert "12345" not in str(caught.value)
