"""What is tried at two brokers that a bridge joins, on topics of the real grammar: only those does a bridge carry."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from brokers.dispatch.channel import HEAD_ROOM_BYTES
from brokers.doctor import verdicts as doctor
from brokers.doctor.check_result import Finding, usable
from brokers.doctor.checks import PROPERTIES, nothing_retained, tried
from brokers.doctor.probe_client import Heard, Visit, Visitor
from brokers.doctor.throughput import Way
from brokers.protocol.chunking import CHUNK_BYTES
from brokers.protocol.topics import DOCTOR, StageTopics
from brokers.protocol.transport import Will

REACH_S = 10.0  # a bridge that was started with its broker needs some seconds
_AGAIN_S = 0.5  # at QoS 0, what came while the bridge did not stand is lost
_COPIES_S = 1.0  # for what should not come
_WORKER = "probe"


@dataclass(frozen=True, slots=True)
class End:
    """One end of a bridge: a site, and the visit to its broker."""

    site: str
    visit: Visit


@dataclass(eq=False)
class Direction:
    """From one end to the other: who sends is at `start`, who reads is at `end`."""

    start: End
    end: End
    stage: str  # another one in each examination
    _number: int = field(default=0)

    @property
    def name(self) -> str:
        return f"{self.start.site} to {self.end.site}"

    @property
    def topics(self) -> StageTopics:
        return StageTopics(self.end.site, DOCTOR, self.stage)

    @asynccontextmanager
    async def ends(self, topic: str, qos: int = 0) -> AsyncIterator[tuple[Visitor, Visitor]]:
        """A client at each end; the one at the far end reads the topic."""
        async with self.start.visit.visitor() as sender, self.end.visit.visitor() as reader:
            await reader.subscribe(topic, qos)
            yield sender, reader

    async def reach(self) -> list[Finding]:
        """Send until something arrives, and then count copies at both ends."""
        topic = self.topics.inbox(_WORKER)
        async with self.ends(topic) as (sender, reader), self.start.visit.visitor() as witness:
            await witness.subscribe(topic)
            first, after_s = await self._first(sender, reader, topic)
            mend = doctor.bridge_rules(self.start.site, self.end.site)
            if first is None:
                return [doctor.bridged(self.name, None, mend)]
            there, here = await asyncio.gather(*(each.hear_all(100, _COPIES_S) for each in (reader, witness)))
            most = max(*_copies([first, *there]).values(), *_copies(here).values())
            return [doctor.bridged(self.name, after_s, mend), doctor.once(self.name, most)]

    async def _first(self, sender: Visitor, reader: Visitor, topic: str) -> tuple[Heard | None, float]:
        end_s = time.monotonic() + REACH_S
        while time.monotonic() < end_s:
            self._number += 1
            began_s = time.monotonic()
            await sender.publish(topic, self._number.to_bytes(4, "big"), PROPERTIES)
            heard = await reader.hear(_AGAIN_S)
            if heard is not None:
                return heard, time.monotonic() - began_s
        return None, 0.0

    async def properties(self) -> list[Finding]:
        topic = self.topics.inbox(_WORKER)
        async with self.ends(topic) as (sender, reader):
            await sender.publish(topic, b"properties", PROPERTIES)
            heard = await reader.hear()
            lost = ["the message"] if heard is None else doctor.differences(PROPERTIES, heard.properties)
            return [doctor.properties_across(self.name, lost)]

    async def chunk(self) -> list[Finding]:
        """A sender knows the limit of its own broker only."""
        topic = self.topics.inbox(_WORKER)
        async with self.ends(topic) as (sender, reader):
            chunk_bytes = max(1, min(CHUNK_BYTES, sender.limits.max_packet_bytes - HEAD_ROOM_BYTES))
            await sender.publish(topic, bytes(chunk_bytes), PROPERTIES)
            return [doctor.chunk_across(self.name, chunk_bytes, await reader.hear() is not None)]

    async def presence(self) -> list[Finding]:
        """A worker at the start has a record; it is looked for at the end, before and after the worker's death."""
        topic = StageTopics(self.start.site, DOCTOR, self.stage).presence(_WORKER)
        self.end.visit.clears(topic)  # the bridge's copy, which may have lost its expiry on the way
        async with self.start.visit.visitor(will=Will(topic)) as worker:
            await self.start.visit.retain(worker, topic, b"record")
            came = await self._comes(topic)
            birth = doctor.births(self.name, came, self.start.site)
            if not came:
                return [birth]
            async with self.end.visit.visitor() as watcher:
                await watcher.subscribe(topic, 1)
                await watcher.hear()
                began_s = time.monotonic()
                await worker.vanish()
                heard = await watcher.hear()
        cleared = heard is not None and not heard.payload
        after_s = time.monotonic() - began_s if cleared else None
        gone = await nothing_retained(self.end.visit, topic)
        return [birth, doctor.will_across(self.name, after_s, gone, self.start.site)]

    async def _comes(self, topic: str) -> bool:
        """Whether one who subscribes late finds a retained record."""
        end_s = time.monotonic() + REACH_S / 2
        while time.monotonic() < end_s:
            async with self.end.visit.visitor() as late:
                await late.subscribe(topic, 1)
                heard = await late.hear(_AGAIN_S)
                if heard is not None and heard.retain:
                    return True
        return False


def _copies(heard: list[Heard]) -> Counter[bytes]:
    return Counter([bytes(each.payload) for each in heard]) or Counter({b"": 0})


async def examine_across(near: End, far: End) -> AsyncIterator[Finding]:
    """Yield what crosses between two sites, both ways; the rest is in vain where nothing does, or all without end."""
    stage = near.visit.name
    ways = Direction(near, far, stage), Direction(far, near, stage)
    sound = True
    for way in ways:
        reached = await tried("bridge", way.reach)
        sound = sound and usable(reached)
        for finding in reached:
            yield finding
    for way in ways if sound else ():
        for what, probe in (("properties", way.properties), ("chunk", way.chunk), ("presence", way.presence)):
            for finding in await tried(what, probe):
                yield finding


@asynccontextmanager
async def ways_between(near: End, far: End) -> AsyncIterator[tuple[Way, Way]]:
    """The two ways of a round trip across: to a worker's inbox there, to another's here."""
    stage = near.visit.name
    there, back = Direction(near, far, stage), Direction(far, near, stage)
    async with AsyncExitStack() as stack:
        found = []
        for way in (there, back):
            topic = way.topics.inbox(_WORKER)
            found.append(Way(*await stack.enter_async_context(way.ends(topic)), topic))
        yield found[0], found[1]
