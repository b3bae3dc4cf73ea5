"""Statistics of an inference run, and the sums by stage that those of a training run have as well."""

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from brokers.protocol.stage_timing import STAGE_DURATIONS, Hop
from brokers.telemetry.percentiles import percentiles

BYTE_COUNTS = ("bytes_in", "bytes_out")


@dataclass(slots=True)
class StageTotals:
    """Sums of named values by stage, with the number of tasks and the workers that served them."""

    _sums: dict[str, dict[str, float]] = field(default_factory=dict)
    _workers: dict[str, set[str]] = field(default_factory=dict)

    def add(self, stage: str, worker: str, tasks: int, values: Mapping[str, float]) -> None:
        """Add `values`, each a sum over `tasks` tasks that `worker` completed."""
        sums = self._sums.setdefault(stage, {})
        for name, value in {"tasks": tasks, **values}.items():
            sums[name] = sums.get(name, 0) + value
        self._workers.setdefault(stage, set()).add(worker)

    def stage_names(self, order: Sequence[str] = ()) -> list[str]:
        """The stages in `order`; those that are not in it last."""
        return sorted(self._sums, key=lambda name: order.index(name) if name in order else len(order))

    def total(self, stage: str, name: str) -> float:
        return self._sums[stage].get(name, 0)

    def summary(self, order: Sequence[str], means: Collection[str]) -> dict[str, dict[str, Any]]:
        """For each stage: `workers`, `tasks`, the mean per task of each value in `means`, and the sums of bytes."""
        return {name: self._stage_summary(name, means) for name in self.stage_names(order)}

    def _stage_summary(self, name: str, means: Collection[str]) -> dict[str, Any]:
        sums = self._sums[name]
        tasks = sums["tasks"]
        return {
            "workers": len(self._workers[name]),
            "tasks": tasks,
            **{key: round(sums.get(key, 0) / tasks, 3) if tasks else 0.0 for key in means},
            **{key: sums.get(key, 0) for key in BYTE_COUNTS},
        }


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
