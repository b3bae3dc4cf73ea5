"""Statistics of an inference run."""

from __future__ import annotations

import numpy as np
import pytest

from brokers.protocol.stage_timing import Hop
from sources.inference.run_stats import InferenceRunStats


def hop(stage: str, worker: str, compute_ms: float) -> Hop:
    return Hop(stage, worker, 1.0, 2.0, compute_ms, 4.0, bytes_in=10, bytes_out=20)


def test_summary_has_counts_rates_and_stage_means() -> None:
    stats = InferenceRunStats()
    for index in range(4):
        stats.record_request(10.0 + index)
    stats.record_result(100.0, [hop("head", "a", 30.0), hop("tail", "c", 5.0)], 12.0)
    stats.record_result(300.0, [hop("head", "b", 50.0), hop("tail", "c", 7.0)], 14.0)
    stats.record_failure("BadPayload", 15.0)
    summary = stats.summary(["head", "tail"])
    assert {key: summary[key] for key in summary if key not in ("latency_ms", "stages")} == {
        "requests": 4, "results": 2, "failed": 1, "failures": {"BadPayload": 1}, "lost": 1,
        "elapsed_s": 5.0, "throughput_per_s": 0.4,
    }  # fmt: skip
    assert list(summary["stages"]) == ["head", "tail"]
    assert summary["stages"]["head"] == {
        "workers": 2, "tasks": 2, "queue_ms": 1.0, "decode_ms": 2.0, "compute_ms": 40.0, "encode_ms": 4.0,
        "bytes_in": 20, "bytes_out": 40,
    }  # fmt: skip
    assert summary["stages"]["tail"]["workers"] == 1


def test_summary_of_an_empty_run_has_no_latencies() -> None:
    assert InferenceRunStats().summary() == {
        "requests": 0, "results": 0, "failed": 0, "failures": {}, "lost": 0,
        "elapsed_s": 0.0, "throughput_per_s": 0.0, "latency_ms": {}, "stages": {},
    }  # fmt: skip


def test_percentiles_are_nearest_rank() -> None:
    """As in results.csv and the report: rounding ranks instead would make p95 of these 1.0 or 90.0."""
    latencies_ms = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 90.0, 100.0]
    stats = InferenceRunStats()
    for latency_ms in latencies_ms:
        stats.record_result(latency_ms, [], 1.0)
    expected = np.percentile(latencies_ms, [50, 95, 99], method="inverted_cdf")
    assert stats.summary()["latency_ms"] == dict(zip(("p50", "p95", "p99"), expected, strict=True))
    assert expected.tolist() == [5.0, 100.0, 100.0]


def test_percentiles_are_those_of_the_newest_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sources.inference.run_stats._RECENT_LATENCIES", 10)
    stats = InferenceRunStats()
    for index in range(20):
        stats.record_result(1.0 if index < 10 else 9.0, [], float(index))
    assert stats.summary()["latency_ms"]["p50"] == 9.0
    assert stats.results == 20
