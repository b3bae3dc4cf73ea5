"""The presence record of a source, on every broker: renewed, cleared on stop, cleared by the last will."""

from __future__ import annotations

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import SourceLoad, SourceRecord
from brokers.protocol.topics import all_presence_filter, source_presence_topic
from sources.client.source_presence import SourcePresence
from tests.support.brokers.broker_kinds import BrokerUnderTest, DeliveryQueue, run_async

PIPELINE = Pipeline.model_validate({"pipeline": {"name": "street"}, "stage": [{"name": "head", "executor": "a:b"}]})
TOPIC = source_presence_topic("local", "street", "cam")


class CountingLoad:
    """Returns a load with one result more at each call."""

    def __init__(self) -> None:
        self.results = 0

    def __call__(self) -> SourceLoad:
        self.results += 1
        return SourceLoad(results=self.results, retries={"WorkerLost": 1})


async def watch_presence(broker: BrokerUnderTest) -> tuple[MessageChannel, DeliveryQueue]:
    channel, deliveries = MessageChannel(broker.transport()), DeliveryQueue()
    await channel.open()
    await channel.transport.subscribe(all_presence_filter(), deliveries, qos=1)
    return channel, deliveries


def test_record_is_renewed_and_cleared_on_stop(broker: BrokerUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokers.dispatch.presence_publisher.REPORT_INTERVAL_S", 0.05)

    async def test() -> None:
        watcher, deliveries = await watch_presence(broker)
        channel = MessageChannel(broker.transport())
        presence = SourcePresence(channel, PIPELINE, "cam", CountingLoad())
        await channel.open(will=presence.will)
        await presence.start()
        renewed = [await deliveries.next() for _ in range(3)]
        await presence.stop()
        await presence.stop()
        final = [await deliveries.next()]
        while final[-1].payload.nbytes:
            final.append(await deliveries.next())
        await channel.close()
        await deliveries.assert_empty()  # no last will
        await watcher.close()
        assert {delivery.topic for delivery in (*renewed, *final)} == {TOPIC}
        records = [SourceRecord.from_bytes(bytes(delivery.payload)) for delivery in (*renewed, *final[:-1])]
        assert [record.load.results for record in records] == list(range(1, len(records) + 1))
        assert {record.state for record in records[:-1]} == {"up"}
        assert records[-1].state == "stopped"
        ages_s = [record.up_s or 0.0 for record in records]
        assert ages_s == sorted(ages_s)
        assert {(record.source, record.pipeline, record.site, record.instance) for record in records} == {
            ("cam", "street", "local", records[0].instance)
        }

    run_async(test())


def test_last_will_clears_the_record_of_a_killed_source(broker: BrokerUnderTest) -> None:
    async def test() -> None:
        watcher, deliveries = await watch_presence(broker)
        will = SourcePresence(MessageChannel(broker.transport()), PIPELINE, "cam", CountingLoad()).will
        await broker.kill_client_with_will(will)
        delivery = await deliveries.next()
        assert (delivery.topic, delivery.payload.nbytes, will.retain) == (TOPIC, 0, True)
        await watcher.close()

    run_async(test())
