"""What becomes of the figures of several runs: medians, spreads, one table, and which point of a sweep is best."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console

from monitor.analysis.run_metrics import LinkBytes, RunMetrics, StageTime
from monitor.bench.results import (
    MetricSpread,
    RunResult,
    flatten_metrics,
    results_to_csv,
    results_to_json,
    spreads_by_case,
)
from monitor.bench.sweep import find_best
from monitor.bench.table import comparison_table


def figures(
    rate: float, p50: float = 100.0, kind: str = "inference", energy: dict[str, float] | None = None
) -> RunMetrics:
    return RunMetrics(
        kind="training" if kind == "training" else "inference",
        samples=25,
        warm_up=5,
        failed=0,
        retries=1,
        span_s=25 / rate,
        throughput_per_s=rate,
        latency_ms={"mean": p50 + 1, "p50": p50, "p95": p50 + 20, "p99": p50 + 30},
        network_ms=None if kind == "training" else 12.34567,
        stages={"head": StageTime(1.0, 2.0, 3.0, 4.0)},
        links={"device - cloud": LinkBytes(1000.0, 24.0)},
        cpu_s={"stage": 0.25, "source": 0.005},
        energy_j=energy,
        energy_missing_reason="" if energy else "rapl: only root may read it",
    )


RUNS = [
    RunResult("cloud", "cloud-1", figures(10.0)),
    RunResult("server", "server-1", error="it ended with status 1"),
    RunResult("cloud", "cloud-2", figures(14.0, energy={"gpu 0": 1.5, "rail package-0": 0.5})),
    RunResult("cloud", "cloud-3", figures(11.0)),
]


def test_numbers_have_flat_names_with_their_units() -> None:
    found = flatten_metrics(figures(10.0, energy={"gpu 0": 1.5}))
    assert found["latency_ms.p50"] == 100.0
    assert found["network_ms"] == 12.3457
    assert found["stages.head.compute_ms"] == 3.0
    assert (found["links.device - cloud.bytes_out"], found["links.device - cloud.bytes_in"]) == (1000.0, 24.0)
    assert (found["cpu_s.stage"], found["energy_j.gpu 0"]) == (0.25, 1.5)
    assert "network_ms" not in flatten_metrics(figures(1.0, kind="training"))


def test_a_case_has_the_median_and_the_spread_of_its_runs() -> None:
    found = spreads_by_case(RUNS)
    assert found["cloud"]["throughput_per_s"] == MetricSpread(11.0, 10.0, 14.0)
    assert found["cloud"]["energy_j.gpu 0"] == MetricSpread(1.5, 1.5, 1.5)  # of the one run that measured it
    assert found["server"] == {}


def test_the_results_say_what_failed_and_what_was_not_measured() -> None:
    found = json.loads(json.dumps(results_to_json(RUNS)))
    assert (found["suites"]["cloud"]["runs"], found["suites"]["cloud"]["failed_runs"]) == (3, 0)
    assert (found["suites"]["server"]["runs"], found["suites"]["server"]["failed_runs"]) == (1, 1)
    assert found["runs"]["server-1"] == {"suite": "server", "error": "it ended with status 1"}
    assert (found["runs"]["cloud-1"]["energy_j"], found["runs"]["cloud-1"]["energy_missing"]) == (
        None,
        "rapl: only root may read it",
    )
    assert (found["runs"]["cloud-2"]["energy_j"], found["runs"]["cloud-2"]["energy_missing"]) == (2.0, None)
    assert found["runs"]["cloud-2"]["energy_j.gpu 0"] == 1.5


def test_the_csv_has_a_line_for_each_run_and_every_column() -> None:
    lines = list(csv.DictReader(io.StringIO(results_to_csv(RUNS, {"cloud": {"cut": 8}}))))
    assert [line["run"] for line in lines] == ["cloud-1", "server-1", "cloud-2", "cloud-3"]
    assert [line["throughput_per_s"] for line in lines] == ["10.0", "", "14.0", "11.0"]
    assert [line["energy_j.gpu 0"] for line in lines] == ["", "", "1.5", ""]
    assert [line["cut"] for line in lines] == ["8", "", "8", "8"]
    assert lines[1]["error"] == "it ended with status 1"


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_the_table_fits_a_terminal_of_80_columns(kind: str) -> None:
    name = "detect-hybrid-off-device"  # the longest of ours
    runs = [RunResult(name, f"{name}-{number}", figures(123.4, 12345.0, kind)) for number in (1, 2)]
    runs.append(RunResult("gone", "gone-1", error="no"))
    said = Console(file=io.StringIO(), width=80, record=True)
    said.print(comparison_table(runs, "suite", kind == "training"))
    text = said.export_text()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert name in text
    assert "123" in text
    assert "12345" in text
    assert "failed" in text


def rates(**runs: list[float]) -> list[RunResult]:
    return [
        RunResult(case, f"{case}-{number}", figures(rate))
        for case, found in runs.items()
        for number, rate in enumerate(found)
    ]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ({"a": [10.0, 11.0, 12.0], "b": [7.0, 8.0, 8.8]}, "best: a, 11/s, 37.5% above b"),
        ({"a": [10.0, 11.0, 12.0], "b": [8.0, 10.0, 10.5]}, "best: a, 11/s, within noise of b (10.0% above b)"),
        ({"a": [10.0], "b": [12.0]}, "best: b, 12/s, 20.0% above a; one run of each: what is noise is not known"),
        ({"a": [10.0, 10.0]}, "best: a, 10/s"),
    ],
)
def test_the_best_is_named_with_its_margin_or_as_noise(runs: dict[str, list[float]], said: str) -> None:
    assert str(find_best(rates(**runs))) == said


def test_nothing_is_best_where_all_failed() -> None:
    assert find_best([RunResult("a", "a-1", error="no")]) is None
