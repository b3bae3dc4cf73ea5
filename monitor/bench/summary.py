"""The headline metrics of runs: a row per run or suite, compared with the first row, the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from monitor.analysis.run_metrics import MedianRange, RunMetrics


@dataclass(frozen=True)
class SummaryColumn:
    """One metric; `better_direction` is 1 where more is better, -1 where less is, 0 where neither."""

    name: str
    unit: str
    better_direction: int
    value_of: Callable[[RunMetrics], float | None]


@dataclass(frozen=True)
class SummaryRow:
    """The metrics of one run, or of the repeats of one suite; None where a metric was not measured."""

    label: str
    repeats: int
    values: Mapping[str, MedianRange | None]

    def ratio_to(self, baseline: SummaryRow, name: str) -> float | None:
        """The metric divided by the baseline's; None where either is missing, or the baseline's is 0."""
        value, reference = self.values[name], baseline.values[name]
        return value.median / reference.median if value and reference and reference.median else None


def _summary_columns(is_training: bool) -> list[SummaryColumn]:
    sample, p50 = ("row", "step p50") if is_training else ("request", "latency p50")
    columns = [
        SummaryColumn("samples", "", 0, lambda metrics: metrics.samples),
        SummaryColumn("throughput", f"{sample}s/s", 1, lambda metrics: metrics.throughput_per_s),
        SummaryColumn(p50, "ms", -1, lambda metrics: metrics.latency_ms["p50"]),
        SummaryColumn("p95", "ms", -1, lambda metrics: metrics.latency_ms["p95"]),
        SummaryColumn("p99", "ms", -1, lambda metrics: metrics.latency_ms["p99"]),
        SummaryColumn("network", "ms", -1, lambda metrics: metrics.network_ms),
        SummaryColumn("between sites", f"kB/{sample}", -1, _link_kb),
        SummaryColumn(
            "CPU time", f"s/{sample}", -1, lambda metrics: sum(metrics.cpu_s.values()) if metrics.cpu_s else None
        ),
        SummaryColumn(
            "energy", f"J/{sample}", -1, lambda metrics: sum(metrics.energy_j.values()) if metrics.energy_j else None
        ),
        SummaryColumn("failed", "", 0, lambda metrics: metrics.failed),
        SummaryColumn("retries", "", 0, lambda metrics: metrics.retries),
    ]
    return columns[:-2] if is_training else columns


def _link_kb(metrics: RunMetrics) -> float | None:
    return sum(link.bytes_out + link.bytes_in for link in metrics.links.values()) / 1000 if metrics.links else None


def summarize(groups: Mapping[str, Sequence[RunMetrics]]) -> tuple[list[SummaryColumn], list[SummaryRow]]:
    """The metrics that any run has, and a row per group of repeats; all runs are of one kind."""
    columns = _summary_columns(any(run.kind == "training" for runs in groups.values() for run in runs))
    rows = []
    for label, repeats in groups.items():
        spreads: dict[str, MedianRange | None] = {}
        for column in columns:
            values = [value for metrics in repeats if (value := column.value_of(metrics)) is not None]
            spreads[column.name] = MedianRange.from_values(values) if values else None
        rows.append(SummaryRow(label, len(repeats), spreads))
    return [column for column in columns if any(row.values[column.name] for row in rows)], rows
