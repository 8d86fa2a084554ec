"""What is refused, with which status and code, and what else the answer says."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import pytest
from tests.server.serving import ALICE, BOB, Served, form, raw_request, raw_run, spec, tar_of, until

from cloche.server.problems import Problem

JSON = {"Content-Type": "application/json"}
BOUNDARY = {"Content-Type": "multipart/form-data; boundary=b"}


def part(name: str, data: bytes, more: str = "") -> bytes:
    """A part of a form, its headers as they are."""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n"


SPEC_PART = part("spec", json.dumps(spec("true")).encode())
BODIES: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "nothing": (b"", JSON, 422, "invalid-spec"),
    "no JSON": (b"{", JSON, 422, "invalid-spec"),
    "no object": (b"[]", JSON, 422, "invalid-spec"),
    "no text": (b'{"content": "\xff"}', JSON, 422, "invalid-spec"),
    "deep": (b"[" * 200_000, JSON, 422, "invalid-spec"),
    "not a number": (b'{"content":"true","name":"a.sh","timeout":NaN}', JSON, 422, "invalid-spec"),
    "infinite": (b'{"content":"true","name":"a.sh","timeout":1e999}', JSON, 422, "invalid-spec"),
    "a huge number": (b'{"content":"true","name":"a.sh","pids":' + b"9" * 10_000 + b"}", JSON, 422, "invalid-spec"),
    "a name twice": (b'{"content":"true","name":"a.sh","name":"b.py"}', JSON, 422, "invalid-spec"),
    "an unknown field": (json.dumps(spec("true", colour="red")).encode(), JSON, 422, "invalid-spec"),
    "no script": (b"{}", JSON, 422, "invalid-spec"),
    "a bad limit": (json.dumps(spec("true", timeout=0)).encode(), JSON, 422, "invalid-spec"),
    "a script of the host": (b'{"script":"/etc/passwd"}', JSON, 422, "invalid-spec"),
    "a workspace of the host": (json.dumps(spec("true", workspace="/etc")).encode(), JSON, 422, "invalid-spec"),
    "no workspace": (json.dumps(spec("true", workspace=None)).encode(), JSON, 422, "invalid-spec"),
    "stdin that is no base64": (json.dumps(spec("true", stdin="a?")).encode(), JSON, 422, "invalid-spec"),
    "stdin that is no text": (json.dumps(spec("true", stdin=[1])).encode(), JSON, 422, "invalid-spec"),
    "a name that leads out": (json.dumps(spec("true", name="../a.sh")).encode(), JSON, 422, "invalid-spec"),
    "a loader's variable": (json.dumps(spec("true", env={"LD_PRELOAD": "x"})).encode(), JSON, 422, "invalid-spec"),
    "too much isolation": (
        json.dumps(spec("true", min_isolation="kernel")).encode(),
        JSON,
        422,
        "isolation-unavailable",
    ),
    "no interpreter": (json.dumps(spec("true", interpreter="none")).encode(), JSON, 422, "interpreter-missing"),
    "a large script": (json.dumps(spec("#" * 70_000)).encode(), JSON, 413, "script-too-large"),
    "much stdin": (json.dumps(spec("true", stdin="QUFB" * 1_500_000)).encode(), JSON, 413, "workspace-too-large"),
    "no type": (b"{}", {}, 415, "unsupported-media-type"),
    "another type": (b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported-media-type"),
    "another charset": (
        SPEC_PART + b"--b--\r\n",
        {"Content-Type": "multipart/form-data; boundary=b; charset=punycode"},
        415,
        "unsupported-media-type",
    ),
    "a form without a boundary": (SPEC_PART, {"Content-Type": "multipart/form-data"}, 422, "invalid-spec"),
    "a form that is none": (b"hello", BOUNDARY, 422, "invalid-spec"),
    "a form without an end": (SPEC_PART[:-20], BOUNDARY, 422, "invalid-spec"),
    "a form without a spec": (part("stdin", b"x") + b"--b--\r\n", BOUNDARY, 422, "invalid-spec"),
    "a form with something else": (SPEC_PART + part("more", b"x") + b"--b--\r\n", BOUNDARY, 422, "invalid-spec"),
    "a form with two specs": (SPEC_PART + SPEC_PART + b"--b--\r\n", BOUNDARY, 422, "invalid-spec"),
    "a form of many parts": (SPEC_PART + part("x", b"x") * 1000 + b"--b--\r\n", BOUNDARY, 422, "invalid-spec"),
    "a form of many files": (
        SPEC_PART + part("x", b"x", '; filename="a"') * 1000 + b"--b--\r\n",
        BOUNDARY,
        422,
        "invalid-spec",
    ),
    "a form with a large head": (part("x" * 1_000_000, b"") + b"--b--\r\n", BOUNDARY, 422, "invalid-spec"),
    "a form with a nameless part": (b"--b\r\nX: y\r\n\r\nx\r\n--b--\r\n", BOUNDARY, 422, "invalid-spec"),
    "a workspace that is text": (SPEC_PART + part("workspace", b"x") + b"--b--\r\n", BOUNDARY, 422, "invalid-spec"),
    "a workspace that is no archive": (
        SPEC_PART + part("workspace", b"x" * 2000, '; filename="a"') + b"--b--\r\n",
        BOUNDARY,
        422,
        "invalid-spec",
    ),
    "stdin twice": (
        part("spec", json.dumps(spec("true", stdin="")).encode()) + part("stdin", b"x") + b"--b--\r\n",
        BOUNDARY,
        422,
        "invalid-spec",
    ),
}


def check(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """It is a problem, with this status and code, and says what to do."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    Problem.model_validate(problem, strict=True, extra="forbid")
    assert problem["code"] == code
    assert problem["status"] == status
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    assert problem["hint"]
    assert (answer.headers.get("Retry-After") is not None) is (problem["retryable"] and status in {429, 503})
    return problem


