"""The figures of a run, from events and times that are made up."""

from __future__ import annotations

import pytest

from brokers.protocol.stage_timing import Hop
from sources.inference.run_stats import InferenceRunStats


def hop(stage: str, worker: str, compute_ms: float) -> Hop:
    return Hop(stage, worker, 1.0, 2.0, compute_ms, 4.0, bytes_in=10, bytes_out=20)


def test_a_run_adds_up() -> None:
    tally = InferenceRunStats()
    for index in range(4):
        tally.record_request(10.0 + index)
    tally.record_result(100.0, [hop("head", "a", 30.0), hop("tail", "c", 5.0)], 12.0)
    tally.record_result(300.0, [hop("head", "b", 50.0), hop("tail", "c", 7.0)], 14.0)
    tally.record_failure("BadPayload", 15.0)
    summary = tally.summary()
    assert {key: summary[key] for key in ("requests", "results", "failed", "lost")} == {
        "requests": 4, "results": 2, "failed": 1, "lost": 1,
    }  # fmt: skip
    assert summary["failures"] == {"BadPayload": 1}
    assert summary["elapsed_s"] == 5.0
    assert summary["throughput_per_s"] == 0.4
    assert summary["stages"]["head"] == {
        "workers": 2, "tasks": 2, "queue_ms": 1.0, "decode_ms": 2.0, "compute_ms": 40.0, "encode_ms": 4.0,
        "bytes_in": 20, "bytes_out": 40,
    }  # fmt: skip
    assert summary["stages"]["tail"]["workers"] == 1


def test_nothing_has_no_figures_and_divides_by_none() -> None:
    assert InferenceRunStats().summary() == {
        "requests": 0, "results": 0, "failed": 0, "failures": {}, "lost": 0,
        "elapsed_s": 0.0, "throughput_per_s": 0.0, "latency_ms": {}, "stages": {},
    }  # fmt: skip


def test_percentiles_are_results_that_were_there() -> None:
    tally = InferenceRunStats()
    for latency_ms in range(1, 102):
        tally.record_result(float(latency_ms), [], 1.0)
    assert tally.summary()["latency_ms"] == {"p50": 51.0, "p95": 96.0, "p99": 100.0}


def test_memory_stays_flat_and_the_latest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = InferenceRunStats()
    for index in range(20_000):
        tally.record_result(1.0 if index < 10_000 else 9.0, [hop("head", "a", 1.0)], float(index))
    assert len(tally._latencies_ms) == 10_000
    assert tally.summary()["latency_ms"]["p50"] == 9.0
    assert tally.results == 20_000
