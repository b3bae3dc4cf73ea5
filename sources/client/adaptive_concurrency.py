"""How many requests a live source keeps in flight, so that results are as fresh as they can be at full speed. Pure.

A pipeline is full when its slowest stage never waits. By Little's law that takes as many requests in flight as that
stage ends while one passes through an empty pipeline: T / M, with T the time of the way and M the slowest stage's time
for one task. One more covers the way back. Whatever is beyond that only waits, and what waits gets old.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from brokers.protocol.stage_timing import Hop

_NEWEST = 0.1  # weight of the newest result in the means
_ROUNDING = 0.1  # times waver: a way that is as good as three times as long is three times as long
_LEAST = 2


class AdaptiveConcurrency:
    """Learns from results. `workers` says how many are up in a stage."""

    def __init__(self, workers: Callable[[str], int]) -> None:
        self._workers = workers
        self._way_ms = 0.0
        self._tasks_ms: dict[str, float] = {}

    def observe(self, hops: Sequence[Hop], latency_ms: float) -> None:
        """A result came, `latency_ms` after it was sent."""
        way_ms = max(0.0, latency_ms - sum(hop.queue_ms for hop in hops))
        self._way_ms = _mean(self._way_ms, way_ms)
        for hop in hops:
            busy_ms = hop.decode_ms + hop.compute_ms / max(1, hop.batch) + hop.encode_ms
            self._tasks_ms[hop.stage] = _mean(self._tasks_ms.get(hop.stage, 0.0), busy_ms)

    def limit(self, most: int) -> int:
        """Requests to keep in flight, `most` at most: the waiting for room at a busy stage looks like a longer way."""
        slowest_ms = max((ms / max(1, self._workers(stage)) for stage, ms in self._tasks_ms.items()), default=0.0)
        if not slowest_ms:
            return most
        return max(min(_LEAST, most), min(int(self._way_ms / slowest_ms + _ROUNDING) + 1, most))


def _mean(old: float, new: float) -> float:
    return (1 - _NEWEST) * old + _NEWEST * new if old else new
