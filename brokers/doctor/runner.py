"""Runs all checks of `sparse broker doctor`, and then measures the round trip and the rate of messages by size.

Messages are sent as Sparse sends them: at QoS 0, in chunks that fit the broker, a few in flight at once. Both clients
are in this process; two processes with a core each may be somewhat faster.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor.bridge_checks import bridge_directions, check_bridge
from brokers.doctor.checks import check_broker, run_check
from brokers.doctor.connection_checks import check_connection, cut_results
from brokers.doctor.probe_client import BrokerProbe, CheckResult, ProbeClient, format_bytes, is_usable, open_probe
from brokers.errors import RequestError
from brokers.protocol.chunking import CHUNK_BYTES, MESSAGE_LIMIT_BYTES
from brokers.protocol.transport import BrokerLimits

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


PathFactory = Callable[[], AbstractAsyncContextManager[tuple[MessagePath, MessagePath]]]

_MEASURE_TIMEOUT_S = 60.0  # for one size, on a slow link


@dataclass(eq=False)
class DoctorRun:
    """The brokers to check, the message sizes to measure by the name of their row, and all results."""

    broker: str = field(repr=False)  # addresses may contain passwords
    sizes_bytes: Mapping[str, int]
    sizes_are_cuts: bool = False  # the sizes are those of the tensors at a pipeline's cuts
    bridged_broker: str | None = field(default=None, repr=False)
    sites: tuple[str, str] = ("", "")  # of the two brokers
    on_result: Callable[[CheckResult], None] = lambda _: None  # called with each result at once
    results: list[CheckResult] = field(default_factory=list)
    throughput: list[ThroughputResult] = field(default_factory=list)

    async def run(self) -> None:
        """Run everything; nothing is left at the brokers, even if this is cancelled."""
        near_site, far_site = self.sites
        async with open_probe(self.broker, near_site) as near:
            limits = await self._check_connection(near)
            if limits is None:
                return
            if self.sizes_are_cuts:
                for result in cut_results(self.sizes_bytes, limits.max_packet_bytes):
                    self._add(result)
            async for result in check_broker(near, limits):
                self._add(result, near)
            if self.bridged_broker is None:
                await self._measure(partial(_local_paths, near))
                return
            async with open_probe(self.bridged_broker, far_site) as far:
                if await self._check_connection(far) is not None:
                    await self._check_bridge(near, far)

    async def _check_connection(self, probe: BrokerProbe) -> BrokerLimits | None:
        results, limits = await check_connection(probe)
        for result in results:
            self._add(result, probe)
        return limits

    async def _check_bridge(self, near: BrokerProbe, far: BrokerProbe) -> None:
        before = len(self.results)
        async for result in check_bridge(near, far):
            self._add(result)
        if is_usable(self.results[before:]):
            await self._measure(partial(_bridge_paths, near, far))

    async def _measure(self, open_paths: PathFactory) -> None:
        """Measure the sizes that fit a message, up to the first that fails."""

        async def measure(name: str, size_bytes: int) -> list[CheckResult]:
            async with open_paths() as (outbound, inbound):
                self.throughput.append(await measure_throughput(name, size_bytes, outbound, inbound))
            return []

        for name, size_bytes in self.sizes_bytes.items():
            if size_bytes > MESSAGE_LIMIT_BYTES:
                continue
            failures = await run_check("round trip", partial(measure, name, size_bytes), _MEASURE_TIMEOUT_S)
            for result in failures:
                self._add(replace(result, message=f"{name}: {result.message}"))
            if failures:
                return

    def _add(self, result: CheckResult, probe: BrokerProbe | None = None) -> None:
        if probe is not None:
            result = replace(result, broker=str(probe.address))
        self.results.append(result)
        self.on_result(result)


@asynccontextmanager
async def _local_paths(probe: BrokerProbe) -> AsyncIterator[tuple[MessagePath, MessagePath]]:
    outbound = probe.topic("outbound")
    inbound = probe.topic("inbound")
    async with probe.client() as one, probe.client() as other:
        await one.subscribe(inbound)
        await other.subscribe(outbound)
        yield MessagePath(one, other, outbound), MessagePath(other, one, inbound)


@asynccontextmanager
async def _bridge_paths(near: BrokerProbe, far: BrokerProbe) -> AsyncIterator[tuple[MessagePath, MessagePath]]:
    async with AsyncExitStack() as stack:
        outbound, inbound = [
            MessagePath(*await stack.enter_async_context(direction.clients()), direction.inbox)
            for direction in bridge_directions(near, far)
        ]
        yield outbound, inbound
