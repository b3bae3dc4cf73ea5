"""The live view of an inference pipeline."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from brokers.config.pipeline_file import load_pipeline
from brokers.telemetry.percentiles import percentiles
from monitor.presence.inference_stats import InferenceStats
from monitor.terminal.views import InferenceView
from tests.support.brokers.presence_records import source_publication
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file


def render(view: InferenceView, now_s: float = 0.0) -> str:
    view._console.print(view._render(now_s))
    return view._console.export_text()


@pytest.fixture
def view(tmp_path: Path) -> InferenceView:
    pipeline = load_pipeline(write_pipeline_file(tmp_path, [stage_table("head", "double")], name="street"))
    console = Console(width=80, record=True, file=io.StringIO())
    return InferenceView(pipeline, "embedded", InferenceStats("street"), console)


def test_view_has_latency_count_and_latest_results(view: InferenceView) -> None:
    result = {"source": "door", "index": 7, "latency_ms": 50, "classes": [{"label": "cat", "score": 1}]}
    view._stats.on_result(json.dumps(result).encode(), 0.0)
    screen = render(view)
    assert all(text in screen for text in ("latency 50 ms", "1 results", "door 7", "cat 1.00"))
    assert view._line(1000.0).endswith("1 results  0.0/s  50 ms    last: cat 1.00")


def test_latencies_are_percentiles_as_in_all_of_sparse(view: InferenceView) -> None:
    latencies_ms = [(37 * number) % 101 + 0.0 for number in range(1, 101)]
    for latency_ms in latencies_ms:
        view._stats.on_result(json.dumps({"latency_ms": latency_ms}).encode(), 0.0)
    expected = percentiles(latencies_ms)
    assert f"latency {expected['p50']:.0f} ms, p95 {expected['p95']:.0f} ms" in render(view)


def test_counts_of_drops_and_failures_come_from_results_until_the_source_reports(view: InferenceView) -> None:
    view._stats.on_result(json.dumps({"error": "PoisonRequest", "dropped": 3}).encode(), 0.0)
    screen = render(view)
    assert "3 dropped" in screen
    assert "1 failed" in screen
    topic, record = source_publication("door", dropped={"superseded": 3})
    view._stats.on_presence(topic, record.to_bytes(), 0.0)
    screen = render(view)
    assert "3 dropped" not in screen
    assert "dropped superseded 3" in screen
