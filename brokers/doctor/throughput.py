"""Messages of one size to and fro between two clients: the round trip, and how many go one way without a pause.

Messages go as Sparse sends them: at QoS 0, in chunks that fit the broker, a few on the way at once. Both clients are in
this process: two programs, each with a core of its own, may be somewhat faster.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor.check_result import ThroughputResult, format_bytes
from brokers.doctor.probe_client import ProbeClient
from brokers.errors import RequestError
from brokers.protocol.chunking import CHUNK_BYTES

T = TypeVar("T")

SIZES_BYTES = (1 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
ROUND_TRIPS = 5
IN_FLIGHT_MESSAGES = 4  # messages on the way at once
_WARM_UP = 1
_STREAM_S = 0.5  # then no further message is sent
_STREAM_LIMIT_BYTES = 64 << 20
_STREAM_MESSAGES = (3, 2000)  # at least, and at most
_SILENCE_S = 10.0


@dataclass(eq=False)
class MessageLost(RequestError):
    """Part of a message did not come."""

    expected_bytes: int
    actual_bytes: int

    def __str__(self) -> str:
        return f"of a message of {format_bytes(self.expected_bytes)} {self.actual_bytes:,} bytes came"


@dataclass(frozen=True, slots=True)
class MessagePath:
    """One direction: who sends, who listens on the topic."""

    sender: ProbeClient
    reader: ProbeClient
    topic: str

    def chunks(self, payload: memoryview) -> Iterator[memoryview]:
        """Yield the chunks of a message."""
        step = max(1, min(CHUNK_BYTES, self.sender.limits.max_packet_bytes - HEADER_RESERVE_BYTES))
        for offset in range(0, len(payload), step):
            yield payload[offset : offset + step]

    async def send(self, payload: memoryview) -> None:
        for piece in self.chunks(payload):
            await self.sender.publish(self.topic, piece)

    async def receive(self, size_bytes: int) -> None:
        """Return when so many bytes have come; raise `MessageLost` when no more of them do."""
        missing = size_bytes
        while missing > 0:
            heard = await self.reader.receive(_SILENCE_S)
            if heard is None:
                raise MessageLost(size_bytes, size_bytes - missing)
            missing -= len(heard.payload)

    async def transfer(self, payload: memoryview) -> None:
        """One message from end to end."""
        await _both(self.send(payload), self.receive(len(payload)))

    async def measure_rate_per_s(self, payload: memoryview) -> float:
        """How many such messages come in a second, when the next one leaves before the last one is there."""
        room = asyncio.Semaphore(IN_FLIGHT_MESSAGES)
        least, most = _STREAM_MESSAGES
        most = max(least, min(most, _STREAM_LIMIT_BYTES // len(payload)))
        began_s = time.monotonic()
        sent: asyncio.Queue[bool] = asyncio.Queue()

        async def send() -> None:
            for number in range(most):
                if number >= least and time.monotonic() - began_s > _STREAM_S:
                    break
                await room.acquire()
                sent.put_nowait(True)
                await self.send(payload)
            sent.put_nowait(False)

        async def receive() -> int:
            count = 0
            while await sent.get():
                await self.receive(len(payload))
                room.release()
                count += 1
            return count

        return await _both(send(), receive()) / (time.monotonic() - began_s)


async def measure_throughput(
    name: str, size_bytes: int, outbound: MessagePath, inbound: MessagePath
) -> ThroughputResult:
    """Return how fast messages of a size go; raise `MessageLost` or `ConnectionLost`."""
    payload = memoryview(bytes(size_bytes))
    took_ms = []
    for _ in range(_WARM_UP + ROUND_TRIPS):
        began_s = time.monotonic()
        await outbound.transfer(payload)
        await inbound.transfer(payload)
        took_ms.append(1000 * (time.monotonic() - began_s))
    rates = [await way.measure_rate_per_s(payload) for way in (outbound, inbound)]
    return ThroughputResult(name, size_bytes, statistics.median(took_ms[_WARM_UP:]), *rates)


async def _both(sending: Coroutine[Any, Any, None], receiving: Coroutine[Any, Any, T]) -> T:
    """Do both, until the first that fails; not a task group, which would wrap what failed."""
    tasks = asyncio.create_task(sending, name="doctor sends"), asyncio.create_task(receiving, name="doctor receives")
    try:
        return (await asyncio.gather(*tasks))[1]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
