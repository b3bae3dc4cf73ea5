"""Monotonic counters as they were read at some moments, interpolated in between."""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CounterSeries:
    """Readings of a monotonic counter: at least one (time, value), in the order of time.

    All times of one series are in one unit and of one clock.
    """

    readings: tuple[tuple[float, float], ...]

    def value_at(self, time: float) -> float:
        """The value, interpolated linearly; the first reading's before it, the last one's after it."""
        after = bisect_right(self.readings, time, key=lambda reading: reading[0])
        if after in (0, len(self.readings)):
            return self.readings[min(after, len(self.readings) - 1)][1]
        (begin, first), (end, last) = self.readings[after - 1], self.readings[after]
        return first + (last - first) * (time - begin) / (end - begin)

    def value_after(self, time: float) -> float:
        """The first reading at `time` or later; without one, the last."""
        return next((value for read_at, value in self.readings if read_at >= time), self.readings[-1][1])

    def increase(self, begin: float, end: float) -> float:
        """By how much the counter grows from `begin` to `end`."""
        return self.value_at(end) - self.value_at(begin)
