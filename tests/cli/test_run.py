"""`cloche run` over every mode: output as it comes, the script's own status, and what a signal does."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import cloche
from cloche.testing.conformance import Target

Start: TypeAlias = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(target: Target) -> Iterator[Start]:
    """Starts `python -m cloche run …` in the mode under test; whatever still runs in the end is killed."""
    running: list[subprocess.Popen[bytes]] = []

    def started(*args: str, **options: Any) -> subprocess.Popen[bytes]:
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        environ = target.command_environment(**options.pop("settings", {}))
        through: Sequence[str] = options.pop("through", ())
        process = subprocess.Popen([*through, sys.executable, "-m", "cloche", "run", *args], env=environ, **options)
        running.append(process)
        return process

    yield started
    for process in running:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Writes a Python script and gives its path."""

    def write(source: str) -> str:
        path = tmp_path / "main.py"
        path.write_text(source)
        return str(path)

    return write


def finish(process: subprocess.Popen[bytes], given: bytes | None = None) -> tuple[int, bytes, bytes]:
    stdout, stderr = process.communicate(given, timeout=60)
    return process.returncode, stdout, stderr


def read_until(process: subprocess.Popen[bytes], wanted: bytes) -> None:
    """Wait for the script's first bytes, which shows that they come before its end."""
    assert process.stdout is not None
    got = b""
    while wanted not in got:
        piece = os.read(process.stdout.fileno(), 65536)
        assert piece, (got, process.communicate())
        got += piece


Write: TypeAlias = Callable[[str], str]


def test_streams_and_status(start: Start, script: Write) -> None:
    """The script's bytes arrive exactly and apart, its status is passed on, and cloche adds nothing."""
    path = script("import os, sys; os.write(1, b'out\\xff\\0\\r\\n'); os.write(2, b'err'); sys.exit(42)")
    assert finish(start(path)) == (42, b"out\xff\0\r\n", b"err")


def test_arguments(start: Start, script: Write) -> None:
    """What stands after -- arrives as it is, options and all; options may stand on either side of the script."""
    path = script("import sys; print(ascii(sys.argv[1:]))")
    args = ["--json", "-x", "", "a b", "$(id)", "--", "ü\n"]
    status, out, err = finish(start("--timeout", "30", path, "--memory", "128Mi", "--", *args))
    assert (status, out, err) == (0, ascii(args).encode() + b"\n", b"")


def test_stdin(start: Start, script: Write, tmp_path: Path) -> None:
    """The script gets stdin from a file, from cloche's own, or none."""
    path = script("import sys; print(len(sys.stdin.buffer.read()))")
    (tmp_path / "data").write_bytes(b"\0" * 100_000)
    assert finish(start("--stdin", str(tmp_path / "data"), path)) == (0, b"100000\n", b"")
    assert finish(start("--stdin", "-", path, stdin=subprocess.PIPE), b"abc") == (0, b"3\n", b"")
    assert finish(start(path, stdin=subprocess.PIPE), b"abc") == (0, b"0\n", b"")


def test_environment_and_workspace(start: Start, tmp_path: Path) -> None:
    """Variables, a workspace, and an interpreter are what the options say."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "main.txt").write_text("import os; print(os.environ['A'], open('data').read())")
    (tmp_path / "data").write_text("data")
    options = ["--env", "A=1=2", "--workspace", str(tmp_path), "--interpreter", "python3"]
    assert finish(start(*options, "lib/main.txt")) == (0, b"1=2 data\n", b"")


def test_output_folder(start: Start, script: Write, tmp_path: Path) -> None:
    """With --output the artifacts are written, however the script ended."""
    path = script("import os; os.mkdir('/output/d'); open('/output/d/a', 'w').write('x'); os.abort()")
    status, _, err = finish(start("--output", str(tmp_path / "out"), path))
    assert status == 128 + signal.SIGABRT
    assert b"cloche: the script was ended by SIGABRT" in err
    assert (tmp_path / "out" / "d" / "a").read_text() == "x"


def test_json(start: Start, script: Write) -> None:
    """With --json stdout carries one Result and nothing else; the status is still the script's."""
    path = script(
        "import sys; print('out'); print('err', file=sys.stderr); open('/output/a', 'w').write('x'); sys.exit(3)"
    )
    status, out, err = finish(start("--json", path))
    form = json.loads(out)
    assert (status, err) == (3, b"")
    assert form.keys() == cloche.Result.model_fields.keys()
    assert (form["outcome"], form["exit_code"], form["stdout"], form["stderr"]) == ("exited", 3, "out\n", "err\n")
    assert form["artifacts"][0]["path"] == "a"
    assert form["timings_ms"]["cleanup"] is not None, "the command waits for the removal"


