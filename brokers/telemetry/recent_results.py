"""Rate and latency of the newest results of a pipeline, for presence records and the live view."""

from collections import deque

from brokers.telemetry.percentiles import percentiles

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
