"""The results of a benchmark on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from monitor.bench.results import RunResult
from monitor.bench.table import comparison_table, format_run
from tests.unit.monitor.bench.bench_runs import make_metrics


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_table_fits_80_columns(kind: str) -> None:
    name = "detect-hybrid-off-device"  # the longest name of a packaged suite
    runs = [RunResult(name, f"{name}-{number}", make_metrics(123.4, 12345.0, kind)) for number in (1, 2)]
    runs.append(RunResult("gone", "gone-1", error="no"))
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(comparison_table(runs, "suite", kind == "training"))
    text = console.export_text()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    for word in (name, "123", "12345", "failed", "255"):  # the last: 0.25 s and 0.005 s of CPU time
        assert word in text


def test_run_is_one_line() -> None:
    inference, training = make_metrics(10.0), make_metrics(64.0, kind="training")
    assert format_run(RunResult("a", "a-1", inference)) == "a-1: 10.0/s, latency p50 100, p95 120, p99 130 ms"
    assert format_run(RunResult("a", "a-2", training)) == "a-2: 64.0 rows/s, a step p50 100, p95 120, p99 130 ms"
    assert format_run(RunResult("a", "a-3", error="it was late")) == "a-3: failed: it was late"
