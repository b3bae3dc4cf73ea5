"""The in-flight limit of a source: a semaphore over requests and bytes, with priorities and a size that may change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from brokers.dispatch.priority_waiters import PriorityWaiters
from brokers.protocol.messages import PRIORITIES, Priority

# Payloads that a source keeps until their results arrive; one that is larger by itself is sent alone.
INFLIGHT_LIMIT_BYTES = 512 << 20


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
