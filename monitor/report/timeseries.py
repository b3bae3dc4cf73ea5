"""What happens to numbers on their way into a figure: counters read at any moment, bins, spreads. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from monitor.points.points import TelemetryPoint
from monitor.report.run import ReportRun, number_or_none

# Widths of the bins of a time axis; the first by which the longest run has no more than so many bins is taken.
_WIDTHS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 3600.0)
_BINS = 120


@dataclass(frozen=True, slots=True)
class MedianRange:
    """The median of several repeats, and the least and the most of them; `low` is None for a single one."""

    median: float
    low: float | None = None
    high: float | None = None


def median_range(values: Sequence[float]) -> MedianRange:
    """Of at least one value."""
    if len(values) == 1:
        return MedianRange(values[0])
    return MedianRange(median(values), min(values), max(values))


@dataclass(frozen=True)
class CounterCurve:
    """Something that only grows, known at some moments; between two of them it grows evenly. Times in seconds."""

    times_s: tuple[float, ...]
    totals: tuple[float, ...]

    def value_at(self, time_s: float) -> float:
        """Before the first moment it is what it was then; the same after the last."""
        after = bisect_right(self.times_s, time_s)
        if after == 0:
            return self.totals[0]
        if after == len(self.times_s):
            return self.totals[-1]
        begin, end = self.times_s[after - 1], self.times_s[after]
        share = (time_s - begin) / (end - begin)
        return self.totals[after - 1] + share * (self.totals[after] - self.totals[after - 1])

    def increase(self, begin_s: float, end_s: float) -> float:
        """By how much, in this time."""
        return self.value_at(end_s) - self.value_at(begin_s)


def counter_series(
    run: ReportRun,
    points: Iterable[TelemetryPoint],
    names: Sequence[str],
    key: Callable[[TelemetryPoint], str],
    *,
    is_delta: bool,
) -> dict[str, CounterCurve]:
    """One counter for each key and kind of points, from the sum of the fields `names`.

    `added`: a point says how much came since the one before. Otherwise it says the total, and a total that has become
    smaller has begun again at 0.
    """
    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        values = [value for name in names if (value := number_or_none(point.fields.get(name))) is not None]
        if values:
            found[key(point), tuple(sorted(point.tags.items()))].append((run.seconds_since_start(point), sum(values)))
    several: dict[str, list[CounterCurve]] = defaultdict(list)
    for (name, _), knots in found.items():
        several[name].append(_counter(knots, is_delta))
    return {name: _together(parts) for name, parts in several.items()}


def _counter(knots: Sequence[tuple[float, float]], added: bool) -> CounterCurve:
    times, totals = [knots[0][0]], [0.0]
    for (_, before), (time_s, value) in pairwise(knots):
        grown = value if added or value < before else value - before
        if time_s > times[-1]:
            times.append(time_s)
            totals.append(totals[-1] + grown)
        else:
            totals[-1] += grown
    return CounterCurve(tuple(times), tuple(totals))


def _together(parts: Sequence[CounterCurve]) -> CounterCurve:
    if len(parts) == 1:
        return parts[0]
    times = sorted({time_s for part in parts for time_s in part.times_s})
    return CounterCurve(tuple(times), tuple(sum(part.value_at(time_s) for part in parts) for time_s in times))


def bin_width_s(runs: Iterable[ReportRun]) -> float:
    """The same for all runs that stand in one figure."""
    longest_s = max(run.duration_s for run in runs)
    return next((width for width in _WIDTHS_S if longest_s / width <= _BINS), _WIDTHS_S[-1])


def binned_rates(run: ReportRun, counter: CounterCurve, width_s: float) -> list[tuple[float, float]]:
    """The middle of each whole bin of the measured time, in seconds, and by how much a second the counter grew in it.

    A run shorter than a bin has one, which ends with it. A bin in which the counter is not known from its begin to its
    end is left out.
    """
    found = []
    if 0 < run.duration_s < width_s and counter.times_s[0] <= 0 and run.duration_s <= counter.times_s[-1]:
        found.append((width_s / 2, counter.increase(0.0, run.duration_s) / run.duration_s))
    for place in range(int(run.duration_s / width_s + 1e-9)):
        begin, end = place * width_s, (place + 1) * width_s
        if counter.times_s[0] <= begin and end <= counter.times_s[-1]:
            found.append((begin + width_s / 2, counter.increase(begin, end) / width_s))
    return found


def binned_means(
    run: ReportRun, points: Iterable[TelemetryPoint], name: str, key: str, width_s: float
) -> dict[str, list[tuple[float, float]]]:
    """For each value of the tag `key`: the middle of each bin with a sample of the field, and their mean in it."""
    bins: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        value, time_s = number_or_none(point.fields.get(name)), run.seconds_since_start(point)
        if value is not None and 0 <= time_s < run.duration_s:
            bins[point.tags.get(key, "")][int(time_s / width_s)].append(value)
    return {
        name: [((place + 0.5) * width_s, sum(values) / len(values)) for place, values in sorted(found.items())]
        for name, found in bins.items()
    }


def aggregate_repeats(curves: Iterable[Sequence[tuple[float, float]]]) -> list[tuple[float, MedianRange]]:
    """Several curves on the same bins as one: the spread of what they have in each."""
    values: dict[float, list[float]] = defaultdict(list)
    for curve in curves:
        for time_s, value in curve:
            values[time_s].append(value)
    return [(time_s, median_range(found)) for time_s, found in sorted(values.items())]
