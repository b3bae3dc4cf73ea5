"""Percentiles, by the one definition in Sparse, and the rate and latency of the newest results."""

from collections import deque
from collections.abc import Collection, Sequence

import numpy as np


def percentiles(values: Collection[float], percents: Sequence[float] = (50, 95, 99)) -> dict[str, float]:
    """Nearest-rank percentiles of `values`, named "p50", "p95", ...; all 0.0 where there are no values.

    The p-th percentile is the smallest value that at least p percent of the values do not exceed.
    """
    names = [f"p{percent:g}" for percent in percents]
    if not values:
        return dict.fromkeys(names, 0.0)
    ranks = np.percentile(np.fromiter(values, float, len(values)), percents, method="inverted_cdf")
    return dict(zip(names, map(float, ranks), strict=True))


RATE_WINDOW_S = 5.0
_MIN_RATE_WINDOW_S = 0.2


class RecentResults:
    """The newest `size` results of a pipeline; times are monotonic seconds."""

    def __init__(self, size: int = 1024) -> None:
        self._times_s: deque[float] = deque(maxlen=size)
        self._latencies_ms: deque[float] = deque(maxlen=size)
        self._begin_s: float | None = None

    def add(self, latency_ms: float, now_s: float) -> None:
        if self._begin_s is None:
            self._begin_s = now_s - latency_ms / 1000
        self._times_s.append(now_s)
        self._latencies_ms.append(latency_ms)

    def rate(self, now_s: float) -> float:
        """Results a second in the last `RATE_WINDOW_S`, or since the first one that is remembered."""
        begin_s = max(now_s - RATE_WINDOW_S, now_s if self._begin_s is None else self._begin_s)
        if len(self._times_s) == self._times_s.maxlen:
            begin_s = max(begin_s, self._times_s[0])
        count = sum(time_s >= begin_s for time_s in self._times_s)
        return count / max(now_s - begin_s, _MIN_RATE_WINDOW_S)

    def latency_ms(self, *percents: float) -> dict[str, float]:
        """Percentiles of the latencies, named "p50", ...; 0 before the first result."""
        return percentiles(self._latencies_ms, percents)
