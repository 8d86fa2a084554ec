"""The process: where it listens, what it needs, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from tests.server.serving import (
    ALICE,
    Served,
    as_events,
    events_of,
    form,
    raw_run,
    serve_command,
    serving,
    spec,
    tar_of,
    until,
)

pytestmark = pytest.mark.usefixtures("_local")
LIVE = {"Accept": "text/event-stream"}
LATER = {"Prefer": "respond-async"}


class Call(threading.Thread):
    """A run that a client waits for."""

    def __init__(self, served: Served, given: dict[str, Any], **headers: str) -> None:
        super().__init__()
        self._served, self._given, self._headers = served, given, headers
        self.answer: httpx2.Response | None = None
        self.start()

    def run(self) -> None:
        with self._served.client() as client:
            self.answer = client.post("/v1/runs", json=self._given, headers=self._headers)

    def result(self) -> httpx2.Response:
        self.join(60)
        assert self.answer is not None
        return self.answer


def in_flight(served: Served) -> int:
    with served.client() as client:
        (line,) = [
            line for line in client.get("/metrics").text.splitlines() if line.startswith("cloche_runs_in_flight ")
        ]
    return int(float(line.split()[1]))


def refuse(**settings: str) -> str:
    """What is said by a service that cannot begin."""
    command, environ = serve_command(**settings)
    ended = subprocess.run(command, env=environ, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 125
    assert not ended.stdout
    said = ended.stderr.decode()
    assert "Traceback" not in said
    return said


@pytest.fixture(autouse=True)
def _no_children() -> Iterator[None]:
    """A service that has ended leaves no process."""
    yield
    until(lambda: not [child for child in psutil.Process().children(recursive=True) if child.name() == "bwrap"])


# --- the beginning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "[::ffff:127.0.0.1]:0"])
def test_without_tokens_on_loopback_only(address: str) -> None:
    """Without tokens the service listens on loopback only, and says what to do."""
    said = refuse(CLOCHE_SERVE_ADDRESS=address)
    assert "loopback only" in said
    assert "CLOCHE_SERVE_TOKENS" in said


def test_with_tokens_anywhere() -> None:
    """With tokens it listens wherever it is told to, and says nothing of missing ones."""
    with serving(CLOCHE_SERVE_ADDRESS="0.0.0.0:0", CLOCHE_SERVE_TOKENS=f"alice:{ALICE}") as served:
        with served.client(ALICE) as alice:
            assert alice.get("/v1/posture").status_code == 200
        first = served.logged()[0]
        assert (first["event"], first["tokens"]) == ("listening", True)
        assert "no tokens" not in served.log()


def test_loopback_of_ipv6() -> None:
    """It listens at IPv6's loopback too, and says its address as one that a client takes."""
    with serving(CLOCHE_SERVE_ADDRESS="[::1]:0") as served:
        address = served.logged()[0]["address"]
        assert address == f"http://[::1]:{served.port}"
        with httpx2.Client(trust_env=False) as client:
            assert client.get(f"{address}/healthz").status_code == 200
        assert "no tokens are set" in served.log()


def test_address_that_is_taken() -> None:
    """An address that is taken is told so."""
    with serving() as served:
        assert "cannot listen" in refuse(CLOCHE_SERVE_ADDRESS=f"127.0.0.1:{served.port}")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"CLOCHE_SERVE_ADDRESS": "somewhere"}, "CLOCHE_SERVE_ADDRESS"),
        ({"CLOCHE_SERVE_TOKENS": "alice:short"}, "Entry 1 of CLOCHE_SERVE_TOKENS"),
        ({"CLOCHE_SERVE_TOKENS": " , "}, "no token"),
        ({"CLOCHE_SERVE_TOKENS_FILE": "/nonexistent/tokens"}, "/nonexistent/tokens"),
        ({"CLOCHE_MODE": "docker", "CLOCHE_FALLBACK": "false", "CLOCHE_DOCKER_HOST": "unix:///nonexistent"}, "docker"),
        ({"CLOCHE_MIN_ISOLATION": "kernel", "CLOCHE_MODE": "nonsense"}, "CLOCHE_MODE"),
        ({"CLOCHE_SERVE_TOKEN": "x"}, "CLOCHE_SERVE_TOKENS"),
    ],
)
def test_what_it_cannot_begin_with(settings: dict[str, str], word: str) -> None:
    """A setting or an engine with which it cannot begin is told in a sentence, with the status of all such commands."""
    assert word in refuse(**settings)


def test_no_place_for_uploads(tmp_path: Path) -> None:
    """So is a place for uploads that is none."""
    assert "TMPDIR" in refuse(TMPDIR=str(_full(tmp_path)))


def _full(folder: Path) -> Path:
    """A folder in which nobody can make another: its path is as long as one may be."""
    deep = folder
    while len(os.fspath(deep)) < 4070:
        deep = deep / ("d" * min(200, 4079 - len(os.fspath(deep))))
        deep.mkdir()
    return deep


