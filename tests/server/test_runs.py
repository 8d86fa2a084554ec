"""Runs over HTTP: what comes back is what the library gives."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import zipfile
from dataclasses import fields
from io import BytesIO
from typing import Any

import httpx2
import pytest
from tests.server.serving import ALICE, Served, as_events, events_of, form, raw_request, spec, tar_of, until

import cloche
from cloche.events import Artifact, Finished, Output, Started
from cloche.isolation import Guarantee
from cloche.wire import result_from_dict

LIVE = {"Accept": "text/event-stream"}
LATER = {"Prefer": "respond-async"}
SSE = "text/event-stream; charset=utf-8"


def run(client: httpx2.Client, given: dict[str, Any], **headers: str) -> cloche.Result:
    answer = client.post("/v1/runs", json=given, headers=headers)
    assert answer.status_code == 200, answer.text
    return result_from_dict(answer.json())


def test_result(alice: httpx2.Client) -> None:
    """A run is answered with its result, the same as the library's, whatever the script did."""
    result = run(
        alice,
        spec(
            "import os, sys; print(sys.argv[1:], os.environ['A'], sys.stdin.read()); sys.stderr.write('e'); sys.exit(3)",
            "a.py",
            args=["x", "ü"],
            env={"A": "b"},
            stdin=base64.b64encode(b"in").decode(),
        ),
    )
    assert (result.outcome, result.exit_code) == ("exited", 3)
    assert (result.stdout, result.stderr) == ("['x', 'ü'] b in\n", "e")
    assert (result.mode, result.isolation) == ("local", "namespace")


def test_headers_of_an_answer(alice: httpx2.Client) -> None:
    """An answer names its run, is for nobody's cache, and is what it says."""
    answer = alice.post("/v1/runs?run_id=mine-1", json=spec("true"))
    assert answer.json()["run_id"] == answer.headers["Cloche-Run-Id"] == "mine-1"
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "Server" not in answer.headers


