"""Points as time series: rates of counters and means of samples, in bins of equal width, and repeats as one series."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

import numpy as np

from monitor.analysis.run_metrics import MedianRange
from monitor.points.points import TelemetryPoint
from monitor.report.run import ReportRun, number_or_none

TimeSeries = Sequence[tuple[float, float]]  # (seconds since the start of the measured window, value)
SpreadSeries = list[tuple[float, float, float | None, float | None]]  # seconds, median, minimum, maximum
# Bin widths; a report uses the first with which its longest run has at most `_MAX_BINS`.
_BIN_WIDTHS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 3600.0)
_MAX_BINS = 120


def bin_width_s(runs: Iterable[ReportRun]) -> float:
    """The width of the bins of a time axis, the same for all runs of a report."""
    longest_s = max(run.window.span_s for run in runs)
    return next((width for width in _BIN_WIDTHS_S if longest_s / width <= _MAX_BINS), _BIN_WIDTHS_S[-1])


def time_label(runs: Sequence[ReportRun]) -> str:
    """The label of a time axis."""
    return f"time since the first measured {runs[0].event} (s)"


def binned_rates(
    run: ReportRun,
    points: Iterable[TelemetryPoint],
    value_of: Callable[[TelemetryPoint], float],
    width_s: float,
    key: Callable[[TelemetryPoint], str] = lambda _: "",
    *,
    is_delta: bool,
) -> dict[str, TimeSeries]:
    """Per key, the centre of each whole bin of the run, and the increase per second of the key's counters in it.

    The points of one combination of tags are the readings of one counter. `is_delta`: a reading is the increase since
    the reading before; otherwise the total, and a total that decreases has been reset to zero.

    A run shorter than a bin has one rate, over its length. Bins that the readings do not cover are left out.
    """
    readings: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        counter = key(point), tuple(sorted(point.tags.items()))
        readings[counter].append((run.seconds_since_start(point), value_of(point)))
    span_s = run.window.span_s
    edges = np.arange(int(span_s / width_s + 1e-9) + 1) * width_s
    if 0 < span_s < width_s:
        edges = np.array([0.0, span_s])
    totals: dict[str, list[np.ndarray]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    for (name, _), values in readings.items():
        times_s, counts = np.array(values).T
        increases = counts if is_delta else np.diff(counts, prepend=counts[0])
        increases = np.where(increases < 0, counts, increases)
        totals[name].append(np.interp(edges, times_s, np.cumsum(increases)))
        times[name] += [times_s[0], times_s[-1]]
    return {
        name: [
            (float(begin) + width_s / 2, float(increase / (end - begin)))
            for begin, end, increase in zip(edges, edges[1:], np.diff(sum(totals[name])), strict=False)
            if min(times[name]) <= begin and end <= max(times[name])
        ]
        for name in totals
    }


def binned_means(
    run: ReportRun,
    points: Iterable[TelemetryPoint],
    field: str,
    tag: str,
    width_s: float,
    combine: Callable[[Iterable[float]], float],
) -> TimeSeries:
    """The centre of each bin in which every device, a value of `tag`, has samples, and the devices' combined means."""
    bins: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        value, time_s = number_or_none(point, field), run.seconds_since_start(point)
        if value is not None and 0 <= time_s < run.window.span_s:
            bins[int(time_s / width_s)][point.tags.get(tag, "")].append(value)
    devices = {device for by_device in bins.values() for device in by_device}
    return [
        ((index + 0.5) * width_s, combine(map(fmean, by_device.values())))
        for index, by_device in sorted(bins.items())
        if len(by_device) == len(devices)
    ]


def aggregate_repeats(repeats: Iterable[TimeSeries]) -> SpreadSeries:
    """Several series as one: the median and range of their values at each time."""
    values: dict[float, list[float]] = defaultdict(list)
    for series in repeats:
        for time_s, value in series:
            values[time_s].append(value)
    spreads = {time_s: MedianRange.from_values(each) for time_s, each in sorted(values.items())}
    return [(time_s, spread.median, *spread.bounds) for time_s, spread in spreads.items()]
