"""Fair waiting on one event loop: the oldest waiter of the most urgent priority is notified first."""

import asyncio
from collections import deque

from brokers.protocol.messages import PRIORITIES


class PriorityWaiters:
    """FIFO queues of waiting tasks, one for each rank; rank 0 is served first."""

    def __init__(self) -> None:
        self._queues: tuple[deque[asyncio.Future[None]], ...] = tuple(deque() for _ in PRIORITIES)
        self.notified = 0  # waiters that have been notified and have not resumed yet

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues)

    async def wait(self, timeout_s: float | None, rank: int = 0) -> None:
        """Wait to be notified, at most for `timeout_s`; return in either case."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._queues[rank]
        queue.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self.notify()  # notified and cancelled at once: the notification belongs to the next waiter
            raise
        finally:
            if waiter in queue:
                queue.remove(waiter)
            if waiter.done() and not waiter.cancelled():
                self.notified -= 1

    def notify(self) -> None:
        for queue in self._queues:
            while queue:
                waiter = queue.popleft()
                if not waiter.done():
                    waiter.set_result(None)
                    self.notified += 1
                    return

    def notify_all(self) -> None:
        for _ in range(len(self)):
            self.notify()