@pytest.mark.parametrize("what", BODIES)
def test_body(alice: httpx2.Client, what: str) -> None:
    """What describes no run is refused with the code that says so, and is a problem."""
    body, headers, status, code = BODIES[what]
    check(alice.post("/v1/runs", content=body, headers=headers), status, code)


def test_beyond_the_ceilings(alice: httpx2.Client) -> None:
    """A request for more than the operator allows is refused, and its workspace is gone."""
    for asked in ({"network": "open"}, {"image": "other:1"}, {"memory": "8Gi"}, {"timeout": 7200}):
        described = {"name": "a.sh", "content": "true", **asked}
        check(alice.post("/v1/runs", json=described), 422, "invalid-spec")
        check(alice.post("/v1/runs", files=form(described, tar_of({"b": ""}))), 422, "invalid-spec")


def test_no_script_in_the_workspace(alice: httpx2.Client) -> None:
    """A script that is not in its workspace is told to be missing, without the service's paths; one that leads out is none."""
    workspace = tar_of({"a.sh": "true"})
    problem = check(alice.post("/v1/runs", files=form({"script": "b.sh"}, workspace)), 422, "script-not-found")
    assert "/" not in problem["detail"]
    for path in ("../../etc/passwd", "/etc/passwd", "a.sh/..", ""):
        check(alice.post("/v1/runs", files=form({"script": path}, workspace)), 422, "invalid-spec")


def test_large_workspace(alice: httpx2.Client) -> None:
    """A workspace, or one with stdin, that is larger than the bound is told to be so, whatever its archive's size."""
    fits = bytes(4 * 2**20 - 100)
    answer = alice.post("/v1/runs", files=form({"script": "a.sh"}, tar_of({"a.sh": "true", "b": fits})))
    assert answer.status_code == 200
    large = tar_of({"a.sh": "true", "b": bytes(5 * 2**20)})
    check(alice.post("/v1/runs", files=form({"script": "a.sh"}, large)), 413, "workspace-too-large")
    with_stdin = form({"script": "a.sh"}, tar_of({"a.sh": "true", "b": fits}), b"x" * 200)
    check(alice.post("/v1/runs", files=with_stdin), 413, "workspace-too-large")
    many = tar_of({f"{i}": "" for i in range(20_001)})
    check(alice.post("/v1/runs", files=form({"script": "a.sh"}, many)), 413, "workspace-too-large")


