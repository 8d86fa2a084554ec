"""What the service tells of itself: its log, without anything of its callers', and its metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.serving import ALICE, BOB, Served, form, raw_request, serving, spec, tar_of, until

pytestmark = pytest.mark.usefixtures("_local")
MARKER = "m4rker-of-a-caller"
LIVE = {"Accept": "text/event-stream"}


@pytest.mark.parametrize("level", ["debug", "info"])
def test_log(level: str, tmp_path: Path) -> None:
    """Nothing that a caller sent or a script printed stands in the log, and no token; every line is JSON."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"# of the test\nalice:{ALICE}\n")
    with serving(CLOCHE_LOG=level, CLOCHE_SERVE_TOKENS=f"bob:{BOB}", CLOCHE_SERVE_TOKENS_FILE=str(tokens)) as served:
        for token in (ALICE, BOB):
            with served.client(token) as client:
                for headers in ({}, LIVE):
                    said = spec(
                        f"echo {MARKER}; echo {MARKER} >&2; echo {MARKER} >/output/{MARKER}",
                        f"{MARKER}.sh",
                        args=[MARKER],
                        env={"A": MARKER, MARKER.replace("-", "_"): "b"},
                        stdin="bTRya2VyLW9mLWEtY2FsbGVy",
                    )
                    assert MARKER in client.post("/v1/runs", json=said, headers=headers).text or headers
                workspace = tar_of({f"{MARKER}/a.sh": f"echo {MARKER}; exit 3", "b": MARKER})
                for script in (f"{MARKER}/a.sh", "none.sh"):
                    client.post("/v1/runs", files=form({"script": script}, workspace, MARKER.encode()))
                for bad in (
                    spec("true", interpreter="no-such-program", args=[MARKER]),
                    spec("true", env={"LD_PRELOAD": MARKER}),
                    spec("true", network=MARKER),
                    spec(MARKER, name=f"../{MARKER}"),
                    {**spec(MARKER), MARKER: 1},
                ):
                    assert client.post("/v1/runs", json=bad).status_code >= 400
                client.post("/v1/runs", content=b'{"content": "' + MARKER.encode())
                client.get("/healthz", headers={"X-Request-ID": f'{MARKER}"'})
        with served.client(f"{MARKER}-is-no-token") as nobody:
            nobody.get(f"/v1/posture?token={MARKER}")
        served.ask(raw_request("GET", "/healthz", X=f"{MARKER}\x00"))
        log = served.log()
    assert '"run"' in log
    for secret in (MARKER, MARKER.replace("-", "_"), ALICE, BOB, "bTRya2Vy"):
        assert secret not in log
    for line in log.splitlines():
        assert {"event", "level", "logger", "timestamp"} <= json.loads(line).keys()


def test_no_line_of_anybody_elses(served: Served) -> None:
    """A path can write no line into the log, and its own line is bounded."""
    before = len(served.log().splitlines())
    served.ask(raw_request("GET", "/%0A%7B%22event%22:%22forged%22%7D%0D%0A" + "x" * 5000))
    until(lambda: len(served.log().splitlines()) == before + 1)
    line = served.log().splitlines()[-1]
    assert json.loads(line)["event"] == "request"
    assert len(line) < 1000


def test_a_request_in_the_log(served: Served) -> None:
    """A request's line has its id, who asked, and how it went; what machines ask all the time is not told."""
    with served.client(ALICE) as alice:
        alice.get("/readyz", headers={"X-Request-ID": "quiet"})
        alice.get("/v1/runs/none", headers={"X-Request-ID": "loud-1"})
    until(lambda: "loud-1" in served.log())
    (line,) = [line for line in served.logged() if line.get("request_id") == "loud-1"]
    assert (line["caller"], line["method"], line["path"], line["status"]) == ("alice", "GET", "/v1/runs/none", 404)
    assert "quiet" not in served.log()


def numbers(served: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with served.client() as nobody:
        text = nobody.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(served: Served) -> None:
    """What was done is counted: runs by outcome, failures and refusals by code, phases as histograms."""

    def since(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return numbers(served).get(key, 0) - before.get(key, 0)

    before = numbers(served)
    with served.client(ALICE) as alice, served.client() as nobody:
        alice.post("/v1/runs", json=spec("true"))
        alice.post("/v1/runs", json=spec("exit 1"))
        alice.post("/v1/runs", json=spec("kill -9 $$"))
        alice.post("/v1/runs", json=spec("sleep 9", timeout=0.2))
        alice.post("/v1/runs", json=spec("true", interpreter="none"))
        alice.post("/v1/runs", json=spec("true", timeout=0))
        nobody.post("/v1/runs")
        nobody.get("/nowhere")
    mode = "local"
    assert since("cloche_runs_total", mode=mode, outcome="exited") == 2
    assert since("cloche_runs_total", mode=mode, outcome="signaled") == 1
    assert since("cloche_runs_total", mode=mode, outcome="timed_out") == 1
    assert since("cloche_runs_total", mode=mode, outcome="failed") == 1
    assert since("cloche_run_failures_total", mode=mode, code="interpreter-missing") == 1
    for code in ("interpreter-missing", "invalid-spec", "unauthorized", "not-found"):
        assert since("cloche_requests_refused_total", code=code) == 1
    for phase in ("queued", "prepare", "start", "run", "collect", "total"):
        assert since("cloche_phase_seconds_count", mode=mode, phase=phase) == 4
    assert 0.2 < since("cloche_phase_seconds_sum", mode=mode, phase="run") < 10
    now = numbers(served)
    assert now["cloche_places", ()] == 4
    until(lambda: numbers(served)["cloche_runs_in_flight", ()] == 0)
    for name in (
        "cloche_queue_length",
        "cloche_swept_total",
        "cloche_sweeps_failed_total",
        "cloche_removals_failed_total",
    ):
        assert now[name, ()] == 0
    assert not [name for name, _ in now if name.endswith("_created")]
    assert [dict(labels)["mode"] for name, labels in now if name == "cloche_info"] == [mode]
