"""The figures of what was processed, as tables: completion, latency, where the time went, sweeps, training. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

from monitor.analysis.measurement_window import number_or_zero
from monitor.analysis.run_metrics import PERCENTILES
from monitor.report.run import ReportRun, group_runs, number_or_none
from monitor.report.table import TOTAL, Cell, DataTable, downsample
from monitor.report.timeseries import median_range

REQUEST_PHASES = ("queue", "decode", "compute", "encode")
NETWORK = "network"
TRAINING_PHASES = ("forward", "backward", "update")
IDLE = "idle"
_LATENCIES = ("mean", *(f"p{percent}" for percent in PERCENTILES))
# A line of a figure has at most so many points: more do not show, and make the page heavy.
MAX_CURVE_POINTS = 2000
# The shares at which several repeats are compared.
_SHARES = tuple(place / 100 for place in range(101))


def completion_table(runs: Sequence[ReportRun]) -> DataTable:
    """Which share of all samples was done, over the seconds since the first measured one was begun."""
    rows: list[tuple[Cell, ...]] = []
    for name, repeats in group_runs(runs).items():
        curves = [_completed(run) for run in repeats]
        if len(curves) == 1:
            rows += downsample([(name, time_s, share, None, None) for time_s, share in curves[0]], MAX_CURVE_POINTS)
            continue
        for share in _SHARES:
            found = median_range([_reached(curve, share) for curve in curves])
            rows.append((name, found.median, share, found.low, found.high))
    return DataTable(("run", "time_s", "share", "low", "high"), tuple(rows))


def _completed(run: ReportRun) -> list[tuple[float, float]]:
    """From (0, 0) to (the end of the last sample, 1)."""
    curve, done = [(0.0, 0.0)], 0
    for end in run.window.succeeded:
        done += run.sample_count(end)
        curve.append((run.seconds_since_start(end), done / run.metrics.samples if run.metrics.samples else 0.0))
    return curve


def _reached(curve: Sequence[tuple[float, float]], share: float) -> float:
    """When: the first time at which the curve is that high."""
    place = bisect_left(curve, share - 1e-9, key=lambda point: point[1])
    return curve[min(place, len(curve) - 1)][0]


def latency_table(runs: Sequence[ReportRun]) -> DataTable:
    """The share of requests, or steps, that took at most so long; those of all repeats together."""
    rows: list[tuple[Cell, ...]] = []
    for name, repeats in group_runs(runs).items():
        ordered = sorted(value for run in repeats for value in latencies_ms(run))
        found = [(name, value, (place + 1) / len(ordered)) for place, value in enumerate(ordered)]
        rows += downsample(found, MAX_CURVE_POINTS)
    return DataTable(("run", "latency_ms", "share"), tuple(rows))


def latencies_ms(run: ReportRun) -> list[float]:
    """Of the measured requests, or what the measured steps took; the least first."""
    key = "step_ms" if run.kind == "training" else "latency_ms"
    return sorted(number_or_zero(end, key) for end in run.window.succeeded)


def percentiles_table(runs: Sequence[ReportRun]) -> DataTable:
    """Of the latency, in milliseconds; of repeats, the median of their own."""
    rows: list[tuple[Cell, ...]] = []
    for name, repeats in group_runs(runs).items():
        found = [median_range([run.metrics.latency_ms[which] for run in repeats]).median for which in _LATENCIES]
        rows.append((name, *found))
    return DataTable(("run", *(f"{which}_ms" for which in _LATENCIES)), tuple(rows))


def request_time_table(runs: Sequence[ReportRun]) -> DataTable:
    """Mean milliseconds of a request in each part of each stage it came by, and in the network."""
    rows: list[tuple[Cell, ...]] = []
    for name, repeats in group_runs(runs).items():
        spent = [found for run in repeats if (found := _spent(run))]
        keys = dict.fromkeys(key for found in spent for key in found)
        whole = median_range([sum(found.values()) for found in spent] or [0.0])
        for stage, part in keys:
            middle = median_range([found.get((stage, part), 0.0) for found in spent]).median
            rows.append((name, stage, part, middle, None, None))
        if spent:
            rows.append((name, "", TOTAL, whole.median, whole.low, whole.high))
    return DataTable(("run", "stage", "part", "ms", "low", "high"), tuple(rows))


def _spent(run: ReportRun) -> dict[tuple[str, str], float]:
    """By stage, in the order of a request's way, and part; the network last, as of no stage."""
    stages, network_ms = run.metrics.stages, run.metrics.network_ms
    if not stages or network_ms is None:
        return {}
    found = {(stage, part): getattr(time, f"{part}_ms") for stage, time in stages.items() for part in REQUEST_PHASES}
    return {**found, ("", NETWORK): network_ms}