@pytest.mark.parametrize(
    ("asked", "kept"),
    [("abc-1.2_3", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("a;b", False), ("", False)],
)
def test_request_id(alice: httpx2.Client, asked: str, *, kept: bool) -> None:
    """A request's own id is told back where it is a sane one; else it gets another."""
    for path in ("/healthz", "/v1/posture", "/v1/runs/none", "/nowhere"):
        told = alice.get(path, headers={"X-Request-ID": asked}).headers.get_list("X-Request-ID")
        assert len(told) == 1
        assert (told[0] == asked) is kept
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", told[0])


def test_signal_and_time(alice: httpx2.Client) -> None:
    """A signal and a time that is over are results too."""
    assert run(alice, spec("kill -9 $$")).signal == "SIGKILL"
    assert run(alice, spec("echo begun; sleep 20", timeout=0.3)).outcome == "timed_out"


def test_binary(alice: httpx2.Client) -> None:
    """Bytes go in and come out as they are: stdin as a part, output in the events, artifacts by download."""
    data = bytes(range(256)) * 50
    script = spec("tee /output/all; exit 0")
    answer = alice.post("/v1/runs", files=form(script, stdin=data), headers=LIVE)
    events = as_events(answer.text)
    assert b"".join(event.data for event in events if isinstance(event, Output)) == data
    assert [event.data for event in events if isinstance(event, Artifact)] == [data]
    download = alice.get(f"/v1/runs/{answer.headers['Cloche-Run-Id']}/artifacts/all")
    assert download.content == data
    assert download.headers["Content-Type"] == "application/octet-stream"
    assert download.headers["Content-Disposition"] == "attachment; filename*=UTF-8''all"
    assert download.headers["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert download.headers["Cloche-Truncated"] == "false"


def test_workspace(alice: httpx2.Client) -> None:
    """A workspace comes as a tar or a zip file; the script is a path inside it."""
    files = {"main.sh": "cat data/a; ls", "data/a": "hello\n"}
    zipped = BytesIO()
    with zipfile.ZipFile(zipped, "w") as made:
        for name, text in files.items():
            made.writestr(name, text)
    for archive in (tar_of(files), zipped.getvalue()):
        answer = alice.post("/v1/runs", files=form({"script": "main.sh"}, archive))
        assert answer.json()["stdout"] == "hello\ndata\nmain.sh\n"
    inline = alice.post("/v1/runs", files=form(spec("cat data/a"), tar_of(files)))
    assert inline.json()["stdout"] == "hello\n"


def test_form_without_a_workspace(alice: httpx2.Client) -> None:
    """A form may have a spec alone, also as a file."""
    assert alice.post("/v1/runs", files=form(spec("echo hi"))).json()["stdout"] == "hi\n"
    as_file = {"spec": ("spec.json", json.dumps(spec("echo hi")), "application/json")}
    assert alice.post("/v1/runs", files=as_file).json()["stdout"] == "hi\n"


def test_nothing_stays_of_a_workspace(served: Served, alice: httpx2.Client) -> None:
    """When its run is over the folder is gone, and so it is when there is no run of it."""
    alice.post("/v1/runs", files=form({"script": "a.sh"}, tar_of({"a.sh": "true"})))
    alice.post("/v1/runs", files=form({"script": "none.sh"}, tar_of({"a.sh": "true"})))
    alice.post("/v1/runs", files=form({"script": "a.sh"}, tar_of({"a.sh": "x"})[:700]))
    alice.post("/v1/runs", files=form({"bad": 1}, tar_of({"a.sh": "x"})))
    until(lambda: not served.uploads())


def test_events(alice: httpx2.Client) -> None:
    """Events come in order, are the library's, and end with the last one; the result that is kept is their fold."""
    answer = alice.post("/v1/runs", json=spec("echo one; echo two >&2; echo x >/output/f; exit 4"), headers=LIVE)
    assert answer.headers["Content-Type"] == SSE
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert all(name == data["event"] for name, data in events_of(answer.text))
    events = as_events(answer.text)
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert events[-1].exit_code == 4
    fold = cloche.Fold()
    for event in events:
        fold.add(event)
    run_id = answer.headers["Cloche-Run-Id"]
    assert alice.get(f"/v1/runs/{run_id}").json() == {
        "run_id": run_id,
        "state": "finished",
        "result": fold.result().to_dict(),
    }


def test_events_come_as_they_happen(alice: httpx2.Client) -> None:
    """An event is there while the script still runs, and the stream is from the beginning on."""
    with alice.stream("POST", "/v1/runs", json=spec("echo up; sleep 20"), headers=LIVE) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith(":")
        for line in lines:
            if '"output"' in line:
                break
        run_id = answer.headers["Cloche-Run-Id"]
        assert alice.get(f"/v1/runs/{run_id}").json()["state"] == "running"
        assert alice.delete(f"/v1/runs/{run_id}").status_code == 202
        text = "\n".join(lines)
    assert events_of(text)[-1][1]["outcome"] == "cancelled"


def test_error_after_the_beginning_of_a_stream(alice: httpx2.Client) -> None:
    """A run that could not happen after all ends its stream with an error, which is a problem."""
    answer = alice.post("/v1/runs", json=spec("true", interpreter="no-such-program"), headers=LIVE)
    assert answer.status_code == 200
    (name, problem) = events_of(answer.text)[-1]
    assert name == "error"
    assert (problem["code"], problem["status"]) == ("interpreter-missing", 422)
    assert problem["run_id"] == answer.headers["Cloche-Run-Id"]
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    kept = alice.get(f"/v1/runs/{problem['run_id']}").json()["result"]
    assert (kept["outcome"], kept["error"]["code"]) == ("failed", "interpreter-missing")
    result_from_dict(kept)


def test_later(alice: httpx2.Client) -> None:
    """Asked to, the service answers at once; the run goes on without its caller and can be asked for."""
    answer = alice.post("/v1/runs?run_id=later-1", json=spec("sleep 0.3; echo done"), headers=LATER)
    assert answer.status_code == 202
    assert answer.headers["Location"] == "/v1/runs/later-1"
    assert answer.headers["Preference-Applied"] == "respond-async"
    assert answer.json() == {"run_id": "later-1", "state": "running", "result": None}
    until(lambda: alice.get("/v1/runs/later-1").json()["state"] == "finished")
    assert alice.get("/v1/runs/later-1").json()["result"]["stdout"] == "done\n"


@pytest.mark.parametrize("query", ["", "?kill=true"])
def test_end(alice: httpx2.Client, query: str) -> None:
    """A run can be ended: it finishes as cancelled, with what it printed; after that, it can be forgotten."""
    run_id = alice.post("/v1/runs", json=spec("echo up; sleep 20"), headers=LATER).json()["run_id"]
    path = f"/v1/runs/{run_id}"
    until(lambda: "cloche_runs_in_flight 0" not in alice.get("/metrics").text)
    assert alice.delete(path + query).status_code == 202
    until(lambda: alice.get(path).json()["state"] == "finished")
    assert alice.get(path).json()["result"]["outcome"] == "cancelled"
    assert alice.delete(path).status_code == 204
    assert alice.get(path).status_code == alice.delete(path).status_code == 404


def test_artifacts_with_odd_names(served: Served, alice: httpx2.Client) -> None:
    """An artifact is found by its path as the result has it, and by its bytes; no path leads to anything else."""
    script = (
        "import os\nos.makedirs('/output/d')\n"
        "for n in [b'\\xff', b'\\xfe', b'a b', b'd/\"x\\r\\ny', '\u00fc%2F'.encode(), b'%41']:\n"
        "    open(b'/output/' + n, 'wb').write(n)\n"
    )
    result = run(alice, spec(script, "a.py"))
    base = f"/v1/runs/{result.run_id}/artifacts/"
    assert len(result.artifacts) == 6
    for path, content in {
        "%FF": b"\xff",
        "%FE": b"\xfe",
        "a%20b": b"a b",
        "d/%22x%0D%0Ay": b'd/"x\r\ny',
        "d%2F%22x%0D%0Ay": b'd/"x\r\ny',
        "%C3%BC%252F": "\u00fc%2F".encode(),
        "%2541": b"%41",
    }.items():
        answer = alice.get(base + path)
        assert (answer.status_code, answer.content) == (200, content), path
        assert "\n" not in answer.headers["Content-Disposition"]
    assert alice.get(base + "%EF%BF%BD").content in {b"\xff", b"\xfe"}
    for path in (
        "",
        "none",
        "d",
        "d/",
        "../a%20b",
        "%2e%2e/a%20b",
        "..%2f..%2fetc/passwd",
        "/etc/passwd",
        "//a%20b",
        "%2Fetc%2Fpasswd",
        "a%20b%00",
        "./a%20b",
    ):
        raw = served.ask(raw_request("GET", base + path, token=ALICE, Connection="close"))
        assert raw.startswith(b"HTTP/1.1 404 "), path
        assert b'"code": "not-found"' in raw


def test_proof(alice: httpx2.Client) -> None:
    """Asked to prove it, the service looks from inside of a box, and says so from then on."""
    proved = alice.get("/v1/posture", params={"prove": "true"}, timeout=60).json()
    assert (proved["proved"], proved["isolation"]) == (True, "namespace")
    states = {each["name"]: each["state"] for each in proved["guarantees"]}
    assert states["memory-limit"] == "in-force"
    assert alice.get("/v1/posture").json() == proved


def test_posture(alice: httpx2.Client) -> None:
    """The posture is the library's."""
    posture = alice.get("/v1/posture").json()
    assert (posture["mode"], posture["available"], posture["isolation"]) == ("local", True, "namespace")
    assert (posture["fallback_from"], posture["runs"]) == (None, True)
    assert posture["guarantees"][0].keys() == {field.name for field in fields(Guarantee)}


def test_open_pages(served: Served) -> None:
    """Health, readiness, metrics and the description are for everybody; the page needs nothing from elsewhere."""
    with served.client() as nobody:
        assert nobody.get("/healthz").json() == {"status": "ok"}
        assert nobody.get("/readyz").json() == {"status": "ready"}
        assert nobody.get("/metrics").headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert nobody.get("/openapi.json").json()["openapi"].startswith("3.")
        page = nobody.get("/docs")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.headers["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert "src=" not in page.text
    assert "//" not in page.text.replace("<!doctype", "")


def test_own_process_is_not_readable(served: Served, alice: httpx2.Client) -> None:
    """A script sees neither the service's environment nor what other requests brought."""
    script = "cat /proc/*/environ; ls -R /tmp; env"
    stdout = run(alice, spec(script)).stdout
    assert "SERVE_TOKENS" not in stdout
    assert "cloche-serve" not in stdout
    assert os.fspath(served.folder) not in stdout
