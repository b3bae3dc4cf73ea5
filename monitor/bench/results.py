"""The results of runs: all metrics with their spread over each case's runs, and the headline metrics compared.

Metrics have flat names with units, such as `latency_ms.p50`, `stages.head.compute_ms` or
`links.device - cloud.bytes_out`: the keys of results.json and the columns of results.csv.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from monitor.analysis.run_metrics import MedianRange, RunMetrics

RESULTS_FILE, CSV_FILE = "results.json", "results.csv"
LEGEND = (
    "p50, p95: request latency (training: step duration). network: mean latency outside the stages. kB link, cpu ms: "
    "bytes on links between sites, and CPU time of all processes of the run (brokers too, the monitor not), per sample."
)
_DECIMALS = 4
# The fields of `RunMetrics` that are no metrics.
_NO_METRICS = ("kind", "warm_up", "energy_missing_reason")


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run: its metrics, or the reason why it has none."""

    case: str
    name: str  # of its folder
    metrics: RunMetrics | None = None
    error: str = ""


def flatten_metrics(metrics: RunMetrics | None) -> dict[str, float]:
    """The metrics of a run by flat name, without those that were not measured."""
    fields = asdict(metrics) if metrics else {}
    return dict(_flatten({name: value for name, value in fields.items() if name not in _NO_METRICS}))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", round(value, _DECIMALS)


def spreads_by_case(results: Sequence[RunResult]) -> dict[str, dict[str, MedianRange]]:
    """The spread of each metric over the successful runs of each case; empty for a case without any."""
    spreads: dict[str, dict[str, MedianRange]] = {}
    for case in dict.fromkeys(result.case for result in results):
        runs = [flatten_metrics(result.metrics) for result in results if result.case == case]
        names = dict.fromkeys(name for run in runs for name in run)
        spreads[case] = {name: MedianRange.from_values([run[name] for run in runs if name in run]) for name in names}
    return spreads


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


def results_to_json(results: Sequence[RunResult]) -> dict[str, Any]:
    """The content of results.json."""
    suites: dict[str, Any] = {}
    for case, spreads in spreads_by_case(results).items():
        metrics = [result.metrics for result in results if result.case == case]
        succeeded = [each for each in metrics if each]
        suites[case] = {
            "runs": len(metrics),
            "failed_runs": len(metrics) - len(succeeded),
            "kind": succeeded[0].kind if succeeded else None,
            "metrics": {
                name: {"median": spread.median, "min": spread.minimum, "max": spread.maximum}
                for name, spread in spreads.items()
            },
        }
    runs: dict[str, Any] = {}
    for result in results:
        if result.metrics is None:
            runs[result.name] = {"suite": result.case, "error": result.error}
            continue
        energy_j = result.metrics.energy_j
        runs[result.name] = {
            "suite": result.case,
            "kind": result.metrics.kind,
            "warm_up": result.metrics.warm_up,
            **flatten_metrics(result.metrics),
            "energy_j": None if energy_j is None else sum(energy_j.values()),
            "energy_missing": result.metrics.energy_missing_reason or None,
        }
    return {"suites": suites, "runs": runs}


def results_to_csv(results: Sequence[RunResult], sweep_points: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """The content of results.csv: a row per run, a column per metric; `sweep_points` has more columns by case."""
    rows: list[dict[str, Any]] = []
    for result in results:
        point = (sweep_points or {}).get(result.case, {})
        rows.append({"suite": result.case, "run": result.name, **point, **flatten_metrics(result.metrics)})
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "error"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "error": result.error} for row, result in zip(rows, results, strict=True))
    return text.getvalue()


def comparison_table(results: Sequence[RunResult], label: str, is_training: bool) -> Table:
    """A row per case with the medians of its runs and the range of its throughput; all cases of one kind."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", title_justify="left")
    table.title = "medians of the runs, with the lowest and highest throughput"
    # The metrics of the summary by heading, and the factors for their units.
    metrics = {
        **({"step ms": ("step p50", 1)} if is_training else {"p50 ms": ("latency p50", 1)}),
        "p95": ("p95", 1),
        **({} if is_training else {"network": ("network", 1)}),
        "kB link": ("between sites", 1),
        "cpu ms": ("CPU time", 1000),
    }
    table.add_column(label, no_wrap=True)
    for heading in ("rows/s" if is_training else "/s", "", *metrics):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    groups: dict[str, list[RunMetrics]] = {result.case: [] for result in results}
    for result in results:
        if result.metrics:
            groups[result.case].append(result.metrics)
    for row in summarize(groups)[1]:
        throughput = row.values["throughput"]
        if throughput is None:
            table.add_row(row.label, "", "failed")
            continue
        spreads = [(row.values[name], factor) for name, factor in metrics.values()]
        table.add_row(
            row.label,
            _rate(throughput.median),
            f"({_rate(throughput.minimum)}-{_rate(throughput.maximum)})",
            *(f"{factor * spread.median:.0f}" if spread else "-" for spread, factor in spreads),
        )
    return table


def format_run(result: RunResult) -> str:
    """One run as one line."""
    metrics = result.metrics
    if metrics is None:
        return f"{result.name}: failed: {result.error}"
    unit, duration = (" rows/s", "a step") if metrics.kind == "training" else ("/s", "latency")
    latency = ", ".join(f"{name} {value:.0f}" for name, value in metrics.latency_ms.items() if name != "mean")
    return f"{result.name}: {metrics.throughput_per_s:.1f}{unit}, {duration} {latency} ms"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