def test_link_out(alice: httpx2.Client) -> None:
    """A link that leads out of the workspace is refused before anything follows it."""
    import io
    import tarfile

    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        info = tarfile.TarInfo("a.sh")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    for given in ({"script": "a.sh"}, spec("cat a.sh", "b.sh")):
        check(alice.post("/v1/runs", files=form(given, made.getvalue())), 422, "invalid-spec")


@pytest.mark.parametrize("run_id", ["", "a", "A1", "1a", "a" * 33, "a_b", "a/b", "a-", "a\r\nX-Evil: 1", "a\n", "ä1"])
def test_bad_run_id(alice: httpx2.Client, run_id: str) -> None:
    """An id that is none is refused, and gets into no header."""
    answer = alice.post("/v1/runs", params={"run_id": run_id}, json=spec("true"))
    check(answer, 422, "invalid-spec")
    assert "X-Evil" not in answer.headers


def test_run_id_twice(alice: httpx2.Client, bob: httpx2.Client) -> None:
    """An id is used once, whoever uses it."""
    assert alice.post("/v1/runs?run_id=once", json=spec("true")).status_code == 200
    for client in (alice, bob):
        assert check(client.post("/v1/runs?run_id=once", json=spec("true")), 409, "run-exists")["run_id"] == "once"


@pytest.mark.parametrize(
    "path",
    ["/v1/runs/none", "/v1/runs/none/artifacts/a", "/nowhere", "/v1", "/v1/runs/", "/healthz/", "/v1/runs/a%0Ab"],
)
def test_not_found(alice: httpx2.Client, path: str) -> None:
    """What is not there is a problem, and never a redirect."""
    check(alice.get(path), 404, "not-found")


def test_others_runs(alice: httpx2.Client, bob: httpx2.Client) -> None:
    """A token sees its own runs only: others' are not there, in no way."""
    assert alice.post("/v1/runs?run_id=hers", json=spec("echo x >/output/f; echo secret")).status_code == 200
    later = {"Prefer": "respond-async"}
    alice.post("/v1/runs?run_id=hers-live", json=spec("sleep 20"), headers=later)
    for run_id in ("hers", "hers-live"):
        unknown = check(bob.get("/v1/runs/none"), 404, "not-found")
        problem = check(bob.get(f"/v1/runs/{run_id}"), 404, "not-found")
        assert problem["detail"] == unknown["detail"].replace("none", run_id)
        check(bob.get(f"/v1/runs/{run_id}/artifacts/f"), 404, "not-found")
        check(bob.delete(f"/v1/runs/{run_id}?kill=true"), 404, "not-found")
    assert alice.get("/v1/runs/hers").json()["result"]["stdout"] == "secret\n"
    assert alice.get("/v1/runs/hers-live").json()["state"] == "running"
    alice.delete("/v1/runs/hers-live?kill=true")
    until(lambda: alice.get("/v1/runs/hers-live").json()["state"] == "finished")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/runs", "POST"),
        ("OPTIONS", "/v1/runs", "POST"),
        ("PUT", "/v1/runs/abc", "DELETE, GET"),
        ("POST", "/healthz", "GET"),
        ("TRACE", "/metrics", "GET"),
        ("BREW", "/docs", "GET"),
    ],
)
def test_method(alice: httpx2.Client, method: str, path: str, allowed: str) -> None:
    """A method that a path does not have is refused, and told what it has."""
    answer = alice.request(method, path)
    check(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == allowed


def test_head(served: Served) -> None:
    """HEAD is a method like others, and its answer has no body, so that the next one is understood."""
    head = raw_request("HEAD", "/healthz")
    answer = served.ask(head + raw_request("GET", "/healthz", Connection="close"))
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert answer.partition(b"\r\n\r\n")[2].startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong-token-of-some-length",
        f"Basic {ALICE}",
        ALICE,
        f"Bearer {ALICE}x",
        f"Bearer {ALICE[:-1]}",
        f"Bearer {ALICE},{BOB}",
        f"Bearer {ALICE.upper()}",
        f"Token {ALICE}",
        f"Bearer\t{ALICE}",
        "Bearer \xff\xfe",
    ],
)
def test_no_token(served: Served, authorization: str | None) -> None:
    """Without a token that is known nothing is told and nothing is read; the open pages stay open."""
    headers = {} if authorization is None else {b"Authorization": authorization.encode("latin-1")}
    with served.client() as nobody:
        for method, path in (
            ("POST", "/v1/runs"),
            ("POST", "/v1/runs?run_id=A"),
            ("GET", "/v1/runs/none"),
            ("DELETE", "/v1/runs/none"),
            ("GET", "/v1/runs/none/artifacts/a"),
            ("GET", "/v1/posture"),
        ):
            answer = nobody.request(method, path, headers=headers)
            check(answer, 401, "unauthorized")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert nobody.get("/healthz").status_code == 200


