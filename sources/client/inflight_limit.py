"""The in-flight limit of a source: a semaphore over requests and bytes, with priorities and a size that may change.

A live source keeps as few requests in flight as give full throughput. A pipeline is saturated when its slowest stage
never waits. By Little's law that takes T / M requests in flight, with T the latency of an empty pipeline and M the time
that the slowest stage needs for one task; one more covers the return of the result. Any further request only waits in
a queue, and its result is older when it arrives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from brokers.dispatch.priority_waiters import PriorityWaiters
from brokers.protocol.messages import PRIORITIES, Priority
from brokers.protocol.stage_timing import Hop

# Payloads that a source keeps until their results arrive; one that is larger by itself is sent alone.
INFLIGHT_LIMIT_BYTES = 512 << 20
_NEWEST_WEIGHT = 0.1  # of the exponentially weighted means
_ROUNDING = 0.1  # measured times vary: a ratio of 2.9 or more counts as 3
_MIN_LIMIT = 2


class InflightLimit:
    """Bounds the requests in flight. `size` is called at each decision: it may follow the number of workers."""

    def __init__(self, size: Callable[[], int], limit_bytes: int = INFLIGHT_LIMIT_BYTES) -> None:
        self._size = size
        self._limit_bytes = limit_bytes
        self._waiters = PriorityWaiters()
        self.nbytes = 0
        self.in_flight = 0

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return max(1, self._size())

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiters)

    @asynccontextmanager
    async def slot(self, priority: Priority = "interactive") -> AsyncIterator[Slot]:
        """Wait for a slot, by priority, then first come, first served; release it on exit."""
        rank = PRIORITIES.index(priority)
        first = True
        while not self._has_slot or (first and (self.waiting or self._waiters.notified)):
            await self._waiters.wait(None, rank)
            first = False
        slot = Slot(self)
        self.in_flight += 1
        self.wake_next()
        try:
            yield slot
        finally:
            self.in_flight -= 1
            self.nbytes -= slot.nbytes
            self.wake_next()

    @property
    def _has_slot(self) -> bool:
        return self.in_flight + self._waiters.notified < self.limit and self.nbytes < self._limit_bytes

    def wake_next(self) -> None:
        """Wake the next waiter if there is a slot for it: the limit may have grown."""
        if self._has_slot:
            self._waiters.notify()


@dataclass(slots=True, eq=False)
class Slot:
    """The right to have one request in flight, within `async with limit.slot() as slot`."""

    _limit: InflightLimit
    nbytes: int = 0

    def add_bytes(self, nbytes: int) -> None:
        """Account the payload: its size is known only after the slot was acquired and the sample taken."""
        self.nbytes += nbytes
        self._limit.nbytes += nbytes


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
            busy_ms = hop.decode_ms + hop.compute_ms / hop.batch + hop.encode_ms
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
