"""The service of the tests: a run crosses the real server, a real container and a real stream, as the protocol has it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.engines.docker.api import Engine
from tests.engines.opensandbox.images import PREFIXES, Generation

from cloche.testing.conformance import absent

EXECD = 44772
TOKEN = {"X-EXECD-ACCESS-TOKEN": "secret"}
SCRIPT = rb"""#!/bin/sh
printf 'a\n\nb\r\nc'
echo '<&>' >&2
exit 7
"""


@dataclass
class Sandbox:
    """One that is up, its execd, and the API that made it."""

    api: httpx2.Client
    id: str
    execd: str

    def command(self, **request: Any) -> Iterator[tuple[float, dict[str, Any]]]:
        """The events of a command, each with the time at which it came."""
        with self.api.stream("POST", f"{self.execd}/command", headers=TOKEN, json=request) as answer:
            assert answer.status_code == 200, answer.read()
            rest = b""
            for chunk in answer.iter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                yield from ((time.monotonic(), json.loads(line)) for line in lines if line)
            assert not rest

    def upload(self, path: str, content: bytes, mode: int) -> httpx2.Response:
        """Write a file; the digits of its mode are decimal ones."""
        about = json.dumps({"path": path, "mode": mode}).encode()
        parts = {"metadata": ("metadata", about), "file": ("file", content)}
        return self.api.post(f"{self.execd}/files/upload", headers=TOKEN, files=parts)

    def answers(self) -> bool:
        """Whether execd is there: on a busy machine it comes some moments after its sandbox."""
        try:
            return self.api.get(f"{self.execd}/ping", headers=TOKEN).status_code == 200
        except httpx2.TransportError:
            return False

    def running(self) -> bool:
        """What the server says."""
        answer = self.api.get(f"/v1/sandboxes/{self.id}")
        return answer.status_code == 200 and answer.json()["status"]["state"] == "Running"


@dataclass
class Events:
    """What a command said."""

    events: list[tuple[float, dict[str, Any]]]

    @property
    def streams(self) -> dict[str, list[str]]:
        """The texts of each stream."""
        return {
            name: [event.get("text", "") for _, event in self.events if event["type"] == name]
            for name in ("stdout", "stderr")
        }

    @property
    def last(self) -> dict[str, Any]:
        """The terminal event."""
        return self.events[-1][1]


@pytest.fixture(params=PREFIXES)
def generation(request: pytest.FixtureRequest) -> Generation:
    """Of execd."""
    name: Generation = request.param
    if not os.environ.get(f"{PREFIXES[name]}_API_URL"):
        absent(
            "opensandbox",
            f"{PREFIXES[name]}_API_URL is not set (make engines-opensandbox starts services for the tests)",
        )
    return name


@pytest.fixture
def sandbox(generation: Generation) -> Iterator[Sandbox]:
    """A sandbox of the tests' image, whose execd has a token."""
    url, key = (os.environ[f"{PREFIXES[generation]}_API_{what}"] for what in ("URL", "KEY"))
    with httpx2.Client(base_url=url, headers={"OPEN-SANDBOX-API-KEY": key}, timeout=60, trust_env=False) as api:
        body = {
            "image": {"uri": "cloche-test/sandbox-root:1"},
            "entrypoint": ["tail", "-f", "/dev/null"],
            "timeout": 120,
            "resourceLimits": {"memory": "256Mi"},
            "env": {"EXECD_ACCESS_TOKEN": TOKEN["X-EXECD-ACCESS-TOKEN"]},
        }
        answer = api.post("/v1/sandboxes", json=body)
        assert answer.status_code == 202, answer.text
        name = answer.json()["id"]
        try:
            endpoint = api.get(f"/v1/sandboxes/{name}/endpoints/{EXECD}").json()["endpoint"]
            made = Sandbox(api, name, f"http://{endpoint}")
            end = time.monotonic() + 10
            while not made.answers():
                assert time.monotonic() < end
                time.sleep(0.02)
            yield made
        finally:
            assert api.delete(f"/v1/sandboxes/{name}").status_code in {204, 404}


def test_a_script(sandbox: Sandbox, generation: Generation) -> None:
    """An uploaded script runs as root; its lines come as that generation of execd sends them, and its exit code."""
    assert sandbox.upload("/tmp/new/script", SCRIPT, 755).status_code == 200
    begin = time.monotonic()
    said = Events(list(sandbox.command(command="/tmp/new/script")))
    assert [event["type"] for _, event in said.events][:2] == ["init", "ping"]
    lines = ["a\n", "\n", "b\r", "\n", "c"] if generation == "current" else ["a", "\n", "b", "c"]
    assert said.streams == {"stdout": lines, "stderr": ["<&>\n" if generation == "current" else "<&>"]}
    assert said.last["error"] == {"ename": "CommandExecError", "evalue": "7", "traceback": ["exit status 7"]}
    lingered_s = time.monotonic() - said.events[-1][0]
    assert (lingered_s >= 0.9) == (generation == "old")
    assert said.events[-1][0] - begin < 5


