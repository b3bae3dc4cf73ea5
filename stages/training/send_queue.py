"""What a worker sends while it computes: one message after the other, in the order in which they were given."""

from __future__ import annotations

import asyncio
import logging

from brokers.dispatch.channel import MessageChannel
from brokers.errors import SparseError
from brokers.protocol.messages import Message

log = logging.getLogger(__name__)

# How long the last words may take when the worker leaves.
_LAST_S = 2.0


class SendQueue:
    """A queue of messages in front of a line. It holds what one step has to say, no more: that is bounded elsewhere."""

    def __init__(self, line: MessageChannel) -> None:
        self._line = line
        self._letters: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self._carrying: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._carrying = asyncio.create_task(self._carry(), name="post")

    def send(self, topic: str, message: Message) -> None:
        """Have it sent; what cannot go is logged, and missed by whoever waits for it."""
        self._letters.put_nowait((topic, message))

    async def close(self) -> None:
        """Send what is left, if that is soon done, and end."""
        carrying, self._carrying = self._carrying, None
        if carrying is None:
            return
        try:
            async with asyncio.timeout(_LAST_S):
                await self._letters.join()
        except TimeoutError:
            log.warning("%d messages could not be sent", self._letters.qsize())
        carrying.cancel()
        await asyncio.gather(carrying, return_exceptions=True)

    async def _carry(self) -> None:
        while True:
            topic, message = await self._letters.get()
            try:
                await self._line.send(topic, message)
            except SparseError as error:
                log.warning("could not send a %s: %s", type(message).__name__.lower(), error)
            finally:
                self._letters.task_done()
