"""The results of a benchmark as JSON and CSV: the metrics of each run, and their spread over the runs of each case.

Metrics have flat names with units, such as `latency_ms.p50`, `stages.head.compute_ms` or
`links.device - cloud.bytes_out`: the keys of results.json and the columns of results.csv.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brokers.protocol.stage_timing import STAGE_DURATIONS
from monitor.analysis.median_range import MedianRange
from monitor.analysis.run_metrics import RunMetrics

RESULTS_FILE, CSV_FILE = "results.json", "results.csv"
_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run: its metrics, or the reason why it has none."""

    case: str
    name: str  # of its folder
    metrics: RunMetrics | None = None
    error: str = ""


def flatten_metrics(metrics: RunMetrics | None) -> dict[str, float]:
    """The metrics of a run by flat name, without those that were not measured."""
    if metrics is None:
        return {}
    values: dict[str, float] = {
        "samples": metrics.samples,
        "failed": metrics.failed,
        "retries": metrics.retries,
        "span_s": metrics.span_s,
        "throughput_per_s": metrics.throughput_per_s,
    }
    values |= {f"latency_ms.{name}": value for name, value in metrics.latency_ms.items()}
    if metrics.network_ms is not None:
        values["network_ms"] = metrics.network_ms
    for stage, time in metrics.stages.items():
        values |= {f"stages.{stage}.{name}": getattr(time, name) for name in STAGE_DURATIONS}
    for link, traffic in metrics.links.items():
        values |= {f"links.{link}.bytes_out": traffic.bytes_out, f"links.{link}.bytes_in": traffic.bytes_in}
    values |= {f"cpu_s.{role}": value for role, value in metrics.cpu_s.items()}
    values |= {f"energy_j.{sensor}": value for sensor, value in (metrics.energy_j or {}).items()}
    return {name: round(value, _DECIMALS) for name, value in values.items()}


def spreads_by_case(results: Sequence[RunResult]) -> dict[str, dict[str, MedianRange]]:
    """The spread of each metric over the successful runs of each case; empty for a case without any."""
    spreads: dict[str, dict[str, MedianRange]] = {}
    for case in dict.fromkeys(result.case for result in results):
        runs = [flatten_metrics(result.metrics) for result in results if result.case == case]
        names = dict.fromkeys(name for run in runs for name in run)
        spreads[case] = {name: MedianRange.from_values([run[name] for run in runs if name in run]) for name in names}
    return spreads


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
