"""Points and runs whose tables can be computed by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from monitor.bench.results import SummaryColumn, SummaryRow, summarize
from monitor.points.points import FieldValue, TelemetryPoint
from monitor.report.run import ReportRun, group_runs
from monitor.report.table import DataTable
from tests.support.monitor.synthetic_runs import time_ns_at


def make_point(
    measurement: str, second: float, tags: dict[str, str] | None = None, **fields: FieldValue
) -> TelemetryPoint:
    return TelemetryPoint(measurement, time_ns_at(second), tags or {}, fields)


def make_run(name: str, points: Sequence[TelemetryPoint], **attributes: Any) -> ReportRun:
    by_measurement: dict[str, list[TelemetryPoint]] = defaultdict(list)
    for point in points:
        by_measurement[point.measurement].append(point)
    return ReportRun(name, by_measurement, **attributes)


def make_request(
    number: int, second: float, latency_ms: float, network_ms: float = 0.0, error: str = ""
) -> TelemetryPoint:
    """A request that ends at `second`."""
    fields: dict[str, FieldValue] = {"latency_ms": latency_ms, "network_ms": network_ms, "attempts": 1, "error": error}
    return make_point("request", second, {"pipeline": "street"}, request=str(number), **fields)


def make_hop(number: int, stage: str, place: int, times_ms: tuple[float, float, float, float]) -> TelemetryPoint:
    """A stage's part of a request: queue, decode, compute, encode."""
    names = ("queue_ms", "decode_ms", "compute_ms", "encode_ms")
    tags = {"stage": stage, "worker": f"{stage}-1"}
    return make_point("hop", 0.0, tags, request=str(number), place=place, **dict(zip(names, times_ms, strict=True)))


def make_steps(*losses: float) -> list[TelemetryPoint]:
    """Training steps of 32 rows and one second each."""
    return [
        make_point("step", float(step), step=step, rows=32, step_ms=1000.0, loss=loss, accuracy=step / 10)
        for step, loss in enumerate(losses, start=1)
    ]


def make_cpu_samples(seconds: Sequence[float], cpu_s: Sequence[float], role: str, name: str) -> list[TelemetryPoint]:
    tags = {"role": role, "name": name}
    return [make_point("process", at, tags, cpu_s=total, pid=1) for at, total in zip(seconds, cpu_s, strict=True)]


# The window is from 1.0, when the first request was sent, to 3.0; the third request fails.
FOUR_REQUESTS = [
    make_request(1, 1.5, 500.0, 100.0),
    make_request(2, 2.0, 800.0, 300.0),
    make_request(3, 2.4, 1000.0, error="DeadlinePassed"),
    make_request(4, 3.0, 1400.0, 500.0),
    *(make_hop(number, "head", 0, (10.0 * number, 1.0, 20.0, 2.0)) for number in (1, 2, 3, 4)),
    *(make_hop(number, "tail", 1, (0.0, 3.0, 40.0, 4.0)) for number in (1, 2, 3, 4)),
]
# 2 MB out and 0.1 MB in from second 1 to 2, 1 MB out from 2 to 3.
LINK_TRAFFIC = [
    make_point("link", second, {"from": "device", "to": "cloud"}, bytes_out=bytes_out, bytes_in=bytes_in)
    for second, bytes_out, bytes_in in (
        (0.5, 0, 0),
        (1.0, 1_000_000, 0),
        (2.0, 3_000_000, 100_000),
        (3.0, 4_000_000, 100_000),
    )
]


def make_repeats(**durations_s: float) -> list[ReportRun]:
    """Runs of one group with a single request each, of these durations, sent at 1.0."""
    return [
        make_run(name, [make_request(1, 1.0 + duration_s, duration_s * 1000)], group="cloud")
        for name, duration_s in durations_s.items()
    ]


def summarize_runs(runs: Sequence[ReportRun]) -> tuple[list[SummaryColumn], list[SummaryRow]]:
    return summarize({label: [run.metrics for run in repeats] for label, repeats in group_runs(runs).items()})


def select(table: DataTable, *columns: str) -> list[tuple[object, ...]]:
    """The rows of a table, with only these columns."""
    return list(zip(*(table.column(name) for name in columns), strict=True))
