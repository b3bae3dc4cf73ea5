"""The checks across a bridge between two brokers, on topics of the real topic grammar: a bridge forwards only those."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor.checks import (
    CHECK_TIMEOUT_S,
    TEST_PROPERTIES,
    is_topic_cleared,
    properties_result,
    run_check,
)
from brokers.doctor.probe_client import (
    FIX_PACKET_SIZE,
    BrokerProbe,
    CheckResult,
    ProbeClient,
    ReceivedPublish,
    fail,
    format_bytes,
    is_usable,
    ok,
)
from brokers.protocol.chunking import CHUNK_BYTES
from brokers.protocol.topics import DOCTOR_LEVEL, StageTopics
from brokers.protocol.transport import Will

BRIDGE_TIMEOUT_S = 10.0  # a bridge that was started with its broker needs some seconds to connect
RECONNECT_TIMEOUT_S = 40.0  # Mosquitto, by default, waits for 5 to 30 s before it connects a bridge again
_REPEAT_S = 0.5  # messages of QoS 0 are lost until the bridge is connected
_COPIES_WAIT_S = 1.0  # for duplicates to arrive
_WORKER = "probe"
_FIX_LOOP = (
    "Mosquitto: one bridge between two sites, and no topic line with `both`; `sparse broker config` prints the "
    "right ones"
)


@dataclass(frozen=True, slots=True)
class BridgeDirection:
    """One direction of a bridge: senders are at `start`, readers at `end`; `stage` is unique to this run."""

    start: BrokerProbe
    end: BrokerProbe
    stage: str

    @property
    def name(self) -> str:
        return f"{self.start.site} to {self.end.site}"

    @property
    def inbox(self) -> str:
        return StageTopics(self.end.site, DOCTOR_LEVEL, self.stage).inbox(_WORKER)

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[tuple[ProbeClient, ProbeClient]]:
        """A sender at the start, and a reader of the inbox at the end."""
        async with self.start.client() as sender, self.end.client() as reader:
            await reader.subscribe(self.inbox)
            yield sender, reader

    async def _publish_until_received(
        self, sender: ProbeClient, reader: ProbeClient, timeout_s: float
    ) -> tuple[ReceivedPublish | None, float]:
        """Publish messages until one arrives; return it, and how many milliseconds ago the last one was published."""
        end_s = time.monotonic() + timeout_s
        message = None
        after_ms = 0.0
        while message is None and time.monotonic() < end_s:
            begin_s = time.monotonic()
            await sender.publish(self.inbox, secrets.token_bytes(4), TEST_PROPERTIES)
            message = await reader.receive(_REPEAT_S)
            after_ms = 1000 * (time.monotonic() - begin_s)
        return message, after_ms

    async def check_forwarding(self) -> list[CheckResult]:
        """Publish until a message arrives, and then count the copies of each at both ends."""
        async with self.clients() as (sender, reader), self.start.client() as local_reader:
            await local_reader.subscribe(self.inbox)
            first, after_ms = await self._publish_until_received(sender, reader, BRIDGE_TIMEOUT_S)
            if first is None:
                fix = (
                    f"Mosquitto at {self.start.site}: topic sparse/{self.end.site}/+/+/in/+ out 0, and the other lines "
                    f"that `sparse broker config FILE {self.start.site}` prints; see also the logs of both brokers"
                )
                return [fail("bridge", f"{self.name}: messages for the site are not forwarded", fix)]
            remote, local = await asyncio.gather(
                *(each.receive_all(100, _COPIES_WAIT_S) for each in (reader, local_reader))
            )
        forwarded = ok("bridge", f"{self.name}: a message arrives after {after_ms:.1f} ms")
        counts = [Counter(bytes(message.payload) for message in each) for each in ([first, *remote], local)]
        copies = max(max(count.values(), default=0) for count in counts)
        if copies > 1:
            message = f"{self.name}: a message arrived {copies} times: the bridges make a loop, or there are two"
            return [forwarded, fail("duplicates", message, _FIX_LOOP)]
        return [forwarded, ok("duplicates", f"{self.name}: each message arrives once, at both brokers")]

    async def check_properties(self) -> CheckResult:
        fix = "Mosquitto: bridge_protocol_version mqttv50, in the bridge's connection"
        async with self.clients() as (sender, reader):
            await sender.publish(self.inbox, b"properties", TEST_PROPERTIES)
            return properties_result(await reader.receive(), f"{self.name}: ", fix)

    async def check_chunk(self) -> CheckResult:
        """Publish a chunk as large as the sender's own broker allows: the sender knows no other limit."""
        async with self.clients() as (sender, reader):
            first, _ = await self._publish_until_received(sender, reader, RECONNECT_TIMEOUT_S)
            if first is None:
                message = f"{self.name}: messages are no longer forwarded, as after a chunk that a broker refused"
                return fail("chunk", message, f"{FIX_PACKET_SIZE}; at both brokers")
            chunk_bytes = max(1, min(CHUNK_BYTES, sender.limits.max_packet_bytes - HEADER_RESERVE_BYTES))
            await sender.publish(self.inbox, bytes(chunk_bytes), TEST_PROPERTIES)
            chunk = f"{self.name}: a chunk of {format_bytes(chunk_bytes)}, the size that senders use there,"
            while (received := await reader.receive()) is not None and len(received.payload) != chunk_bytes:
                pass  # a message that was published again just before the first arrived
            if received is None:
                return fail("chunk", f"{chunk} is lost", f"{FIX_PACKET_SIZE}; at both brokers")
            return ok("chunk", f"{chunk} arrives")

    async def check_presence(self) -> list[CheckResult]:
        """Publish a worker's record at the start; look for it at the end, before and after its client is killed."""
        site = self.start.site
        topic = StageTopics(site, DOCTOR_LEVEL, self.stage).presence(_WORKER)
        rule = f"topic sparse/{site}/+/+/up/+ in 1"
        self.end.clear_on_exit(topic)  # the copy there may have lost its expiry
        async with self.start.client(will=Will(topic)) as worker:
            await self.start.publish_record(worker, topic)
            if not await self._is_record_received(topic):
                message = f"{self.name}: a worker's record does not arrive: it would get no tasks"
                return [fail("presence", message, f"Mosquitto: {rule} (out, if {site} runs the bridge)")]
            presence = ok("presence", f"{self.name}: a later subscriber gets a worker's retained record")
            async with self.end.client() as reader:
                await reader.subscribe(topic, 1)
                await reader.receive()
                begin_s = time.monotonic()
                worker.abort("aborted")
                will = await reader.receive()
                after_ms = 1000 * (time.monotonic() - begin_s)
        if will is not None and not will.payload and await is_topic_cleared(self.end, topic):
            message = f"{self.name}: the record of a dead worker is cleared after {after_ms:.0f} ms"
            return [presence, ok("last will", message)]
        message = f"{self.name}: the record of a dead worker stays: it would still get tasks"
        return [presence, fail("last will", message, f"Mosquitto: {rule}, and retain_available true at both brokers")]

    async def _is_record_received(self, topic: str) -> bool:
        """Whether a later subscriber at the end gets the retained record."""
        end_s = time.monotonic() + BRIDGE_TIMEOUT_S / 2
        while time.monotonic() < end_s:
            async with self.end.client() as reader:
                await reader.subscribe(topic, 1)
                message = await reader.receive(_REPEAT_S)
                if message is not None and message.header.retain:
                    return True
        return False


def bridge_directions(near: BrokerProbe, far: BrokerProbe) -> tuple[BridgeDirection, BridgeDirection]:
    stage = near.name
    return BridgeDirection(near, far, stage), BridgeDirection(far, near, stage)


async def check_bridge(near: BrokerProbe, far: BrokerProbe) -> AsyncIterator[CheckResult]:
    """Yield the results of both directions; only forwarding if it fails or the bridges make a loop."""
    directions = bridge_directions(near, far)
    forwarding = [result for each in directions for result in await run_check("bridge", each.check_forwarding)]
    for result in forwarding:
        yield result
    if not is_usable(forwarding):
        return
    for name, check, timeout_s in (
        ("properties", BridgeDirection.check_properties, CHECK_TIMEOUT_S),
        ("presence", BridgeDirection.check_presence, CHECK_TIMEOUT_S),
        # The last, since a broker that refuses a chunk disconnects the bridge.
        ("chunk", BridgeDirection.check_chunk, CHECK_TIMEOUT_S + RECONNECT_TIMEOUT_S),
    ):
        for direction in directions:
            for result in await run_check(name, partial(check, direction), timeout_s):
                yield result