def test_scheme_in_small_letters(served: Served) -> None:
    """The scheme's name may be written in any way (RFC 9110, 11.1)."""
    with served.client() as nobody:
        assert nobody.get("/v1/posture", headers={"Authorization": f"bearer {ALICE}"}).status_code == 200


def test_limit_of_a_token(served: Served, bob: httpx2.Client, alice: httpx2.Client) -> None:
    """A token has no more runs at a time than its own limit; another one's are not concerned, and ended ones do not count."""
    later = {"Prefer": "respond-async"}
    runs = [bob.post("/v1/runs", json=spec("sleep 20"), headers=later).json()["run_id"] for _ in range(3)]
    problem = check(bob.post("/v1/runs", json=spec("true")), 429, "too-many-runs")
    assert "bob" in problem["detail"]
    assert alice.post("/v1/runs", json=spec("true")).status_code == 200
    # What is not taken is not read either.
    announced = raw_request("POST", "/v1/runs", token=BOB, Content_Length="1000000", Content_Type="application/json")
    assert served.ask(announced).startswith(b"HTTP/1.1 429 ")
    bob.delete(f"/v1/runs/{runs[0]}?kill=true")
    until(lambda: bob.get(f"/v1/runs/{runs[0]}").json()["state"] == "finished")
    assert bob.post("/v1/runs", json=spec("true")).status_code == 200
    for run_id in runs[1:]:
        bob.delete(f"/v1/runs/{run_id}?kill=true")
    until(lambda: bob.get(f"/v1/runs/{runs[2]}").json()["state"] == "finished")


def test_two_lengths(served: Served) -> None:
    """A request that says in two ways how long it is ends its connection: what follows may be somebody else's words."""
    body = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    request = raw_request(
        "POST", "/v1/runs", body, token=ALICE, Content_Length=str(len(body)), Transfer_Encoding="chunked"
    )
    answer = served.ask(request)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nconnection: close\r\n" in answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert "smuggled" not in served.log()


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /v1/runs HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /v1/runs HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/runs HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Request-ID: a\x00b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000,
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_garbage(served: Served, request_: bytes) -> None:
    """What is no HTTP, or too large a head, is refused, and the service lives on."""
    answer = served.ask(request_)
    assert answer[:12] in {b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 501", b""}
    assert served.ask(raw_request("GET", "/healthz")).startswith(b"HTTP/1.1 200 ")


def test_body_that_nobody_wants(served: Served) -> None:
    """What comes of a refused request's body is not taken for the next request."""
    hidden = raw_request("GET", "/smuggled")
    unknown = raw_request("POST", "/v1/runs", hidden, token="nobody-knows-this-one", Content_Type="application/json")
    answer = served.ask(unknown + raw_request("GET", "/healthz", Connection="close"))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"401", b"200"]
    assert "smuggled" not in served.log()


def test_pipelined_runs(served: Served) -> None:
    """Requests that come in one piece are answered one after the other."""
    requests = raw_run(spec("echo 1"), token=ALICE) + raw_run(spec("echo 2"), token=ALICE, Connection="close")
    answer = served.ask(requests)
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert answer.index(b'"stdout":"1\\n"') < answer.index(b'"stdout":"2\\n"')