def step_time_table(runs: Sequence[ReportRun]) -> DataTable:
    """Mean milliseconds of a training step in which the workers of a stage computed, by phase, and were idle."""
    rows: list[tuple[Cell, ...]] = []
    for name, repeats in group_runs(runs).items():
        busy = [_busy(run) for run in repeats]
        for stage in dict.fromkeys(stage for found in busy for stage in found):
            shown = f"{name}: {stage}"
            for phase in (*TRAINING_PHASES, IDLE):
                middle = median_range([each.get(stage, {}).get(phase, 0.0) for each in busy]).median
                rows.append((shown, phase, middle, None, None))
            whole = median_range([sum(each.get(stage, {}).values()) for each in busy])
            rows.append((shown, TOTAL, whole.median, whole.low, whole.high))
    return DataTable(("stage", "part", "ms", "low", "high"), tuple(rows))


def _busy(run: ReportRun) -> dict[str, dict[str, float]]:
    """By stage and phase, for a step and worker."""
    begin_ns, end_ns, steps = run.window.begin_ns, run.window.end_ns, len(run.window.succeeded)
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    workers: dict[str, set[str]] = defaultdict(set)
    for batch in run.points.get("batch", ()):
        if begin_ns < batch.time_ns <= end_ns and batch.tags.get("phase") in TRAINING_PHASES:
            stage = batch.tags.get("stage", "")
            sums[stage][batch.tags["phase"]] += number_or_zero(batch, "busy_ms")
            workers[stage].add(batch.tags.get("worker", ""))
    step_ms, found = run.metrics.latency_ms["mean"], {}
    for stage, phases in sums.items():
        each = {phase: total / steps / len(workers[stage]) for phase, total in phases.items()}
        found[stage] = {**each, IDLE: max(0.0, step_ms - sum(each.values()))}
    return found


def sweep_table(runs: Sequence[ReportRun]) -> DataTable:
    """Throughput over what a sweep varied: the median of the repeats at each value, their least and their most.

    A point beside the sweep, such as a network that is not cut, has no value: it is level from the first to the last.
    """
    varied: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    beside: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        if run.sweep_setting is not None:
            value = run.sweep_setting[1]
            found = beside[run.label] if value is None else varied[run.sweep_name or run.label][value]
            found.append(run.metrics.throughput_per_s)
    rows: list[tuple[Cell, ...]] = []
    for name, values in varied.items():
        rows += [_swept(name, value, found) for value, found in sorted(values.items())]
    ends = sorted({value for values in varied.values() for value in values})
    for name, found in beside.items():
        rows += [_swept(name, value, found) for value in dict.fromkeys((ends or [0.0])[:1] + ends[-1:])]
    return DataTable(("run", "value", "throughput_per_s", "low", "high", "repeats"), tuple(rows))


def _swept(name: str, value: float, found: Sequence[float]) -> tuple[Cell, ...]:
    middle = median_range(found)
    return name, value, middle.median, middle.low, middle.high, len(found)


def learning_table(runs: Sequence[ReportRun], over: str) -> DataTable:
    """Loss, and accuracy where there is one, of each step; `over` is `step` or `time_s`."""
    rows: list[tuple[Cell, ...]] = []
    for field in ("loss", "accuracy"):
        for name, repeats in group_runs(runs).items():
            several = [list(_learned(run, field, over)) for run in repeats]
            found: list[tuple[Cell, ...]]
            if over == "time_s" or len(several) == 1:
                # At a time each repeat is at another step: the first one stands for them.
                found = [(field, name, x, y, None, None) for x, y in several[0]]
            else:
                found = [(field, name, *each) for each in _by_step(several)]
            rows += downsample(found, MAX_CURVE_POINTS)
    return DataTable(("of", "run", over, "value", "low", "high"), tuple(rows))


def _by_step(several: Sequence[Sequence[tuple[float, float]]]) -> Iterator[tuple[Cell, ...]]:
    values: dict[float, list[float]] = defaultdict(list)
    for curve in several:
        for step, value in curve:
            values[step].append(value)
    for step, found in sorted(values.items()):
        middle = median_range(found)
        yield step, middle.median, middle.low, middle.high


def _learned(run: ReportRun, field: str, over: str) -> Iterator[tuple[float, float]]:
    for end in run.window.succeeded if over == "time_s" else run.points.get("step", ()):
        value = number_or_none(end.fields.get(field))
        if value is not None:
            yield (run.seconds_since_start(end) if over == "time_s" else number_or_zero(end, "step")), value
