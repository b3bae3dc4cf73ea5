"""The checks across a bridge between two brokers, on topics of the real topic grammar: a bridge forwards only those."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor import verdicts
from brokers.doctor.check_result import CheckResult, is_usable
from brokers.doctor.checks import TEST_PROPERTIES, is_topic_cleared, run_check
from brokers.doctor.probe_client import BrokerProbe, ProbeClient, ReceivedPublish
from brokers.doctor.throughput import MessagePath
from brokers.protocol.chunking import CHUNK_BYTES
from brokers.protocol.topics import DOCTOR_LEVEL, StageTopics
from brokers.protocol.transport import Will

BRIDGE_TIMEOUT_S = 10.0  # a bridge that was started with its broker needs some seconds to connect
_REPEAT_S = 0.5  # messages of QoS 0 are lost until the bridge is connected
_COPIES_WAIT_S = 1.0  # for duplicates to arrive
_WORKER = "probe"


@dataclass(frozen=True, slots=True)
class BridgeEnd:
    """One end of a bridge: a site and its broker."""

    site: str
    probe: BrokerProbe


@dataclass(eq=False)
class BridgeDirection:
    """One direction of a bridge: senders are at `start`, readers at `end`; `stage` is unique to this run."""

    start: BridgeEnd
    end: BridgeEnd
    stage: str
    _sent: int = 0

    @property
    def name(self) -> str:
        return f"{self.start.site} to {self.end.site}"

    @property
    def inbox(self) -> str:
        """The inbox topic of a worker at the end."""
        return StageTopics(self.end.site, DOCTOR_LEVEL, self.stage).inbox(_WORKER)

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[tuple[ProbeClient, ProbeClient]]:
        """A sender at the start, and a reader of the inbox at the end."""
        async with self.start.probe.client() as sender, self.end.probe.client() as reader:
            await reader.subscribe(self.inbox)
            yield sender, reader

    async def check_forwarding(self) -> list[CheckResult]:
        """Publish until a message arrives, and then count the copies of each at both ends."""
        async with self.clients() as (sender, reader), self.start.probe.client() as local_reader:
            await local_reader.subscribe(self.inbox)
            first, after_s = await self._send_until_received(sender, reader)
            fix = verdicts.bridge_topics_fix(self.start.site, self.end.site)
            if first is None:
                return [verdicts.bridge_result(self.name, None, fix)]
            remote, local = await asyncio.gather(
                *(each.receive_all(100, _COPIES_WAIT_S) for each in (reader, local_reader))
            )
            copies = max(_most_copies([first, *remote]), _most_copies(local))
            return [
                verdicts.bridge_result(self.name, after_s, fix),
                verdicts.duplicates_result(self.name, copies),
            ]

    async def _send_until_received(
        self, sender: ProbeClient, reader: ProbeClient
    ) -> tuple[ReceivedPublish | None, float]:
        end_s = time.monotonic() + BRIDGE_TIMEOUT_S
        while time.monotonic() < end_s:
            self._sent += 1
            begin_s = time.monotonic()
            await sender.publish(self.inbox, self._sent.to_bytes(4, "big"), TEST_PROPERTIES)
            message = await reader.receive(_REPEAT_S)
            if message is not None:
                return message, time.monotonic() - begin_s
        return None, 0.0

    async def check_properties(self) -> list[CheckResult]:
        """Publish with all properties that Sparse uses."""
        async with self.clients() as (sender, reader):
            await sender.publish(self.inbox, b"properties", TEST_PROPERTIES)
            message = await reader.receive()
            if message is None:
                return [verdicts.bridge_properties_result(self.name, ["the message"])]
            changed = verdicts.changed_properties(TEST_PROPERTIES, message.properties)
            return [verdicts.bridge_properties_result(self.name, changed)]

    async def check_chunk(self) -> list[CheckResult]:
        """Publish a chunk as large as the sender's own broker allows: the sender knows no other limit."""
        async with self.clients() as (sender, reader):
            chunk_bytes = max(1, min(CHUNK_BYTES, sender.limits.max_packet_bytes - HEADER_RESERVE_BYTES))
            await sender.publish(self.inbox, bytes(chunk_bytes), TEST_PROPERTIES)
            return [verdicts.bridge_chunk_result(self.name, chunk_bytes, await reader.receive() is not None)]

    async def check_presence(self) -> list[CheckResult]:
        """Publish the record of a worker at the start; look for it at the end, before and after the worker's death."""
        topic = StageTopics(self.start.site, DOCTOR_LEVEL, self.stage).presence(_WORKER)
        self.end.probe.clear_on_exit(topic)  # the copy there may have lost its expiry
        async with self.start.probe.client(will=Will(topic)) as worker:
            await self.start.probe.publish_retained(worker, topic, b"record")
            received = await self._is_record_received(topic)
            presence = verdicts.bridge_presence_result(self.name, received, self.start.site)
            if not received:
                return [presence]
            async with self.end.probe.client() as reader:
                await reader.subscribe(topic, 1)
                await reader.receive()
                begin_s = time.monotonic()
                await worker.abort()
                message = await reader.receive()
        is_cleared = message is not None and not message.payload
        after_s = time.monotonic() - begin_s if is_cleared else None
        gone = await is_topic_cleared(self.end.probe, topic)
        return [presence, verdicts.bridge_will_result(self.name, after_s, gone, self.start.site)]

    async def _is_record_received(self, topic: str) -> bool:
        """Whether a later subscriber at the end gets the retained record."""
        end_s = time.monotonic() + BRIDGE_TIMEOUT_S / 2
        while time.monotonic() < end_s:
            async with self.end.probe.client() as reader:
                await reader.subscribe(topic, 1)
                message = await reader.receive(_REPEAT_S)
                if message is not None and message.retain:
                    return True
        return False


def _most_copies(messages: list[ReceivedPublish]) -> int:
    return max(Counter(bytes(message.payload) for message in messages).values(), default=0)


def _directions(near: BridgeEnd, far: BridgeEnd) -> tuple[BridgeDirection, BridgeDirection]:
    stage = near.probe.name
    return BridgeDirection(near, far, stage), BridgeDirection(far, near, stage)


async def check_bridge(near: BridgeEnd, far: BridgeEnd) -> AsyncIterator[CheckResult]:
    """Yield the results of both directions; only forwarding if it fails or the bridges make a loop."""
    directions = _directions(near, far)
    forwards = True
    for direction in directions:
        results = await run_check("bridge", direction.check_forwarding)
        forwards = forwards and is_usable(results)
        for result in results:
            yield result
    for direction in directions if forwards else ():
        for name, check in (
            ("properties", direction.check_properties),
            ("chunk", direction.check_chunk),
            ("presence", direction.check_presence),
        ):
            for result in await run_check(name, check):
                yield result


@asynccontextmanager
async def bridge_paths(near: BridgeEnd, far: BridgeEnd) -> AsyncIterator[tuple[MessagePath, MessagePath]]:
    """The two paths of a round trip across the bridge."""
    async with AsyncExitStack() as stack:
        outbound, inbound = [
            MessagePath(*await stack.enter_async_context(direction.clients()), direction.inbox)
            for direction in _directions(near, far)
        ]
        yield outbound, inbound
