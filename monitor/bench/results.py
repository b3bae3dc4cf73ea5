"""The results of a benchmark: figures of each run, their median and spread for each case, as JSON and as CSV. Pure.

Names are flat and say their units: `latency_ms.p50`, `stages.head.compute_ms`, `links.device - cloud.bytes_out`. They
are the keys of results.json and the columns of results.csv.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from monitor.analysis.run_metrics import STAGE_TIMES, RunMetrics

RESULTS_FILE, CSV_FILE = "results.json", "results.csv"
_DIGITS = 4  # of what is measured, behind the point


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run: its figures, or why it has none."""

    case: str
    name: str  # of its folder
    metrics: RunMetrics | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class MetricSpread:
    """One figure over the repeats of a case."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> MetricSpread:
        return cls(median(values), min(values), max(values))


def flatten_metrics(figures: RunMetrics) -> dict[str, float]:
    """All numbers of a run by their names; what was not measured is left out."""
    found: dict[str, float] = {
        "samples": figures.samples,
        "failed": figures.failed,
        "retries": figures.retries,
        "span_s": figures.span_s,
        "throughput_per_s": figures.throughput_per_s,
    }
    found |= {f"latency_ms.{name}": value for name, value in figures.latency_ms.items()}
    if figures.network_ms is not None:
        found["network_ms"] = figures.network_ms
    for stage, time in figures.stages.items():
        found |= {f"stages.{stage}.{name}": getattr(time, name) for name in STAGE_TIMES}
    for link, crossed in figures.links.items():
        found |= {f"links.{link}.bytes_out": crossed.bytes_out, f"links.{link}.bytes_in": crossed.bytes_in}
    found |= {f"cpu_s.{role}": value for role, value in figures.cpu_s.items()}
    found |= {f"energy_j.{sensor}": value for sensor, value in (figures.energy_j or {}).items()}
    return {name: round(value, _DIGITS) for name, value in found.items()}


def spreads_by_case(results: Sequence[RunResult]) -> dict[str, dict[str, MetricSpread]]:
    """Median, least and most of each figure, by case; of a case none of whose runs ended well, nothing."""
    found: dict[str, dict[str, MetricSpread]] = {}
    for result in results:
        found.setdefault(result.case, {})
    for case in found:
        runs = [flatten_metrics(result.metrics) for result in results if result.case == case and result.metrics]
        names = dict.fromkeys(name for run in runs for name in run)
        found[case] = {name: MetricSpread.from_values([run[name] for run in runs if name in run]) for name in names}
    return found


def results_to_json(results: Sequence[RunResult]) -> dict[str, Any]:
    """What results.json holds: by suite the spread of each figure, and by run its figures."""
    return {
        "suites": {
            case: {
                "runs": sum(result.case == case for result in results),
                "failed_runs": sum(result.case == case and not result.metrics for result in results),
                "kind": next((each.metrics.kind for each in results if each.case == case and each.metrics), None),
                "figures": {
                    name: {"median": spread.median, "least": spread.minimum, "most": spread.maximum}
                    for name, spread in figures.items()
                },
            }
            for case, figures in spreads_by_case(results).items()
        },
        "runs": {result.name: _run(result) for result in results},
    }


def _run(result: RunResult) -> dict[str, Any]:
    if result.metrics is None:
        return {"suite": result.case, "error": result.error}
    figures = result.metrics
    energy = None if figures.energy_j is None else sum(figures.energy_j.values())
    return {
        "suite": result.case,
        "kind": figures.kind,
        "warm_up": figures.warm_up,
        **flatten_metrics(figures),
        "energy_j": energy,
        "energy_missing": figures.energy_missing_reason or None,
    }


def results_to_csv(results: Sequence[RunResult], about: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """What results.csv holds: a line for each run, a column for each figure that any of them has.

    `about` has more columns by case: which point of a sweep it is.
    """
    known = about or {}
    rows: list[dict[str, Any]] = [
        {"suite": result.case, "run": result.name, **known.get(result.case, {}), **_row(result)} for result in results
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    written = io.StringIO()
    writer = csv.DictWriter(written, [*names, "error"], lineterminator="\n")
    writer.writeheader()
    for row, result in zip(rows, results, strict=True):
        writer.writerow({**row, "error": result.error})
    return written.getvalue()


def _row(result: RunResult) -> Mapping[str, float]:
    return flatten_metrics(result.metrics) if result.metrics else {}
