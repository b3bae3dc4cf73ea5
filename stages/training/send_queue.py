"""Queue of outgoing messages: they are sent in order, in the background, while the worker computes."""

import asyncio
import logging

from brokers.dispatch.channel import MessageChannel
from brokers.errors import SparseError
from brokers.protocol.messages import Message

log = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S = 2.0


class SendQueue:
    """Sends messages through one channel. Its length is bounded by the messages of one step."""

    def __init__(self, channel: MessageChannel) -> None:
        self._channel = channel
        self._queue: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self._sending: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start to send."""
        self._sending = asyncio.create_task(self._send_all(), name="send-queue")

    def send(self, topic: str, message: Message) -> None:
        """Queue a message. A message that cannot be sent is logged; its receiver notices that it is missing."""
        self._queue.put_nowait((topic, message))

    async def close(self) -> None:
        """Send the queued messages, for at most two seconds, and end."""
        if self._sending is None:
            return
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                await self._queue.join()
        except TimeoutError:
            log.warning("%d messages could not be sent", self._queue.qsize())
        self._sending.cancel()
        await asyncio.gather(self._sending, return_exceptions=True)
        self._sending = None

    async def _send_all(self) -> None:
        while True:
            topic, message = await self._queue.get()
            try:
                await self._channel.send(topic, message)
            except SparseError as error:
                log.warning("could not send a %s: %s", type(message).__name__, error)
            finally:
                self._queue.task_done()
