"""Measures messages of one size between two clients: the round trip, and the rate in each direction.

Messages are sent as Sparse sends them: at QoS 0, in chunks that fit the broker, a few in flight at once. Both clients
are in this process; two processes with a core each may be somewhat faster.
"""

import asyncio
import statistics
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor.check_result import format_bytes
from brokers.doctor.probe_client import ProbeClient
from brokers.errors import RequestError
from brokers.protocol.chunking import CHUNK_BYTES

T = TypeVar("T")

SIZES_BYTES = (1 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
ROUND_TRIPS = 5
IN_FLIGHT_MESSAGES = 4
_WARM_UP = 1
# Of one direction: sending stops after this time, these bytes, or this many messages.
_STREAM_S = 0.5
_STREAM_LIMIT_BYTES = 64 << 20
_STREAM_MESSAGES_MIN = 3
_STREAM_MESSAGES_MAX = 2000
_CHUNK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    """Throughput of messages of one size between two clients."""

    name: str
    size_bytes: int
    round_trip_ms: float
    outbound_per_s: float
    inbound_per_s: float

    @property
    def frames_per_s(self) -> float:
        """Requests per second that the broker could carry, each with one such message in either direction."""
        return min(self.outbound_per_s, self.inbound_per_s)

    @property
    def outbound_mb_s(self) -> float:
        return self.outbound_per_s * self.size_bytes / 1e6

    @property
    def inbound_mb_s(self) -> float:
        return self.inbound_per_s * self.size_bytes / 1e6


def format_table(rows: Sequence[ThroughputResult]) -> list[str]:
    """The measurements as lines, with column names."""
    width = max(len("size"), *(len(row.name) for row in rows))
    head = f"{'size':<{width}}  {'round trip ms':>13}  {'out MB/s':>10}  {'back MB/s':>10}  {'frames/s':>9}"
    lines = (
        f"{row.name:<{width}}  {row.round_trip_ms:>13.1f}  {row.outbound_mb_s:>10.1f}  {row.inbound_mb_s:>10.1f}"
        f"  {row.frames_per_s:>9.1f}"
        for row in rows
    )
    return [head, *lines]


@dataclass(frozen=True, slots=True)
class MessagePath:
    """One direction: `sender` publishes to the topic that `reader` has subscribed to."""

    sender: ProbeClient
    reader: ProbeClient
    topic: str

    async def send(self, payload: memoryview) -> None:
        """Publish the chunks of a message."""
        step = max(1, min(CHUNK_BYTES, self.sender.limits.max_packet_bytes - HEADER_RESERVE_BYTES))
        for offset in range(0, len(payload), step):
            await self.sender.publish(self.topic, payload[offset : offset + step])

    async def receive(self, size_bytes: int) -> None:
        """Return when a message of this size has arrived; raise `RequestError` ("MessageLost") if part is lost."""
        missing_bytes = size_bytes
        while missing_bytes > 0:
            message = await self.reader.receive(_CHUNK_TIMEOUT_S)
            if message is None:
                raise RequestError(
                    "MessageLost",
                    f"of a message of {format_bytes(size_bytes)} only {size_bytes - missing_bytes:,} bytes arrived",
                    expected_bytes=size_bytes,
                    actual_bytes=size_bytes - missing_bytes,
                )
            missing_bytes -= len(message.payload)

    async def measure_rate_per_s(self, payload: memoryview) -> float:
        """Messages per second with IN_FLIGHT_MESSAGES in flight."""
        credit = asyncio.Semaphore(IN_FLIGHT_MESSAGES)
        limit = max(_STREAM_MESSAGES_MIN, min(_STREAM_MESSAGES_MAX, _STREAM_LIMIT_BYTES // len(payload)))
        begin_s = time.monotonic()
        sent: asyncio.Queue[bool] = asyncio.Queue()  # True for each message, False after the last

        async def send() -> None:
            for number in range(limit):
                if number >= _STREAM_MESSAGES_MIN and time.monotonic() - begin_s > _STREAM_S:
                    break
                await credit.acquire()
                sent.put_nowait(True)
                await self.send(payload)
            sent.put_nowait(False)

        async def receive() -> int:
            count = 0
            while await sent.get():
                await self.receive(len(payload))
                credit.release()
                count += 1
            return count

        return await _run_both(send(), receive()) / (time.monotonic() - begin_s)


async def measure_throughput(
    name: str, size_bytes: int, outbound: MessagePath, inbound: MessagePath
) -> ThroughputResult:
    """Measure messages of one size; raises `RequestError` ("MessageLost") or `ConnectionLost`."""
    payload = memoryview(bytes(size_bytes))
    round_trips_ms = []
    for _ in range(_WARM_UP + ROUND_TRIPS):
        begin_s = time.monotonic()
        for path in (outbound, inbound):
            await _run_both(path.send(payload), path.receive(size_bytes))
        round_trips_ms.append(1000 * (time.monotonic() - begin_s))
    rates = [await path.measure_rate_per_s(payload) for path in (outbound, inbound)]
    return ThroughputResult(name, size_bytes, statistics.median(round_trips_ms[_WARM_UP:]), rates[0], rates[1])


async def _run_both(sending: Coroutine[Any, Any, None], receiving: Coroutine[Any, Any, T]) -> T:
    """Run both, and return the result of the second; if one fails the other is cancelled."""
    tasks = (asyncio.create_task(sending, name="sends"), asyncio.create_task(receiving, name="receives"))
    try:
        return (await asyncio.gather(*tasks))[1]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
