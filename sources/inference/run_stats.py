"""Statistics of an inference run: counts, latencies, and the mean time of a task at each stage."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from brokers.protocol.stage_timing import STAGE_DURATIONS, Hop
from brokers.telemetry.percentiles import percentiles
from sources.stage_totals import BYTE_COUNTS, StageTotals

# Percentiles are those of the newest results, so that memory stays bounded.
_RECENT_LATENCIES = 10_000


@dataclass(slots=True)
class InferenceRunStats:
    """Statistics of the requests of one source; times are monotonic seconds."""

    requests: int = 0
    results: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    begin_s: float | None = None
    end_s: float = 0.0
    _latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_LATENCIES))
    _stages: StageTotals = field(default_factory=StageTotals)

    def record_request(self, now_s: float) -> None:
        self.requests += 1
        self.begin_s = now_s if self.begin_s is None else self.begin_s

    def record_result(self, latency_ms: float, hops: Sequence[Hop], now_s: float) -> None:
        self.results += 1
        self.end_s = now_s
        self._latencies_ms.append(round(latency_ms, 3))  # as in telemetry, so that both have the same percentiles
        for hop in hops:
            byte_counts = {name: getattr(hop, name) for name in BYTE_COUNTS}
            self._stages.add(hop.stage, hop.worker, 1, {**hop.durations(), **byte_counts})

    def record_failure(self, code: str, now_s: float) -> None:
        self.failures[code] += 1
        self.end_s = now_s

    def summary(self, order: Sequence[str] = ()) -> dict[str, Any]:
        """The summary that docs/operations.md describes, with stages in `order`.

        `lost` counts requests that have neither a result nor a failure; times are from the first request to the last
        response.
        """
        elapsed_s = max(0.0, self.end_s - self.begin_s) if self.begin_s is not None else 0.0
        failed = self.failures.total()
        return {
            "requests": self.requests,
            "results": self.results,
            "failed": failed,
            "failures": dict(self.failures),
            "lost": self.requests - self.results - failed,
            "elapsed_s": round(elapsed_s, 3),
            "throughput_per_s": round(self.results / elapsed_s, 2) if elapsed_s else 0.0,
            "latency_ms": percentiles(self._latencies_ms) if self.results else {},
            "stages": self._stages.summary(order, STAGE_DURATIONS),
        }
