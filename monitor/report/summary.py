"""The headline numbers of a report: a row for each run, or suite, and each beside the first of them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from monitor.analysis.run_metrics import RunMetrics
from monitor.report.run import ReportRun, group_runs
from monitor.report.table import Cell, DataTable
from monitor.report.timeseries import MedianRange, median_range


@dataclass(frozen=True)
class SummaryColumn:
    """One column. `better`: whether more of it is better (1), or less (-1), or neither (0)."""

    name: str
    unit: str
    better_direction: int
    value_of: Callable[[RunMetrics], float | None]


@dataclass(frozen=True)
class SummaryRow:
    """What one run, or the repeats of one suite, came to; None is what was not measured."""

    label: str
    repeats: int
    values: Mapping[str, MedianRange | None]


def summary_columns(trains: bool) -> tuple[SummaryColumn, ...]:
    """The columns, of inference or training."""
    sample = "row" if trains else "request"
    return (
        SummaryColumn("samples", "", 0, lambda each: each.samples),
        SummaryColumn("throughput", f"{sample}s/s", 1, lambda each: each.throughput_per_s),
        SummaryColumn("step p50" if trains else "latency p50", "ms", -1, lambda each: each.latency_ms["p50"]),
        SummaryColumn("p95", "ms", -1, lambda each: each.latency_ms["p95"]),
        SummaryColumn("p99", "ms", -1, lambda each: each.latency_ms["p99"]),
        *(() if trains else (SummaryColumn("network", "ms", -1, lambda each: each.network_ms),)),
        SummaryColumn("between sites", f"kB/{sample}", -1, _link_kb),
        SummaryColumn("processors", f"s/{sample}", -1, lambda each: each.total_cpu_s),
        SummaryColumn("energy", f"J/{sample}", -1, lambda each: sum(each.energy_j.values()) if each.energy_j else None),
        *(() if trains else (SummaryColumn("failed", "", 0, lambda each: each.failed),)),
        *(() if trains else (SummaryColumn("retries", "", 0, lambda each: each.retries),)),
    )


def summarize(runs: Sequence[ReportRun]) -> tuple[tuple[SummaryColumn, ...], list[SummaryRow]]:
    """The columns that any run has something in, and a row for each group of runs; the first is the baseline."""
    columns = summary_columns(runs[0].kind == "training")
    rows = []
    for label, repeats in group_runs(runs).items():
        values: dict[str, MedianRange | None] = {}
        for column in columns:
            found = [value for run in repeats if (value := column.value_of(run.metrics)) is not None]
            values[column.name] = median_range(found) if found else None
        rows.append(SummaryRow(label, len(repeats), values))
    return tuple(column for column in columns if any(row.values[column.name] for row in rows)), rows


def ratio_to_baseline(row: SummaryRow, baseline: SummaryRow, name: str) -> float | None:
    """How many times the baseline's; None where either was not measured, or the baseline's is 0."""
    mine, its = row.values[name], baseline.values[name]
    return mine.median / its.median if mine and its and its.median else None


def summary_table(columns: Sequence[SummaryColumn], rows: Sequence[SummaryRow]) -> DataTable:
    """The same as rows of numbers: for each column its value, and its ratio to the first row's."""
    names = [name for each in columns for name in (_column(each), f"{_column(each)} ratio")]
    found: list[tuple[Cell, ...]] = []
    for row in rows:
        cells: list[Cell] = [row.label, row.repeats]
        for column in columns:
            value = row.values[column.name]
            cells += [value.median if value else None, ratio_to_baseline(row, rows[0], column.name)]
        found.append(tuple(cells))
    return DataTable(("run", "repeats", *names), tuple(found))


def _column(headline: SummaryColumn) -> str:
    return f"{headline.name} ({headline.unit})" if headline.unit else headline.name


def _link_kb(figures: RunMetrics) -> float | None:
    return sum(link.bytes_out + link.bytes_in for link in figures.links.values()) / 1000 if figures.links else None