@pytest.mark.parametrize(
    ("source", "options", "status", "note"),
    [
        ("print('before', flush=True); import time; time.sleep(60)", ["--timeout", "0.5"], 124, b"timed out"),
        ("import os; os.kill(os.getpid(), 9)", [], 137, b"ended by SIGKILL"),
        ("import sys; sys.exit(124)", [], 124, b""),
        ("import sys; sys.exit(137)", [], 137, b""),
    ],
)
def test_status(start: Start, script: Write, source: str, options: Sequence[str], status: int, note: bytes) -> None:
    """Statuses that look alike are told apart by the note on stderr; --quiet leaves it out."""
    code, _, err = finish(start(*options, script(source)))
    assert code == status
    assert (note in err) if note else err == b""
    code, _, err = finish(start("--quiet", *options, script(source)))
    assert (code, err) == (status, b"")


def test_output_while_it_runs(start: Start, script: Write) -> None:
    """Output appears while the script still runs."""
    process = start(script("import time; print('now', flush=True); time.sleep(60)"))
    read_until(process, b"now")
    assert process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal(start: Start, script: Write, number: signal.Signals) -> None:
    """A signal ends the run as cancelled: what the script did until then is kept, and no traceback is shown."""
    process = start(script("import time; print('now', flush=True); time.sleep(60)"))
    read_until(process, b"now")
    process.send_signal(number)
    status, _, err = finish(process)
    assert (status, err) == (130, b"cloche: cancelled\n")


def test_signal_json(start: Start, script: Write) -> None:
    """A run that a signal ended is a Result too, with what came."""
    process = start("--json", script("import time; print('now', flush=True); time.sleep(60)"))
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    status, out, _ = finish(process)
    form = json.loads(out)
    assert (status, form["outcome"], form["stdout"]) == (130, "cancelled", "now\n")


def test_second_signal(start: Start, script: Write) -> None:
    """A second signal does not wait for a script that ignores the first."""
    source = "import signal, time; signal.signal(15, signal.SIG_IGN); print('now', flush=True); time.sleep(60)"
    process = start(script(source))
    read_until(process, b"now")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 130
    assert time.monotonic() - started < 5


