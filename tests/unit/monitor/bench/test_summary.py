"""The headline metrics of a report, and their ratios to the first row."""

from __future__ import annotations

import pytest

from monitor.report.writer import summary_table
from tests.unit.monitor.report.report_runs import FOUR_REQUESTS, make_repeats, make_run, make_steps, summarize_runs


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
