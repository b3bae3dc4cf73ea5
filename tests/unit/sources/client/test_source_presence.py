"""The presence of a source over the in-memory broker: faults never stop the source."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import SourceLoad
from brokers.errors import TooLarge
from brokers.protocol.topics import source_presence_topic
from brokers.protocol.transport import Buffer, Properties, Transport
from sources.client.source_presence import SourcePresence
from tests.support.brokers.broker_kinds import DeliveryQueue, InMemoryBrokerUnderTest, run_async
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport

PIPELINE = Pipeline.model_validate({"pipeline": {"name": "street"}, "stage": [{"name": "head", "executor": "a:b"}]})
TOPIC = source_presence_topic("local", "street", "cam")


async def start_presence(
    transport: Transport, load: Callable[[], SourceLoad] = SourceLoad
) -> tuple[MessageChannel, SourcePresence]:
    channel = MessageChannel(transport)
    presence = SourcePresence(channel, PIPELINE, "cam", load)
    await channel.open(will=presence.will)
    await presence.start()
    return channel, presence


def test_record_is_published_at_once_after_a_reconnection() -> None:
    async def test() -> None:
        broker, deliveries = InMemoryBrokerUnderTest(), DeliveryQueue()
        channel, presence = await start_presence(broker.transport())
        watcher = MessageChannel(broker.transport())
        await watcher.open()
        broker.stop()
        broker.start()
        await watcher.transport.subscribe(TOPIC, deliveries)
        assert (await deliveries.next()).payload.nbytes
        await presence.stop()
        await channel.close()
        await watcher.close()

    run_async(test())


class RefusingTransport(MemoryTransport):
    """Refuses every publication."""

    def __init__(self) -> None:
        super().__init__(MemoryBroker())
        self.refused = asyncio.Semaphore(0)

    async def publish(
        self,
        topic: str,
        payload: Sequence[Buffer] | Buffer = b"",
        properties: Properties = Properties(),
        *,
        qos: int = 0,
        retain: bool = False,
    ) -> None:
        self.refused.release()
        raise TooLarge("the record", 1, 2)


def test_refused_records_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        transport = RefusingTransport()
        channel, presence = await start_presence(transport)
        for _ in range(3):
            await transport.refused.acquire()
            presence.report_soon()
        await presence.stop()
        await channel.close()

    run_async(test())
    assert [record.levelname for record in caplog.records if "cannot publish" in record.message] == ["WARNING"]


def test_failing_load_does_not_stop_the_source(caplog: pytest.LogCaptureFixture) -> None:
    called = asyncio.Event()

    def load() -> SourceLoad:
        called.set()
        raise ZeroDivisionError("no results yet")

    async def test() -> None:
        channel, presence = await start_presence(MemoryTransport(MemoryBroker()), load)
        await called.wait()
        await asyncio.sleep(0)
        await presence.stop()
        await channel.close()

    run_async(test())
    assert "no results yet" in caplog.text


def test_stop_without_a_broker_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sources.client.source_presence._REMOVE_TIMEOUT_S", 0.05)

    async def test() -> None:
        broker = InMemoryBrokerUnderTest()
        channel, presence = await start_presence(broker.transport())
        broker.stop()
        await presence.stop()
        await channel.close()

    run_async(test())


def test_any_source_name_becomes_one_topic_level() -> None:
    channel = MessageChannel(MemoryTransport(MemoryBroker()))
    will = SourcePresence(channel, PIPELINE, "my cam/" + "n" * 70 + "-1a2b", SourceLoad).will
    assert will.topic == source_presence_topic("local", "street", "n" * 59 + "-1a2b")
