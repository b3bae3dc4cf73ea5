"""The in-flight limit of a live source, by Little's law: full throughput at the lowest latency.

A pipeline is saturated when its slowest stage never waits. By Little's law that takes T / M requests in flight, with T
the latency of an empty pipeline and M the time that the slowest stage needs for one task; one more covers the way back.
Any further request only waits in a queue, and its result is older when it arrives.
"""

from collections.abc import Callable, Sequence

from brokers.protocol.stage_timing import Hop

_NEWEST_WEIGHT = 0.1  # of the exponentially weighted means
_ROUNDING = 0.1  # measured times vary: a ratio of 2.9 or more counts as 3
_MIN_LIMIT = 2


class AdaptiveConcurrency:
    """Estimates T and M from results. `worker_count` returns how many workers of a stage are up."""

    def __init__(self, worker_count: Callable[[str], int]) -> None:
        self._worker_count = worker_count
        self._empty_latency_ms = 0.0
        self._task_ms: dict[str, float] = {}  # by stage

    def observe(self, hops: Sequence[Hop], latency_ms: float) -> None:
        """Update the estimates with a result that arrived `latency_ms` after its request was made."""
        empty_latency_ms = max(0.0, latency_ms - sum(hop.queue_ms for hop in hops))
        self._empty_latency_ms = _moving_mean(self._empty_latency_ms, empty_latency_ms)
        for hop in hops:
            busy_ms = hop.decode_ms + hop.compute_ms / max(1, hop.batch) + hop.encode_ms
            self._task_ms[hop.stage] = _moving_mean(self._task_ms.get(hop.stage, 0.0), busy_ms)

    def limit(self, upper_bound: int) -> int:
        """The number of requests to keep in flight; `upper_bound` before the first result.

        The bound is needed because waiting for a slot at a busy worker is measured as part of the latency.
        """
        slowest_ms = max((ms / max(1, self._worker_count(stage)) for stage, ms in self._task_ms.items()), default=0.0)
        if not slowest_ms:
            return upper_bound
        limit = int(self._empty_latency_ms / slowest_ms + _ROUNDING) + 1
        return min(upper_bound, max(_MIN_LIMIT, limit))


def _moving_mean(mean: float, newest: float) -> float:
    return (1 - _NEWEST_WEIGHT) * mean + _NEWEST_WEIGHT * newest if mean else newest
