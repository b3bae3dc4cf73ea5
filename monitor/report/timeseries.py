"""Points as time series: counters, values in bins of equal width, and repeats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from monitor.analysis.counter_series import CounterSeries
from monitor.analysis.median_range import MedianRange
from monitor.points.points import TelemetryPoint
from monitor.report.run import ReportRun, number_or_none

TimeSeries = Sequence[tuple[float, float]]  # (seconds since the start of the measured window, value)
# Bin widths; a report uses the first with which its longest run has at most `_MAX_BINS`.
_BIN_WIDTHS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 3600.0)
_MAX_BINS = 120


def counter_series(
    run: ReportRun,
    points: Iterable[TelemetryPoint],
    fields: Sequence[str],
    key: Callable[[TelemetryPoint], str],
    *,
    is_delta: bool,
) -> dict[str, CounterSeries]:
    """One counter per key: the sum of `fields` in its points, over all tags. Times are seconds since the run's start.

    `is_delta`: a point has the increase since the point before; otherwise the total, and a total that decreases has
    been reset to zero.
    """
    by_source: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        values = [value for name in fields if (value := number_or_none(point, name)) is not None]
        if values:
            by_source[key(point), tuple(sorted(point.tags.items()))].append(
                (run.seconds_since_start(point), sum(values))
            )
    by_key: dict[str, list[CounterSeries]] = defaultdict(list)
    for (name, _), values_over_time in by_source.items():
        by_key[name].append(_accumulate(values_over_time, is_delta))
    return {name: _add_counters(counters) for name, counters in by_key.items()}


def _accumulate(values: TimeSeries, is_delta: bool) -> CounterSeries:
    """The increase since the first point."""
    totals = {values[0][0]: 0.0}
    total = 0.0
    for (_, before), (time_s, value) in pairwise(values):
        total += value if is_delta or value < before else value - before
        totals[time_s] = total
    return CounterSeries(tuple(totals.items()))


def _add_counters(counters: Sequence[CounterSeries]) -> CounterSeries:
    if len(counters) == 1:
        return counters[0]
    times = sorted({time_s for counter in counters for time_s, _ in counter.readings})
    return CounterSeries(tuple((time_s, sum(each.value_at(time_s) for each in counters)) for time_s in times))


def bin_width_s(runs: Iterable[ReportRun]) -> float:
    """The width of the bins of a time axis, the same for all runs of a report."""
    longest_s = max(run.duration_s for run in runs)
    return next((width for width in _BIN_WIDTHS_S if longest_s / width <= _MAX_BINS), _BIN_WIDTHS_S[-1])


def binned_rates(run: ReportRun, counter: CounterSeries, width_s: float) -> TimeSeries:
    """The centre of each whole bin of the run, and the counter's increase per second in it.

    A run shorter than a bin has one rate, over its length. Bins that the readings do not cover are left out.
    """
    first_s, last_s = counter.readings[0][0], counter.readings[-1][0]
    if 0 < run.duration_s < width_s:
        bins = [(0.0, run.duration_s)]
    else:
        bins = [(index * width_s, (index + 1) * width_s) for index in range(int(run.duration_s / width_s + 1e-9))]
    return [
        (begin + width_s / 2, counter.increase(begin, end) / (end - begin))
        for begin, end in bins
        if first_s <= begin and end <= last_s
    ]


def binned_means(
    run: ReportRun, points: Iterable[TelemetryPoint], field: str, tag: str, width_s: float
) -> list[TimeSeries]:
    """Per value of `tag`, the centre of each bin with a sample of the field, and the mean of the samples in it."""
    bins: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        value, time_s = number_or_none(point, field), run.seconds_since_start(point)
        if value is not None and 0 <= time_s < run.duration_s:
            bins[point.tags.get(tag, "")][int(time_s / width_s)].append(value)
    return [
        [((index + 0.5) * width_s, sum(values) / len(values)) for index, values in sorted(by_index.items())]
        for by_index in bins.values()
    ]


def add_series(series: Sequence[TimeSeries]) -> TimeSeries:
    """The sum of several series, at the times that all of them have."""
    if not series:
        return []
    values = [dict(each) for each in series]
    common = set.intersection(*(set(each) for each in values))
    return [(time_s, sum(each[time_s] for each in values)) for time_s in sorted(common)]


def aggregate_repeats(repeats: Iterable[TimeSeries]) -> list[tuple[float, MedianRange]]:
    """Several series as one: the median and range of their values at each time."""
    values: dict[float, list[float]] = defaultdict(list)
    for series in repeats:
        for time_s, value in series:
            values[time_s].append(value)
    return [(time_s, MedianRange.from_values(each)) for time_s, each in sorted(values.items())]
