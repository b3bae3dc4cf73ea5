"""The headline numbers of a report: a row for each run, or suite, and each beside the first of them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from monitor.analysis.run_metrics import Figures
from monitor.report.run import ReportRun, groups_of
from monitor.report.table import Cell, Table
from monitor.report.timeseries import Spread, spread


@dataclass(frozen=True)
class Headline:
    """One column. `better`: whether more of it is better (1), or less (-1), or neither (0)."""

    name: str
    unit: str
    better: int
    of: Callable[[Figures], float | None]


@dataclass(frozen=True)
class SummaryRow:
    """What one run, or the repeats of one suite, came to; None is what was not measured."""

    label: str
    repeats: int
    values: Mapping[str, Spread | None]


def headlines(trains: bool) -> tuple[Headline, ...]:
    """The columns, of inference or training."""
    sample = "row" if trains else "request"
    return (
        Headline("samples", "", 0, lambda each: each.samples),
        Headline("throughput", f"{sample}s/s", 1, lambda each: each.throughput_per_s),
        Headline("step p50" if trains else "latency p50", "ms", -1, lambda each: each.latency_ms["p50"]),
        Headline("p95", "ms", -1, lambda each: each.latency_ms["p95"]),
        Headline("p99", "ms", -1, lambda each: each.latency_ms["p99"]),
        *(() if trains else (Headline("network", "ms", -1, lambda each: each.network_ms),)),
        Headline("between sites", f"kB/{sample}", -1, _link_kb),
        Headline("processors", f"s/{sample}", -1, lambda each: each.processor_s),
        Headline("energy", f"J/{sample}", -1, lambda each: sum(each.energy_j.values()) if each.energy_j else None),
        *(() if trains else (Headline("failed", "", 0, lambda each: each.failed),)),
        *(() if trains else (Headline("retries", "", 0, lambda each: each.retries),)),
    )


def summary(runs: Sequence[ReportRun]) -> tuple[tuple[Headline, ...], list[SummaryRow]]:
    """The columns that any run has something in, and a row for each group of runs; the first is the baseline."""
    columns = headlines(runs[0].kind == "training")
    rows = []
    for label, repeats in groups_of(runs).items():
        values: dict[str, Spread | None] = {}
        for column in columns:
            found = [value for run in repeats if (value := column.of(run.figures)) is not None]
            values[column.name] = spread(found) if found else None
        rows.append(SummaryRow(label, len(repeats), values))
    return tuple(column for column in columns if any(row.values[column.name] for row in rows)), rows


def ratio(row: SummaryRow, baseline: SummaryRow, name: str) -> float | None:
    """How many times the baseline's; None where either was not measured, or the baseline's is 0."""
    mine, its = row.values[name], baseline.values[name]
    return mine.middle / its.middle if mine and its and its.middle else None


def summary_table(columns: Sequence[Headline], rows: Sequence[SummaryRow]) -> Table:
    """The same as rows of numbers: for each column its value, and its ratio to the first row's."""
    names = [name for each in columns for name in (_column(each), f"{_column(each)} ratio")]
    found: list[tuple[Cell, ...]] = []
    for row in rows:
        cells: list[Cell] = [row.label, row.repeats]
        for column in columns:
            value = row.values[column.name]
            cells += [value.middle if value else None, ratio(row, rows[0], column.name)]
        found.append(tuple(cells))
    return Table(("run", "repeats", *names), tuple(found))


def _column(headline: Headline) -> str:
    return f"{headline.name} ({headline.unit})" if headline.unit else headline.name


def _link_kb(figures: Figures) -> float | None:
    return sum(link.there + link.back for link in figures.links.values()) / 1000 if figures.links else None