def test_ignored_signal(start: Start, script: Write) -> None:
    """A signal that was ignored when cloche started (nohup, a job in the background) stays ignored."""
    source = "import time; print('now', flush=True); time.sleep(1); print('end')"
    process = start(script(source), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    read_until(process, b"now")
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 0


def test_broken_pipe(start: Start, script: Write) -> None:
    """When nobody reads stdout any more the run is cancelled, without a word."""
    process = start(script("import time\nwhile True:\n    print('y' * 100, flush=True)\n    time.sleep(0.001)"))
    read_until(process, b"y")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    status, _, err = finish(process)
    assert (status, err) == (130, b"")


def test_full_stdout(start: Start, script: Write) -> None:
    """When stdout cannot be written, the reason is one line on stderr and the status is cloche's own failure."""
    path = script("print('x', flush=True)")
    for options in ([], ["--json"]):
        with open("/dev/full", "wb") as full:
            status, _, err = finish(start(*options, path, stdout=full))
        assert (status, err) == (125, b"cloche: stdout cannot be written: No space left on device\n")


def test_full_stderr(start: Start, script: Write) -> None:
    """When the script's stderr cannot be written, the run goes on and the status tells it."""
    path = script("import os; os.write(2, b'x'); print('out')")
    with open("/dev/full", "wb") as full:
        assert finish(start(path, stderr=full))[:2] == (125, b"out\n")


def test_artifacts_that_cannot_be_saved(start: Start, script: Write, tmp_path: Path) -> None:
    """When an artifact cannot be saved, what the run gave is kept, and the error names the artifact."""
    (tmp_path / "out" / "a").mkdir(parents=True)
    path = script("print('out'); open('/output/a', 'w').write('x')")
    status, out, err = finish(start("--json", "--output", str(tmp_path / "out"), path))
    form = json.loads(out)
    assert (status, form["outcome"], form["stdout"], form["artifacts"][0]["path"]) == (125, "failed", "out\n", "a")
    assert form["timings_ms"]["run"] is not None
    assert form["error"]["code"] == "invalid-spec"
    assert "at artifact 'a'" in form["error"]["message"]
    assert b"at artifact 'a'" in err
    assert cloche.Result.model_validate(form).error is not None, "a result like any other"
    status, out, err = finish(start("--output", str(tmp_path / "out"), path))
    assert (status, out) == (125, b"out\n")
    assert b".cloche-" not in err


def test_script_of_a_workspace_with_a_dot(start: Start, script: Write, tmp_path: Path) -> None:
    """A leading ./ as shells complete it is no part of a path inside the workspace."""
    script("print('hi')")
    assert finish(start("--workspace", str(tmp_path), "./main.py")) == (0, b"hi\n", b"")


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
def test_closed_descriptors(start: Start, script: Write, tmp_path: Path, closed: str) -> None:
    """With standard descriptors closed the run goes its way, and no byte of the script gets elsewhere."""
    big = "b'\\x02' * 300_000"
    path = script(f"import os\nfor fd in 1, 2: os.write(fd, {big})\nopen('/output/a', 'w')\nos._exit(7)")
    process = start(
        "--quiet",
        "--stdin",
        "-",
        "--output",
        str(tmp_path / "out"),
        path,
        through=["sh", "-c", f'exec "$@" {closed}', "sh"],
    )
    status, out, err = finish(process)
    assert status == 7, err
    assert (tmp_path / "out" / "a").exists()
    assert len(out) == (0 if closed.find(" >&-") >= 0 or closed.startswith(">&-") else 300_000)
    assert len(err) == (0 if "2>&-" in closed else 300_000)


def test_reader_who_pauses(start: Start, script: Write) -> None:
    """A reader who does not read for a while neither stops the script nor its clock."""
    process = start("--timeout", "2", script("import os; os.write(1, b'x' * 500_000); os._exit(7)"))
    time.sleep(4.5)
    status, out, err = finish(process)
    assert (status, len(out), err) == (7, 500_000, b"")


def test_terminal(start: Start, script: Write, target: Target) -> None:
    """At a terminal a last line tells how it went and what isolation was in force."""
    ours, theirs = pty.openpty()
    try:
        process = start(script("print('hi'); open('/output/chart.svg', 'w').write('x')"), stderr=theirs)
        assert process.communicate(timeout=60)[0] == b"hi\n"
        text = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    for words in ("ok", "1 artifact: chart.svg", target.mode, "isolation"):
        assert words in text


def test_verbose(start: Start, script: Write, target: Target) -> None:
    """With -v the posture is told before the run."""
    status, out, err = finish(start("-v", script("print('hi')")))
    assert (status, out) == (0, b"hi\n")
    assert err.startswith(f"cloche: mode {target.mode} (".encode())


def test_python_call(target: Target, script: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simple call runs a script with the settings of the environment, and waits until its box is gone."""
    for name, value in target.settings().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CLOCHE_MUST_WORK", raising=False)
    result = cloche.run(script("import sys; print(sys.argv[1], input())"), args=["a"], stdin=b"b\n", timeout=30)
    assert (result.ok, result.stdout) == (True, "a b\n")
    assert result.timings_ms["cleanup"] is not None


def test_python_call_in_a_loop(target: Target, script: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simple call also works where a loop already runs, as in a notebook; errors arrive as they are."""
    for name, value in target.settings().items():
        monkeypatch.setenv(name, value)
    path = script("print(1)")

    async def cell() -> None:
        assert cloche.run(path).stdout == "1\n"
        with pytest.raises(cloche.ScriptNotFound):
            cloche.run(path + ".nope")

    asyncio.run(cell())


PYTHON_CALL = """
import cloche
def call():
    cloche.run(content="import time; open('/output/a', 'w'); time.sleep(60)", name="main.py")
"""


@pytest.mark.parametrize(
    "how",
    ["call()", "import asyncio; loop = asyncio.new_event_loop(); loop.call_soon(call); loop.run_forever()"],
    ids=["plain", "in-a-loop"],
)
def test_python_call_interrupted(target: Target, how: str) -> None:
    """An interrupt of the simple call kills the box (the module's guard looks for it), and arrives as KeyboardInterrupt."""
    source = f"{PYTHON_CALL}\ntry:\n    {how}\nexcept KeyboardInterrupt:\n    print('interrupted')"
    process = subprocess.Popen(
        [sys.executable, "-c", source], env=target.command_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        assert finish(process) == (0, b"interrupted\n", b"")
    finally:
        process.kill()
        process.wait()
