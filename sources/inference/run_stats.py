"""The figures of a run, as they stand: counts, latencies, and the mean time of a task at each stage. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from brokers.protocol.stage_timing import Hop
from sources.stage_totals import StageTotals, percentiles

# Percentiles are of the last so many results: memory stays flat however long a source runs.
_LATENCIES = 10_000
_MEANS = ("queue_ms", "decode_ms", "compute_ms", "encode_ms")
_SUMS = ("bytes_in", "bytes_out")


@dataclass(slots=True)
class InferenceRunStats:
    """What happened to the requests of one source."""

    requests: int = 0
    results: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    started_s: float | None = None
    ended_s: float = 0.0
    _latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))
    _stages: StageTotals = field(default_factory=StageTotals)

    def record_request(self, now_s: float) -> None:
        """A request was made."""
        self.requests += 1
        self.started_s = now_s if self.started_s is None else self.started_s

    def record_result(self, latency_ms: float, hops: Sequence[Hop], now_s: float) -> None:
        """A result came."""
        self.results += 1
        self.ended_s = now_s
        self._latencies_ms.append(latency_ms)
        for hop in hops:
            self._stages.add(hop.stage, hop.worker, 1, {key: getattr(hop, key) for key in (*_MEANS, *_SUMS)})

    def record_failure(self, error: str, now_s: float) -> None:
        """A request ended without a result."""
        self.failures[error] += 1
        self.ended_s = now_s

    @property
    def elapsed_s(self) -> float:
        """From the first request to the last answer."""
        return max(0.0, self.ended_s - self.started_s) if self.started_s is not None else 0.0

    def summary(self, order: Sequence[str] = ()) -> dict[str, Any]:
        """The figures as docs/operations.md describes them; `lost` is what has neither a result nor a typed failure.

        Stages come in `order`; those that are not in it come last.
        """
        elapsed_s = self.elapsed_s
        failed = sum(self.failures.values())
        return {
            "requests": self.requests,
            "results": self.results,
            "failed": failed,
            "failures": dict(self.failures),
            "lost": self.requests - self.results - failed,
            "elapsed_s": round(elapsed_s, 3),
            "throughput_per_s": round(self.results / elapsed_s, 2) if elapsed_s else 0.0,
            "latency_ms": percentiles(self._latencies_ms),
            "stages": self._stages.summary(order, _MEANS, _SUMS),
        }
