"""Results of a benchmark: flat metric names, spreads by case, JSON, CSV and the table on a terminal."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console

from monitor.analysis.run_metrics import MedianRange
from monitor.bench.results import (
    RunResult,
    comparison_table,
    flatten_metrics,
    format_run,
    results_to_csv,
    results_to_json,
    spreads_by_case,
)
from monitor.report.writer import summary_table
from tests.unit.monitor.bench.bench_runs import make_metrics
from tests.unit.monitor.report.report_runs import FOUR_REQUESTS, make_repeats, make_run, make_steps, summarize_runs

RUNS = [
    RunResult("cloud", "cloud-1", make_metrics(10.0)),
    RunResult("server", "server-1", error="it ended with status 1"),
    RunResult("cloud", "cloud-2", make_metrics(14.0, energy={"gpu 0": 1.5, "rail package-0": 0.5})),
    RunResult("cloud", "cloud-3", make_metrics(11.0)),
]


def test_metrics_have_flat_names_with_units() -> None:
    values = flatten_metrics(make_metrics(10.0, energy={"gpu 0": 1.5}))
    assert values["latency_ms.p50"] == 100.0
    assert values["network_ms"] == 12.3457
    assert values["stages.head.compute_ms"] == 3.0
    assert (values["links.device - cloud.bytes_out"], values["links.device - cloud.bytes_in"]) == (1000.0, 24.0)
    assert (values["cpu_s.stage"], values["energy_j.gpu 0"]) == (0.25, 1.5)
    assert "network_ms" not in flatten_metrics(make_metrics(1.0, kind="training"))


def test_spreads_are_of_the_runs_that_measured_the_metric() -> None:
    spreads = spreads_by_case(RUNS)
    assert spreads["cloud"]["throughput_per_s"] == MedianRange(11.0, 10.0, 14.0, 3)
    assert spreads["cloud"]["energy_j.gpu 0"] == MedianRange(1.5, 1.5, 1.5, 1)
    assert spreads["server"] == {}


def test_json_has_failures_and_missing_measurements() -> None:
    document = json.loads(json.dumps(results_to_json(RUNS)))
    cloud, server = document["suites"]["cloud"], document["suites"]["server"]
    assert (cloud["runs"], cloud["failed_runs"], cloud["kind"]) == (3, 0, "inference")
    assert cloud["metrics"]["throughput_per_s"] == {"median": 11.0, "min": 10.0, "max": 14.0}
    assert server == {"runs": 1, "failed_runs": 1, "kind": None, "metrics": {}}
    first, failed, second = (document["runs"][name] for name in ("cloud-1", "server-1", "cloud-2"))
    assert failed == {"suite": "server", "error": "it ended with status 1"}
    assert (first["energy_j"], first["energy_missing"]) == (None, "rapl: only root may read it")
    assert (second["energy_j"], second["energy_missing"], second["energy_j.gpu 0"]) == (2.0, None, 1.5)


def test_csv_has_a_row_per_run_and_all_columns() -> None:
    rows = list(csv.DictReader(io.StringIO(results_to_csv(RUNS, {"cloud": {"cut": 8}}))))
    assert [row["run"] for row in rows] == ["cloud-1", "server-1", "cloud-2", "cloud-3"]
    assert [row["throughput_per_s"] for row in rows] == ["10.0", "", "14.0", "11.0"]
    assert [row["energy_j.gpu 0"] for row in rows] == ["", "", "1.5", ""]
    assert [row["cut"] for row in rows] == ["8", "", "8", "8"]
    assert rows[1]["error"] == "it ended with status 1"


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


def test_rows_have_ratios_to_the_baseline() -> None:
    columns, (first, second) = summarize_runs([make_run("a", FOUR_REQUESTS), make_run("b", FOUR_REQUESTS[:1])])
    assert (first.label, second.label) == ("a", "b")
    throughput = first.values["throughput"]
    assert throughput is not None
    assert throughput.median == 1.5  # three results in two seconds
    assert second.ratio_to(first, "throughput") == pytest.approx(2.0 / 1.5)  # one result in half a second
    assert second.ratio_to(first, "failed") == 0.0
    assert first.ratio_to(second, "failed") is None
    table = summary_table(columns, [first, second])
    assert table.column("throughput (requests/s) ratio") == [1.0, pytest.approx(2.0 / 1.5)]


def test_metrics_without_a_measurement_have_no_column() -> None:
    names = {column.name for column in summarize_runs([make_run("a", make_steps(4.0, 2.0))])[0]}
    assert names == {"samples", "throughput", "step p50", "p95", "p99"}


def test_repeats_are_one_row() -> None:
    (row,) = summarize_runs(make_repeats(a=1, b=4, c=2))[1]
    throughput = row.values["throughput"]
    assert throughput is not None
    assert (row.label, row.repeats, throughput.median, throughput.bounds) == ("cloud", 3, 0.5, (0.25, 1.0))
