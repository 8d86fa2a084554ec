"""What the service counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import cloche
from cloche.result import PHASES, Result
from cloche.runtime import Sandbox

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The text format that every Prometheus reads."""
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""From a place that is free at once to a script that runs for minutes."""


VERSION = cloche.__version__
"""Read once: it stands in a file."""


class _State(Collector):
    """What is read when somebody asks."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def collect(self) -> Iterator[Metric]:
        load, counters = self._sandbox.load, self._sandbox.counters
        yield GaugeMetricFamily("cloche_places", "Runs that may have a box at a time.", load.places)
        yield GaugeMetricFamily(
            "cloche_runs_in_flight", "Runs that have a place: their boxes are made, run or removed.", load.taken
        )
        yield GaugeMetricFamily("cloche_queue_length", "Runs that wait for a place.", load.waiting)
        for name, about, value in (
            ("swept", "What the dead left and a sweep removed.", counters.swept),
            ("sweeps_failed", "Sweeps that failed, and things that one could not remove.", counters.sweeps_failed),
            (
                "removals_failed",
                "Boxes that were not removed after their run, and are left to a sweep.",
                counters.removals_failed,
            ),
        ):
            yield CounterMetricFamily(f"cloche_{name}", about, value)


class Metrics:
    """The counters of one service, in a registry of its own."""

    def __init__(self, sandbox: Sandbox) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series for each of ours, of which nothing is made
        self._registry = CollectorRegistry()
        self._mode = sandbox.mode
        self._registry.register(_State(sandbox))
        self._runs = Counter(
            "cloche_runs",
            "Runs that ended, by how. `failed`: cloche could not run it.",
            ["mode", "outcome"],
            registry=self._registry,
        )
        self._failures = Counter(
            "cloche_run_failures",
            "Runs that could not happen, by error code.",
            ["mode", "code"],
            registry=self._registry,
        )
        self._phases = Histogram(
            "cloche_phase_seconds",
            "How long each phase of a run took.",
            ["mode", "phase"],
            buckets=BUCKETS_S,
            registry=self._registry,
        )
        self._refused = Counter(
            "cloche_requests_refused",
            "Requests that were answered with an error, by code.",
            ["code"],
            registry=self._registry,
        )
        Info("cloche", "What runs here.", registry=self._registry).info({"version": VERSION, "mode": self._mode})

    def ended(self, result: Result) -> None:
        """Count a run."""
        self._runs.labels(self._mode, str(result.outcome)).inc()
        if result.error is not None:
            self._failures.labels(self._mode, result.error.code).inc()
        for phase in PHASES:
            value: float | None = result.timings_ms[phase]  # type: ignore[literal-required]
            if value is not None:
                self._phases.labels(self._mode, phase).observe(value / 1000)

    def refused(self, code: str) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(code).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
