"""The figures about the work: completion, latency, time by stage, sweeps, learning curves."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Literal

from brokers.protocol.stage_timing import STAGE_DURATIONS
from monitor.analysis.measurement_window import number_or_zero
from monitor.analysis.run_metrics import MedianRange
from monitor.report.run import ReportRun, group_runs, number_or_none
from monitor.report.table import (
    TOTAL,
    DataTable,
    LinePlot,
    ReportFigure,
    Row,
    StackedBars,
    downsample,
    table_of_groups,
)
from monitor.report.timeseries import TimeSeries, aggregate_repeats, time_label

_NETWORK = "network"
_TRAINING_PHASES = ("forward", "backward", "update")
_IDLE = "idle"
_LATENCY_METRICS = ("mean", "p50", "p95", "p99")
# Points per line of a figure: more cannot be seen, and would only make the page larger.
_MAX_CURVE_POINTS = 2000
# A distribution has a logarithmic axis if its maximum is more than this many times its median.
_WIDE_RANGE = 20.0


def completion(runs: Sequence[ReportRun]) -> ReportFigure:
    """The share of completed samples over time; for repeats, the median and range of the time at each per cent."""

    def rows_of(repeats: Sequence[ReportRun]) -> Iterable[Row]:
        curves = [_completion_curve(run) for run in repeats]
        if len(curves) == 1:
            return downsample([(time_s, share, None, None) for time_s, share in curves[0]], _MAX_CURVE_POINTS)
        shares = [percent / 100 for percent in range(101)]
        times = [MedianRange.from_values([_time_of_share(curve, share) for curve in curves]) for share in shares]
        return [(time_s.median, share, *time_s.bounds) for time_s, share in zip(times, shares, strict=True)]

    caption = "The share of samples completed over time. Steeper is faster; a straight line is a constant rate."
    if any(len(repeats) > 1 for repeats in group_runs(runs).values()):
        caption += " Repeats: the line is their median, the band their range."
    label = f"share of {runs[0].sample}s completed"
    plot = LinePlot("time_s", "share", time_label(runs), label, band_axis="x", stepped=True, y_is_fraction=True)
    table = table_of_groups(("time_s", "share", "low", "high"), runs, rows_of)
    return ReportFigure("Completion", caption, table, plot, f"no {runs[0].event} ended")


def _completion_curve(run: ReportRun) -> TimeSeries:
    """From (0, 0) to (end of the last sample, 1)."""
    curve, completed = [(0.0, 0.0)], 0
    for point in run.window.succeeded:
        completed += round(number_or_zero(point, "rows")) if run.is_training else 1
        curve.append((run.seconds_since_start(point), completed / run.metrics.samples))
    return curve


def _time_of_share(curve: TimeSeries, share: float) -> float:
    """The first time at which the curve reaches the share."""
    index = bisect_left(curve, share - 1e-9, key=lambda point: point[1])
    return curve[min(index, len(curve) - 1)][0]


def latency(runs: Sequence[ReportRun]) -> ReportFigure:
    """The cumulative distribution of the latency of requests, or the duration of steps, over all repeats."""
    event = runs[0].event
    title, field = ("Step duration", "step_ms") if runs[0].is_training else ("Request latency", "latency_ms")
    table = table_of_groups(
        ("latency_ms", "share"),
        runs,
        lambda repeats: distribution_rows(
            number_or_zero(point, field) for run in repeats for point in run.window.succeeded
        ),
    )
    percentiles = table_of_groups(
        [f"{metric}_ms" for metric in _LATENCY_METRICS],
        runs,
        lambda repeats: [tuple(median(run.metrics.latency_ms[name] for run in repeats) for name in _LATENCY_METRICS)],
    )
    caption = (
        f"The share of {event}s that took at most a given time. Further left is faster; a long tail at the top right "
        "is a few slow ones. Repeats are combined."
    )
    ordered = sorted(table.floats("latency_ms"))
    plot = LinePlot(
        "latency_ms",
        "share",
        f"{title.lower()} (ms)",
        f"share of {event}s",
        stepped=True,
        y_is_fraction=True,
        log_x=bool(ordered) and ordered[0] > 0 and ordered[-1] > _WIDE_RANGE * ordered[len(ordered) // 2],
    )
    return ReportFigure(title, caption, table, plot, f"no {event} ended", percentiles)


def distribution_rows(values: Iterable[float]) -> list[Row]:
    """Rows of (value, share of the values up to it)."""
    ordered = sorted(values)
    rows = [(value, count / len(ordered)) for count, value in enumerate(ordered, start=1)]
    return downsample(rows, _MAX_CURVE_POINTS)


def stage_time(runs: Sequence[ReportRun]) -> ReportFigure:
    """Mean milliseconds of a request by part of each stage, or of a training step by phase."""
    table = _step_times(runs) if runs[0].is_training else _request_times(runs)
    if runs[0].is_training:
        plot = StackedBars("ms", "ms per step", bar="stage")
        caption = (
            "The mean time of a training step that the workers of each stage compute, by phase; the rest of the step "
            "they are idle. Stages compute at the same time, so each has a separate bar."
        )
    else:
        plot = StackedBars("ms", "ms per request", group_by="stage")
        caption = (
            "The mean time of a request on its path through the stages: queueing, decoding, computing and encoding. "
            f"The rest of the round trip is the network; clocks need not be synchronised. {_stage_order(runs)}"
        )
    return ReportFigure("Time by stage", caption, table, plot, "no stage reported its times")


def _stage_order(runs: Sequence[ReportRun]) -> str:
    """The stages in order; a short part of a bar has no room for the name of its stage."""
    labels_by_order: dict[str, list[str]] = defaultdict(list)
    for label, repeats in group_runs(runs).items():
        order = ", ".join(dict.fromkeys(stage for run in repeats for stage in run.metrics.stages))
        labels_by_order[order].append(label)
    labels_by_order.pop("", None)
    if len(labels_by_order) == 1:
        return f"Stages in order: {', '.join(labels_by_order)}."
    orders = (f"{', '.join(labels)}: {order}" for order, labels in labels_by_order.items())
    return f"Stages in order, for {'; for '.join(orders)}." if labels_by_order else ""


def _request_times(runs: Sequence[ReportRun]) -> DataTable:
    """The parts of each stage, in the order of the path, and the network, which has no stage."""

    def parts_of(run: ReportRun) -> dict[tuple[str, ...], float]:
        network_ms = run.metrics.network_ms
        parts: dict[tuple[str, ...], float] = {
            (stage, name.removesuffix("_ms")): getattr(time, name)
            for stage, time in run.metrics.stages.items()
            for name in STAGE_DURATIONS
        }
        return {**parts, ("", _NETWORK): network_ms} if parts and network_ms is not None else {}

    return table_of_groups(
        ("stage", "part", "ms", "low", "high"), runs, lambda repeats: bar_rows(map(parts_of, repeats), ("", TOTAL))
    )


def bar_rows(
    repeats: Iterable[Mapping[tuple[str, ...], float]],
    total: tuple[str, ...],
    parts: Sequence[tuple[str, ...]] | None = None,
) -> list[Row]:
    """The rows of a stacked bar: the median of each part over the repeats, and the median and range of their sums.

    The keys of the parts and `total` are the first cells of the rows; `parts` gives the order of the parts. Repeats
    without parts are not counted.
    """
    measured = [repeat for repeat in repeats if repeat]
    if not measured:
        return []
    keys = dict.fromkeys(key for repeat in measured for key in repeat)
    rows: list[Row] = [
        (*key, median(repeat.get(key, 0.0) for repeat in measured), None, None)
        for key in (keys if parts is None else parts)
        if key in keys
    ]
    spread = MedianRange.from_values([sum(repeat.values()) for repeat in measured])
    return [*rows, (*total, spread.median, *spread.bounds)]


def _step_times(runs: Sequence[ReportRun]) -> DataTable:
    """The phases of a step at the workers of each stage, and their idle time."""
    rows: list[Row] = []
    phases = [(phase,) for phase in (*_TRAINING_PHASES, _IDLE)]
    for label, repeats in group_runs(runs).items():
        times = [_phase_times(run) for run in repeats]
        for stage in dict.fromkeys(stage for time in times for stage in time):
            bar = bar_rows([time.get(stage, {}) for time in times], (TOTAL,), phases)
            rows += [(f"{label}: {stage}", *row) for row in bar]
    return DataTable(("stage", "part", "ms", "low", "high"), tuple(rows))


def _phase_times(run: ReportRun) -> dict[str, dict[tuple[str, ...], float]]:
    """By stage and phase, the mean time per step and worker."""
    window = run.window
    totals_ms: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
    workers: dict[str, set[str]] = defaultdict(set)
    for batch in run.points.get("batch", ()):
        if window.begin_ns < batch.time_ns <= window.end_ns and batch.tags.get("phase") in _TRAINING_PHASES:
            stage = batch.tags.get("stage", "")
            totals_ms[stage][batch.tags["phase"],] += number_or_zero(batch, "busy_ms")
            workers[stage].add(batch.tags.get("worker", ""))
    times: dict[str, dict[tuple[str, ...], float]] = {}
    for stage, phases in totals_ms.items():
        step_count = len(window.succeeded) * len(workers[stage])
        busy = {phase: total / step_count for phase, total in phases.items()}
        times[stage] = {**busy, (_IDLE,): max(0.0, run.metrics.latency_ms["mean"] - sum(busy.values()))}
    return times


def sweep(runs: Sequence[ReportRun]) -> ReportFigure:
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
    values = sorted({value for by_value in swept.values() for value in by_value}) or [0.0]
    for label, throughputs in constant.items():
        swept[label] = dict.fromkeys((values[0], values[-1]), throughputs)
    rows: list[Row] = []
    for label, by_value in swept.items():
        for value, throughputs in sorted(by_value.items()):
            spread = MedianRange.from_values(throughputs)
            rows.append((label, value, spread.median, *spread.bounds, spread.count))
    table = DataTable(("run", "value", "throughput_per_s", "low", "high", "repeats"), tuple(rows))
    varied = next((run.sweep_setting[0] for run in runs if run.sweep_setting), "batch")
    caption = "The median throughput of the repeats at each value; error bars are their range."
    plot = LinePlot("value", "throughput_per_s", varied, f"{runs[0].sample}s/s", band_axis="y", markers=True)
    return ReportFigure(f"Throughput by {varied}", caption, table, plot, "no run is part of a sweep")


def learning(runs: Sequence[ReportRun], x: Literal["step", "time_s"]) -> ReportFigure:
    """Loss and, where it was measured, accuracy of each step, over the steps or over time."""

    def curve(run: ReportRun, metric: str) -> TimeSeries:
        points = run.points.get("step", ()) if x == "step" else run.window.succeeded
        return [
            (number_or_zero(point, "step") if x == "step" else run.seconds_since_start(point), value)
            for point in points
            if (value := number_or_none(point, metric)) is not None
        ]

    def rows_of(repeats: Sequence[ReportRun]) -> Iterable[Row]:
        # At one time repeats are at different steps, which have no median: the first one stands for all.
        shown = repeats if x == "step" else repeats[:1]
        for metric in ("loss", "accuracy"):
            points = aggregate_repeats(curve(run, metric) for run in shown)
            yield from downsample([(metric, *point) for point in points], _MAX_CURVE_POINTS)

    title, axis, label = ("step", "the steps", "step") if x == "step" else ("time", "time", time_label(runs))
    caption = f"Loss and accuracy of each training step, over {axis}."
    plot = LinePlot(x, "value", label, "", panel="of", band_axis="y")
    table = table_of_groups(("of", x, "value", "low", "high"), runs, rows_of)
    return ReportFigure(f"Learning by {title}", caption, table, plot, "no step has a loss")