def test_address_and_mode_by_argument() -> None:
    """What is given on the command line wins."""
    command, environ = serve_command(CLOCHE_SERVE_ADDRESS="nonsense", CLOCHE_MODE="nonsense")
    command += ["--address", "0.0.0.0:0", "--mode", "local"]
    ended = subprocess.run(command, env=environ, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 125
    assert b"loopback only, not at 0.0.0.0:0" in ended.stderr


# --- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_end_with_nothing_to_do(number: signal.Signals) -> None:
    """Asked to end, it ends with 0, soon, idle connections or not, and leaves nothing of its own."""
    with serving() as served:
        with served.client() as client:
            client.get("/healthz")
            begun = time.monotonic()
            served.process.send_signal(number)
            assert served.process.wait(30) == 0
        assert time.monotonic() - begun < 5
        assert [line["event"] for line in served.logged()][-2:] == ["ending", "ended"]
        assert not list(served.folder.glob("cloche*"))


def test_runs_may_finish() -> None:
    """A run that goes on when the end begins finishes, and its client gets the answer; new ones are refused."""
    with serving(CLOCHE_SERVE_DRAIN="30") as served:
        calls = [Call(served, spec("sleep 2; echo done")), Call(served, spec("sleep 2; echo done"), **LIVE)]
        until(lambda: in_flight(served) == 2)
        served.process.send_signal(signal.SIGTERM)
        with served.client() as client:
            until(lambda: client.get("/readyz").status_code == 503)
            refused = client.post("/v1/runs", json=spec("true"))
            assert (refused.status_code, refused.json()["code"]) == (503, "shutting-down")
            assert "Retry-After" in refused.headers
            assert client.get("/healthz").status_code == 200
        assert calls[0].result().json()["stdout"] == "done\n"
        assert as_events(calls[1].result().text)[-1].exit_code == 0
        assert served.process.wait(30) == 0
        assert not list(served.folder.glob("cloche*"))


def test_runs_that_take_longer_are_cancelled() -> None:
    """A run that takes longer than the stated time is cancelled; its client gets that, and what it had printed."""
    with serving(CLOCHE_SERVE_DRAIN="0.5") as served:
        calls = [Call(served, spec("echo up; sleep 60")), Call(served, spec("echo up; sleep 60"), **LIVE)]
        until(lambda: in_flight(served) == 2)
        time.sleep(0.5)
        begun = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        result = calls[0].result().json()
        assert (result["outcome"], result["stdout"]) == ("cancelled", "up\n")
        assert events_of(calls[1].result().text)[-1][1]["outcome"] == "cancelled"
        assert served.process.wait(30) == 0
        assert 0.4 < time.monotonic() - begun < 10
        assert not list(served.folder.glob("cloche*"))


def test_second_signal() -> None:
    """A second signal ends what still runs at once."""
    with serving(CLOCHE_SERVE_DRAIN="60") as served:
        # One that would not be asked to end either.
        call = Call(served, spec("trap '' TERM; echo up; sleep 60"))
        until(lambda: in_flight(served) == 1)
        served.process.send_signal(signal.SIGTERM)
        until(lambda: '"ending"' in served.log())
        begun = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert call.result().json()["outcome"] == "cancelled"
        assert served.process.wait(30) == 0
        assert time.monotonic() - begun < 8


def test_run_that_nobody_waits_for() -> None:
    """A run whose caller did not wait may finish too."""
    with serving(CLOCHE_SERVE_DRAIN="30") as served:
        with served.client() as client:
            client.post("/v1/runs", json=spec("sleep 1; exit 7"), headers=LATER)
        until(lambda: in_flight(served) == 1)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
        (line,) = [line for line in served.logged() if line["event"] == "run"]
        assert line["exit_code"] == 7


def test_killed(tmp_path: Path) -> None:
    """A service that is killed takes its boxes with it; the next one removes the folders that it left, and no living one's."""
    with serving(TMPDIR=str(tmp_path)) as alive, serving(TMPDIR=str(tmp_path)) as served:
        connection = served.connect()
        with served.client() as client:
            given = form({"script": "a.sh"}, tar_of({"a.sh": "sleep 60"}))
            client.post("/v1/runs", files=given, headers=LATER)
        until(lambda: len(served.uploads()) == 1)
        until(lambda: in_flight(served) == 1)
        served.process.kill()
        served.process.wait()
        connection.close()
        assert len(list(tmp_path.glob("cloche-serve-*"))) == 2
        with serving(TMPDIR=str(tmp_path)):
            assert len(list(tmp_path.glob("cloche-serve-*"))) == 2
            assert not served.uploads()
        with alive.client() as client:
            assert client.post("/v1/runs", files=form({"script": "a.sh"}, tar_of({"a.sh": "true"}))).status_code == 200


def test_folders_that_look_like_ours(tmp_path: Path) -> None:
    """What only has the name of such a folder is left alone: a link is not followed."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").touch()
    (tmp_path / "cloche-serve-link").symlink_to(tmp_path / "other")
    (tmp_path / "cloche-serve-file").touch()
    with serving(TMPDIR=str(tmp_path)):
        assert [path.name for path in (tmp_path / "other").iterdir()] == ["precious"]
        assert (tmp_path / "cloche-serve-link").is_symlink()


def test_signal_while_a_request_comes() -> None:
    """A request that never comes to its end does not hold the end up for longer than the last answers may take."""
    with serving(CLOCHE_SERVE_DRAIN="0") as served:
        with served.connect() as connection:
            connection.sendall(raw_run(spec("true"))[:-3])
            begun = time.monotonic()
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(30) == 0
        assert time.monotonic() - begun < 10
        assert all(json.loads(line) for line in served.log().splitlines())