@pytest.mark.parametrize(
    ("request_", "last"),
    [
        ({"command": "true"}, "execution_complete"),
        ({"command": "kill -9 $$"}, "-1"),
        ({"command": "sleep 60", "timeout": 100}, "-1"),
        ({"command": "id -u | grep -qx 1000", "uid": 1000, "gid": 1000}, "execution_complete"),
    ],
    ids=["success", "signal", "timeout", "uid"],
)
def test_ends(sandbox: Sandbox, request_: dict[str, Any], last: str) -> None:
    """Success is an event of its own; a death by signal and the command's time limit both say -1."""
    said = Events(list(sandbox.command(**request_)))
    assert last in {said.last["type"], said.last.get("error", {}).get("evalue")}


def test_argv(sandbox: Sandbox, generation: Generation) -> None:
    """The current generation starts programs without a shell, or a command with one; the older one knows the latter alone."""
    answer = sandbox.api.post(f"{sandbox.execd}/command", headers=TOKEN, json={"argv": ["echo", "$HOME"]})
    if generation == "old":
        assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST_BODY")
    else:
        assert '"text":"$HOME\\n"' in answer.text
    both = sandbox.api.post(f"{sandbox.execd}/command", headers=TOKEN, json={"argv": ["true"], "command": "true"})
    assert both.status_code == (200 if generation == "old" else 400)


def test_interrupt(sandbox: Sandbox) -> None:
    """An interrupted command ends with all of its process group."""
    said = []
    for _, event in sandbox.command(command="sleep 60 & echo started; wait"):
        said.append(event)
        if event["type"] == "stdout":
            query = {"id": said[0]["text"]}
            assert sandbox.api.delete(f"{sandbox.execd}/command", headers=TOKEN, params=query).status_code == 200
    assert said[-1]["error"]["evalue"] == "-1"
    status = sandbox.api.get(f"{sandbox.execd}/command/status/{said[0]['text']}", headers=TOKEN).json()
    assert (status["running"], status["exit_code"]) == (False, -1)
    answer = sandbox.api.delete(f"{sandbox.execd}/command", headers=TOKEN, params={"id": said[0]["text"]})
    assert (answer.status_code, answer.json()["code"]) == (500, "RUNTIME_ERROR")


def test_token(sandbox: Sandbox, generation: Generation) -> None:
    """Whoever does not know the sandbox's token is refused; only the current generation lets everybody ping."""
    direct = sandbox.execd.removesuffix(f"/proxy/{EXECD}")
    bare = httpx2.get(f"{direct}/ping", trust_env=False)
    assert bare.status_code == (200 if generation == "current" else 401)
    through_itself = httpx2.get(f"{sandbox.execd}/ping", trust_env=False)
    assert through_itself.status_code == 401
    answer = httpx2.post(f"{sandbox.execd}/command", json={"command": "true"}, trust_env=False)
    assert (answer.status_code, list(answer.json())) == (401, ["error"])


def test_files(sandbox: Sandbox) -> None:
    """A file comes back byte for byte; what is not there is told from what cannot be read."""
    content = bytes(range(256)) * 100
    assert sandbox.upload("/tmp/x", content, 640).status_code == 200
    assert Events(list(sandbox.command(command="stat -c %a /tmp/x"))).streams["stdout"][0].strip() == "640"
    answer = sandbox.api.get(f"{sandbox.execd}/files/download", headers=TOKEN, params={"path": "/tmp/x"})
    assert answer.content == content
    gone = sandbox.api.get(f"{sandbox.execd}/files/download", headers=TOKEN, params={"path": "/tmp/y"})
    assert (gone.status_code, gone.json()["code"]) == (404, "FILE_NOT_FOUND")
    plain = sandbox.api.post(f"{sandbox.execd}/files/upload", headers=TOKEN, files={"metadata": ("m", b"{}")})
    assert (plain.status_code, plain.json()["code"]) == (400, "INVALID_FILE_CONTENT")


def test_a_sandbox_that_is_killed(sandbox: Sandbox, generation: Generation) -> None:
    """One that somebody kills is no longer running for the server, and its stream ends without a terminal event."""
    if not (host := os.environ.get(f"{PREFIXES[generation]}_DOCKER_HOST")):
        pytest.skip("it is not known on which daemon the sandboxes are")
    docker = Engine(Path(host.removeprefix("unix://")))
    said = []

    def until_killed() -> None:
        for _, event in sandbox.command(command="echo started; sleep 60"):
            said.append(event["type"])
            if event["type"] == "stdout":
                docker.ask("POST", f"/containers/sandbox-{sandbox.id}/kill")

    with pytest.raises(httpx2.TransportError):
        until_killed()
    assert said[-1] == "stdout"
    assert not sandbox.running()
