"""The data of the figures about the work: completion, latency, time by stage, sweeps, learning curves."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Literal

from brokers.protocol.stage_timing import STAGE_DURATIONS
from monitor.analysis.measurement_window import number_or_zero
from monitor.analysis.median_range import MedianRange
from monitor.report.run import ReportRun, group_runs, number_or_none
from monitor.report.table import TOTAL, DataTable, Row, downsample
from monitor.report.timeseries import TimeSeries, aggregate_repeats

NETWORK = "network"
TRAINING_PHASES = ("forward", "backward", "update")
IDLE = "idle"
LATENCY_METRICS = ("mean", "p50", "p95", "p99")
# Points per line of a figure: more cannot be seen, and would only make the page larger.
MAX_CURVE_POINTS = 2000
# The fractions of completed samples at which repeats are compared.
_FRACTIONS = tuple(percent / 100 for percent in range(101))


def completion_table(runs: Sequence[ReportRun]) -> DataTable:
    """The share of completed samples over time; for repeats, the median and range of the time at each share."""
    rows: list[Row] = []
    for label, repeats in group_runs(runs).items():
        curves = [_completion_curve(run) for run in repeats]
        if len(curves) == 1:
            rows += downsample([(label, time_s, share, None, None) for time_s, share in curves[0]], MAX_CURVE_POINTS)
            continue
        for share in _FRACTIONS:
            times_s = MedianRange.from_values([_time_of_share(curve, share) for curve in curves])
            rows.append((label, times_s.median, share, *times_s.bounds))
    return DataTable(("run", "time_s", "share", "low", "high"), tuple(rows))


def _completion_curve(run: ReportRun) -> TimeSeries:
    """From (0, 0) to (end of the last sample, 1)."""
    curve, completed = [(0.0, 0.0)], 0
    for point in run.window.succeeded:
        completed += run.sample_count(point)
        curve.append((run.seconds_since_start(point), completed / run.metrics.samples))
    return curve


def _time_of_share(curve: TimeSeries, share: float) -> float:
    """The first time at which the curve reaches the share."""
    index = bisect_left(curve, share - 1e-9, key=lambda point: point[1])
    return curve[min(index, len(curve) - 1)][0]


def latency_table(runs: Sequence[ReportRun]) -> DataTable:
    """The cumulative distribution of the latency of requests, or the duration of steps, over all repeats."""
    rows: list[Row] = []
    for label, repeats in group_runs(runs).items():
        rows += distribution_rows(label, [latency_ms for run in repeats for latency_ms in _latencies_ms(run)])
    return DataTable(("run", "latency_ms", "share"), tuple(rows))


def distribution_rows(label: str, values: Iterable[float]) -> list[Row]:
    """Rows of (label, value, share of the values up to it)."""
    ordered = sorted(values)
    rows = [(label, value, count / len(ordered)) for count, value in enumerate(ordered, start=1)]
    return downsample(rows, MAX_CURVE_POINTS)


def _latencies_ms(run: ReportRun) -> list[float]:
    field = "step_ms" if run.kind == "training" else "latency_ms"
    return [number_or_zero(point, field) for point in run.window.succeeded]


def percentiles_table(runs: Sequence[ReportRun]) -> DataTable:
    """Mean and percentiles of the latency in milliseconds; for repeats, the median of theirs."""
    rows: list[Row] = []
    for label, repeats in group_runs(runs).items():
        values = [[run.metrics.latency_ms[metric] for run in repeats] for metric in LATENCY_METRICS]
        rows.append((label, *(MedianRange.from_values(each).median for each in values)))
    return DataTable(("run", *(f"{metric}_ms" for metric in LATENCY_METRICS)), tuple(rows))


def request_time_table(runs: Sequence[ReportRun]) -> DataTable:
    """Mean milliseconds of a request in each part of each stage, in their order, and in the network."""
    rows: list[Row] = []
    for label, repeats in group_runs(runs).items():
        rows += bar_rows((label,), [_request_times(run) for run in repeats], ("", TOTAL))
    return DataTable(("run", "stage", "part", "ms", "low", "high"), tuple(rows))


def bar_rows(
    bar: tuple[str, ...],
    repeats: Sequence[Mapping[tuple[str, ...], float]],
    total: tuple[str, ...],
    parts: Sequence[tuple[str, ...]] | None = None,
) -> list[Row]:
    """The rows of a stacked bar: the median of each part over the repeats, and the median and range of their sums.

    `bar`, the keys of the parts and `total` are the first cells of the rows; `parts` gives the order of the parts.
    Repeats without parts are not counted.
    """
    measured = [repeat for repeat in repeats if repeat]
    if not measured:
        return []
    keys = dict.fromkeys(key for repeat in measured for key in repeat)
    rows: list[Row] = [
        (*bar, *key, median(repeat.get(key, 0.0) for repeat in measured), None, None)
        for key in (keys if parts is None else parts)
        if key in keys
    ]
    spread = MedianRange.from_values([sum(repeat.values()) for repeat in measured])
    return [*rows, (*bar, *total, spread.median, *spread.bounds)]


def _request_times(run: ReportRun) -> dict[tuple[str, ...], float]:
    """The mean times by stage and part; the network has no stage."""
    stages, network_ms = run.metrics.stages, run.metrics.network_ms
    if not stages or network_ms is None:
        return {}
    times: dict[tuple[str, ...], float] = {}
    for stage, time in stages.items():
        times |= {(stage, name.removesuffix("_ms")): getattr(time, name) for name in STAGE_DURATIONS}
    return {**times, ("", NETWORK): network_ms}


def step_time_table(runs: Sequence[ReportRun]) -> DataTable:
    """Mean milliseconds of a training step that the workers of a stage spend in each phase, and idle."""
    rows: list[Row] = []
    phases = [(phase,) for phase in (*TRAINING_PHASES, IDLE)]
    for label, repeats in group_runs(runs).items():
        times = [_step_times(run) for run in repeats]
        for stage in dict.fromkeys(stage for time in times for stage in time):
            rows += bar_rows((f"{label}: {stage}",), [time.get(stage, {}) for time in times], (TOTAL,), phases)
    return DataTable(("stage", "part", "ms", "low", "high"), tuple(rows))


def _step_times(run: ReportRun) -> dict[str, dict[tuple[str, ...], float]]:
    """By stage and phase, the mean time per step and worker."""
    window = run.window
    totals_ms: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
    workers: dict[str, set[str]] = defaultdict(set)
    for batch in run.points.get("batch", ()):
        if window.begin_ns < batch.time_ns <= window.end_ns and batch.tags.get("phase") in TRAINING_PHASES:
            stage = batch.tags.get("stage", "")
            totals_ms[stage][batch.tags["phase"],] += number_or_zero(batch, "busy_ms")
            workers[stage].add(batch.tags.get("worker", ""))
    times: dict[str, dict[tuple[str, ...], float]] = {}
    for stage, phases in totals_ms.items():
        step_count = len(window.succeeded) * len(workers[stage])
        busy = {phase: total / step_count for phase, total in phases.items()}
        times[stage] = {**busy, (IDLE,): max(0.0, run.metrics.latency_ms["mean"] - sum(busy.values()))}
    return times


def sweep_table(runs: Sequence[ReportRun]) -> DataTable:
    """The median and range of the throughput at each value of a sweep.

    A point without a value, such as an uncut network, is a level line over the whole sweep.
    """
    swept: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    constant: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        if run.sweep_setting is not None:
            value = run.sweep_setting[1]
            throughputs = constant[run.label] if value is None else swept[run.sweep_name or run.label][value]
            throughputs.append(run.metrics.throughput_per_s)
    rows: list[Row] = []
    for label, by_value in swept.items():
        rows += [_sweep_row(label, value, throughputs) for value, throughputs in sorted(by_value.items())]
    values = sorted({value for by_value in swept.values() for value in by_value}) or [0.0]
    for label, throughputs in constant.items():
        rows += [_sweep_row(label, value, throughputs) for value in dict.fromkeys((values[0], values[-1]))]
    return DataTable(("run", "value", "throughput_per_s", "low", "high", "repeats"), tuple(rows))


def _sweep_row(label: str, value: float, throughputs: Sequence[float]) -> Row:
    spread = MedianRange.from_values(throughputs)
    return label, value, spread.median, *spread.bounds, spread.count


def learning_table(runs: Sequence[ReportRun], x: Literal["step", "time_s"]) -> DataTable:
    """Loss and, where it was measured, accuracy of each step, over the steps or over time."""
    rows: list[Row] = []
    for metric in ("loss", "accuracy"):
        for label, repeats in group_runs(runs).items():
            curves = [_learning_curve(run, metric, x) for run in repeats]
            points: list[Row]
            if x == "step" and len(curves) > 1:
                points = [(metric, label, step, each.median, *each.bounds) for step, each in aggregate_repeats(curves)]
            else:  # at one time repeats are at different steps, which have no median: the first one stands for all
                points = [(metric, label, at, value, None, None) for at, value in curves[0]]
            rows += downsample(points, MAX_CURVE_POINTS)
    return DataTable(("of", "run", x, "value", "low", "high"), tuple(rows))


def _learning_curve(run: ReportRun, metric: str, x: Literal["step", "time_s"]) -> TimeSeries:
    points = run.points.get("step", ()) if x == "step" else run.window.succeeded
    return [
        (number_or_zero(point, "step") if x == "step" else run.seconds_since_start(point), value)
        for point in points
        if (value := number_or_none(point, metric)) is not None
    ]
