"""Waiting in line on one loop: who is called first came first, among those of the same rank."""

from __future__ import annotations

import asyncio
from collections import deque

from brokers.protocol.messages import PRIORITIES


class PriorityWaiters:
    """Those who wait, by rank: 0 goes before 1."""

    def __init__(self) -> None:
        self._lines: tuple[deque[asyncio.Future[None]], ...] = tuple(deque() for _ in PRIORITIES)
        self.notified = 0  # who has been called and has not gone on yet

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines)

    async def wait(self, timeout_s: float | None, rank: int = 0) -> None:
        """Wait to be called, or for so long."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line = self._lines[rank]
        line.append(turn)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except TimeoutError:
            return
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.notify()  # called and cancelled at once: the turn is the next one's
            raise
        finally:
            if turn in line:
                line.remove(turn)
            if turn.done() and not turn.cancelled():
                self.notified -= 1

    def notify(self) -> None:
        """Have the first of those who wait go on."""
        for line in self._lines:
            while line:
                turn = line.popleft()
                if not turn.done():
                    turn.set_result(None)
                    self.notified += 1
                    return

    def notify_all(self) -> None:
        """Have all who wait now look for themselves."""
        for _ in range(len(self)):
            self.notify()
