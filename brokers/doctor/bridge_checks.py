"""What is tried at two brokers that a bridge joins, on topics of the real grammar: only those does a bridge carry."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor import verdicts as doctor
from brokers.doctor.check_result import CheckResult, is_usable
from brokers.doctor.checks import TEST_PROPERTIES, is_topic_cleared, run_check
from brokers.doctor.probe_client import BrokerProbe, ProbeClient, ReceivedPublish
from brokers.doctor.throughput import MessagePath
from brokers.protocol.chunking import CHUNK_BYTES
from brokers.protocol.topics import DOCTOR_LEVEL, StageTopics
from brokers.protocol.transport import Will

BRIDGE_TIMEOUT_S = 10.0  # a bridge that was started with its broker needs some seconds
_AGAIN_S = 0.5  # at QoS 0, what came while the bridge did not stand is lost
_COPIES_S = 1.0  # for what should not come
_WORKER = "probe"


@dataclass(frozen=True, slots=True)
class BridgeEnd:
    """One end of a bridge: a site, and the visit to its broker."""

    site: str
    probe: BrokerProbe


@dataclass(eq=False)
class BridgeDirection:
    """From one end to the other: who sends is at `start`, who reads is at `end`."""

    start: BridgeEnd
    end: BridgeEnd
    stage: str  # another one in each examination
    _number: int = field(default=0)

    @property
    def name(self) -> str:
        return f"{self.start.site} to {self.end.site}"

    @property
    def topics(self) -> StageTopics:
        return StageTopics(self.end.site, DOCTOR_LEVEL, self.stage)

    @asynccontextmanager
    async def clients(self, topic: str, qos: int = 0) -> AsyncIterator[tuple[ProbeClient, ProbeClient]]:
        """A client at each end; the one at the far end reads the topic."""
        async with self.start.probe.client() as sender, self.end.probe.client() as reader:
            await reader.subscribe(topic, qos)
            yield sender, reader

    async def check_forwarding(self) -> list[CheckResult]:
        """Send until something arrives, and then count copies at both ends."""
        topic = self.topics.inbox(_WORKER)
        async with self.clients(topic) as (sender, reader), self.start.probe.client() as witness:
            await witness.subscribe(topic)
            first, after_s = await self._first(sender, reader, topic)
            mend = doctor.bridge_topics_fix(self.start.site, self.end.site)
            if first is None:
                return [doctor.bridge_result(self.name, None, mend)]
            there, here = await asyncio.gather(*(each.receive_all(100, _COPIES_S) for each in (reader, witness)))
            most = max(*_copies([first, *there]).values(), *_copies(here).values())
            return [doctor.bridge_result(self.name, after_s, mend), doctor.duplicates_result(self.name, most)]

    async def _first(
        self, sender: ProbeClient, reader: ProbeClient, topic: str
    ) -> tuple[ReceivedPublish | None, float]:
        end_s = time.monotonic() + BRIDGE_TIMEOUT_S
        while time.monotonic() < end_s:
            self._number += 1
            began_s = time.monotonic()
            await sender.publish(topic, self._number.to_bytes(4, "big"), TEST_PROPERTIES)
            heard = await reader.receive(_AGAIN_S)
            if heard is not None:
                return heard, time.monotonic() - began_s
        return None, 0.0

    async def check_properties(self) -> list[CheckResult]:
        topic = self.topics.inbox(_WORKER)
        async with self.clients(topic) as (sender, reader):
            await sender.publish(topic, b"properties", TEST_PROPERTIES)
            heard = await reader.receive()
            lost = ["the message"] if heard is None else doctor.changed_properties(TEST_PROPERTIES, heard.properties)
            return [doctor.bridge_properties_result(self.name, lost)]

    async def check_chunk(self) -> list[CheckResult]:
        """A sender knows the limit of its own broker only."""
        topic = self.topics.inbox(_WORKER)
        async with self.clients(topic) as (sender, reader):
            chunk_bytes = max(1, min(CHUNK_BYTES, sender.limits.max_packet_bytes - HEADER_RESERVE_BYTES))
            await sender.publish(topic, bytes(chunk_bytes), TEST_PROPERTIES)
            return [doctor.bridge_chunk_result(self.name, chunk_bytes, await reader.receive() is not None)]

    async def check_presence(self) -> list[CheckResult]:
        """A worker at the start has a record; it is looked for at the end, before and after the worker's death."""
        topic = StageTopics(self.start.site, DOCTOR_LEVEL, self.stage).presence(_WORKER)
        self.end.probe.clear_on_exit(topic)  # the bridge's copy, which may have lost its expiry on the way
        async with self.start.probe.client(will=Will(topic)) as worker:
            await self.start.probe.publish_retained(worker, topic, b"record")
            came = await self._comes(topic)
            birth = doctor.bridge_presence_result(self.name, came, self.start.site)
            if not came:
                return [birth]
            async with self.end.probe.client() as watcher:
                await watcher.subscribe(topic, 1)
                await watcher.receive()
                began_s = time.monotonic()
                await worker.abort()
                heard = await watcher.receive()
        cleared = heard is not None and not heard.payload
        after_s = time.monotonic() - began_s if cleared else None
        gone = await is_topic_cleared(self.end.probe, topic)
        return [birth, doctor.bridge_will_result(self.name, after_s, gone, self.start.site)]

    async def _comes(self, topic: str) -> bool:
        """Whether one who subscribes late finds a retained record."""
        end_s = time.monotonic() + BRIDGE_TIMEOUT_S / 2
        while time.monotonic() < end_s:
            async with self.end.probe.client() as late:
                await late.subscribe(topic, 1)
                heard = await late.receive(_AGAIN_S)
                if heard is not None and heard.retain:
                    return True
        return False


def _copies(heard: list[ReceivedPublish]) -> Counter[bytes]:
    return Counter([bytes(each.payload) for each in heard]) or Counter({b"": 0})


async def check_bridge(near: BridgeEnd, far: BridgeEnd) -> AsyncIterator[CheckResult]:
    """Yield what crosses between two sites, both ways; the rest is in vain where nothing does, or all without end."""
    stage = near.probe.name
    ways = BridgeDirection(near, far, stage), BridgeDirection(far, near, stage)
    sound = True
    for way in ways:
        reached = await run_check("bridge", way.check_forwarding)
        sound = sound and is_usable(reached)
        for finding in reached:
            yield finding
    for way in ways if sound else ():
        for what, probe in (
            ("properties", way.check_properties),
            ("chunk", way.check_chunk),
            ("presence", way.check_presence),
        ):
            for finding in await run_check(what, probe):
                yield finding


@asynccontextmanager
async def bridge_paths(near: BridgeEnd, far: BridgeEnd) -> AsyncIterator[tuple[MessagePath, MessagePath]]:
    """The two ways of a round trip across: to a worker's inbox there, to another's here."""
    stage = near.probe.name
    there, back = BridgeDirection(near, far, stage), BridgeDirection(far, near, stage)
    async with AsyncExitStack() as stack:
        found = []
        for way in (there, back):
            topic = way.topics.inbox(_WORKER)
            found.append(MessagePath(*await stack.enter_async_context(way.clients(topic)), topic))
        yield found[0], found[1]
