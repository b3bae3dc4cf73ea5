"""How many requests of one source may be in flight: so many, so many bytes, and who goes next."""

from __future__ import annotations

from collections.abc import Callable

from brokers.dispatch.priority_waiters import PriorityWaiters
from brokers.protocol.messages import PRIORITIES, Priority

# What a source may hold of requests that have not been answered; one that is larger by itself still goes, alone.
INFLIGHT_LIMIT_BYTES = 512 << 20


class InflightLimit:
    """Room for requests in flight. `size` is asked each time: it may follow the workers that are up."""

    def __init__(self, size: Callable[[], int], limit_bytes: int = INFLIGHT_LIMIT_BYTES) -> None:
        self._size = size
        self._limit_bytes = limit_bytes
        self._turns = PriorityWaiters()
        self._bytes = 0
        self.in_flight = 0

    @property
    def limit(self) -> int:
        """How many may be in flight now."""
        return max(1, self._size())

    @property
    def waiting(self) -> int:
        """How many wait to be let in."""
        return len(self._turns)

    async def acquire(self, priority: Priority = "interactive") -> None:
        """Wait for room and take it: the urgent first, and among equals who came first."""
        rank = PRIORITIES.index(priority)
        first = True
        while not self._has_room or (first and (self.waiting or self._turns.notified)):
            await self._turns.wait(None, rank)
            first = False
        self.in_flight += 1
        self.wake_next()

    @property
    def _has_room(self) -> bool:
        return self.in_flight + self._turns.notified < self.limit and self._bytes < self._limit_bytes

    def add_bytes(self, nbytes: int) -> None:
        """Say how much it is that was let in: known only once a live source has been asked for its newest."""
        self._bytes += nbytes

    def release(self, nbytes: int = 0) -> None:
        """Give the room back."""
        self.in_flight -= 1
        self._bytes -= nbytes
        self.wake_next()

    def wake_next(self) -> None:
        """There may be more room than before: whoever is next goes on if there is."""
        if self._has_room:
            self._turns.notify()
