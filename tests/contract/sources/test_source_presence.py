"""The record of a source on every transport: there while it lives, true each second, gone with it, never in its way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import SourceLoad, SourceRecord
from brokers.errors import TooLarge
from brokers.mqtt.in_memory import MemoryBroker, MemoryTransport
from brokers.protocol.topics import all_presence_filter, source_presence_topic
from brokers.protocol.transport import Buffer, Properties
from sources.client.source_presence import RecentResultStats, SourcePresence
from tests.support.brokers.broker_kinds import BrokerUnderTest, DeliveryQueue, InMemoryBrokerUnderTest, run_async

PIPELINE = Pipeline.model_validate({"pipeline": {"name": "street"}, "stage": [{"name": "head", "executor": "a:b"}]})
TOPIC = source_presence_topic("local", "street", "cam")


class Figures:
    """What a source would say of itself."""

    def __init__(self) -> None:
        self.results = 0

    def __call__(self) -> SourceLoad:
        self.results += 1
        return SourceLoad(results=self.results, retries={"WorkerLost": 1})


def test_a_source_tells_of_itself_again_and_again_and_clears_its_record_when_it_leaves(place: BrokerUnderTest) -> None:
    async def test() -> None:
        watch, inbox = MessageChannel(place.transport()), DeliveryQueue()
        await watch.open()
        await watch.transport.subscribe(all_presence_filter(), inbox, qos=1)
        line = MessageChannel(place.transport())
        standing = SourcePresence(line, PIPELINE, "cam", Figures())
        await line.open(will=standing.will)
        standing.start()
        told = [await inbox.next() for _ in range(3)]
        await standing.stop()
        await standing.stop()
        rest = [await inbox.next()]
        while rest[-1].payload.nbytes:
            rest.append(await inbox.next())
        await line.close()
        await inbox.assert_empty()  # of its last will
        await watch.close()
        assert {delivery.topic for delivery in (*told, *rest)} == {TOPIC}
        records = [SourceRecord.from_bytes(bytes(delivery.payload)) for delivery in (*told, *rest[:-1])]
        assert [record.load.results for record in records] == list(range(1, len(records) + 1))
        assert {record.state for record in records[:-1]} == {"up"}
        assert records[-1].state == "stopped"
        ages = [record.up_s or 0.0 for record in records]
        assert ages == sorted(ages)
        assert ages[2] >= 1.5
        assert {(record.source, record.pipeline, record.site, record.instance) for record in records} == {
            ("cam", "street", "local", records[0].instance)
        }

    run_async(test())


def test_the_record_of_a_source_that_is_killed_is_cleared_by_its_will(place: BrokerUnderTest) -> None:
    async def test() -> None:
        watch, inbox = MessageChannel(place.transport()), DeliveryQueue()
        await watch.open()
        await watch.transport.subscribe(all_presence_filter(), inbox, qos=1)
        standing = SourcePresence(MessageChannel(place.transport()), PIPELINE, "cam", Figures())
        await place.kill_client_with_will(standing.will)
        delivery = await inbox.next()
        assert (delivery.topic, delivery.payload.nbytes, standing.will.retain) == (TOPIC, 0, True)
        await watch.close()

    run_async(test())


def test_a_source_tells_of_itself_at_once_when_the_broker_is_back() -> None:
    async def test() -> None:
        place = InMemoryBrokerUnderTest()
        line, watch, inbox = MessageChannel(place.transport()), MessageChannel(place.transport()), DeliveryQueue()
        standing = SourcePresence(line, PIPELINE, "cam", Figures())
        await line.open(will=standing.will)
        await watch.open()
        standing.start()
        place.stop()
        place.start()
        await watch.transport.subscribe(TOPIC, inbox)
        assert (await inbox.next()).payload.nbytes
        await standing.stop()
        await line.close()
        await watch.close()

    run_async(test())


class Refusing(MemoryTransport):
    """A broker that takes no record, however often it is offered one."""

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


def test_a_broker_that_refuses_the_record_does_not_stop_the_source(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        transport = Refusing()
        line = MessageChannel(transport)
        standing = SourcePresence(line, PIPELINE, "cam", Figures())
        await line.open(will=standing.will)
        standing.start()
        for _ in range(2):
            await transport.refused.acquire()
        await standing.stop()
        await line.close()

    run_async(test())
    assert [record.levelname for record in caplog.records if "could not report" in record.message] == ["WARNING"]


def test_figures_that_cannot_be_had_do_not_stop_the_source(caplog: pytest.LogCaptureFixture) -> None:
    asked = asyncio.Event()

    def broken() -> SourceLoad:
        asked.set()
        raise ZeroDivisionError("no results yet")

    async def test() -> None:
        line = MessageChannel(MemoryTransport(MemoryBroker()))
        standing = SourcePresence(line, PIPELINE, "cam", broken)
        await line.open(will=standing.will)
        standing.start()
        await asked.wait()
        await asyncio.sleep(0)
        await standing.stop()
        await line.close()

    run_async(test())
    assert "no results yet" in caplog.text


def test_a_source_that_ends_while_the_broker_is_away_is_not_held_up_for_long() -> None:
    async def test() -> None:
        place = InMemoryBrokerUnderTest()
        line = MessageChannel(place.transport())
        standing = SourcePresence(line, PIPELINE, "cam", Figures())
        await line.open(will=standing.will)
        standing.start()
        place.stop()
        await standing.stop()
        await line.close()

    run_async(test(), timeout_s=30)


def test_whatever_a_source_is_called_its_record_has_one_level_of_a_topic() -> None:
    will = SourcePresence(
        MessageChannel(MemoryTransport(MemoryBroker())), PIPELINE, "my cam/" + "n" * 70 + "-1a2b", Figures()
    ).will
    assert will.topic == source_presence_topic("local", "street", "n" * 59 + "-1a2b")


def test_pace_is_of_the_newest_results() -> None:
    pace = RecentResultStats()
    assert (pace.results_per_s(0.0), pace.latency_ms().p99) == (0.0, 0.0)
    for index in range(1, 2001):
        pace.record_result(float(index % 100), index / 10)  # ten a second
    assert pace.results_per_s(200.0) == pytest.approx(10.0, rel=0.05)
    assert pace.results_per_s(300.0) == 0.0
    assert pace.latency_ms().p50 == pytest.approx(50, abs=2)
    assert pace.latency_ms().p99 == pytest.approx(98, abs=1)


def test_pace_of_more_results_than_are_remembered_is_of_those() -> None:
    pace = RecentResultStats()
    for index in range(5000):
        pace.record_result(1.0, index / 1000)  # a thousand a second
    assert pace.results_per_s(5.0) == pytest.approx(1000, rel=0.05)
