"""The record of a source on every transport: there while it lives, true each second, gone with it, never in its way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import Line
from brokers.dispatch.presence import SourceBirth, SourceLoad
from brokers.errors import TooLarge
from brokers.mqtt.in_memory import MemoryHub, MemoryTransport
from brokers.protocol.topics import every_presence, source_presence
from brokers.protocol.transport import Buffer, Properties
from sources.client.source_presence import Pace, Standing
from tests.support.brokers.broker_kinds import Inbox, MemoryPlace, Place, run

PIPELINE = Pipeline.model_validate({"pipeline": {"name": "street"}, "stage": [{"name": "head", "executor": "a:b"}]})
TOPIC = source_presence("local", "street", "cam")


class Figures:
    """What a source would say of itself."""

    def __init__(self) -> None:
        self.results = 0

    def __call__(self) -> SourceLoad:
        self.results += 1
        return SourceLoad(results=self.results, retries={"WorkerLost": 1})


def test_a_source_tells_of_itself_again_and_again_and_clears_its_record_when_it_leaves(place: Place) -> None:
    async def test() -> None:
        watch, inbox = Line(place.transport()), Inbox()
        await watch.open()
        await watch.transport.subscribe(every_presence(), inbox, qos=1)
        line = Line(place.transport())
        standing = Standing(line, PIPELINE, "cam", Figures())
        await line.open(will=standing.will)
        standing.open()
        told = [await inbox.next() for _ in range(3)]
        await standing.close()
        await standing.close()
        rest = [await inbox.next()]
        while rest[-1].payload.nbytes:
            rest.append(await inbox.next())
        await line.close()
        await inbox.nothing()  # of its last will
        await watch.close()
        assert {delivery.topic for delivery in (*told, *rest)} == {TOPIC}
        records = [SourceBirth.from_bytes(bytes(delivery.payload)) for delivery in (*told, *rest[:-1])]
        assert [record.load.results for record in records] == list(range(1, len(records) + 1))
        assert {record.state for record in records[:-1]} == {"up"}
        assert records[-1].state == "stopped"
        ages = [record.up_s or 0.0 for record in records]
        assert ages == sorted(ages)
        assert ages[2] >= 1.5
        assert {(record.source, record.pipeline, record.site, record.instance) for record in records} == {
            ("cam", "street", "local", records[0].instance)
        }

    run(test())


def test_the_record_of_a_source_that_is_killed_is_cleared_by_its_will(place: Place) -> None:
    async def test() -> None:
        watch, inbox = Line(place.transport()), Inbox()
        await watch.open()
        await watch.transport.subscribe(every_presence(), inbox, qos=1)
        standing = Standing(Line(place.transport()), PIPELINE, "cam", Figures())
        await place.die(standing.will)
        delivery = await inbox.next()
        assert (delivery.topic, delivery.payload.nbytes, standing.will.retain) == (TOPIC, 0, True)
        await watch.close()

    run(test())


def test_a_source_tells_of_itself_at_once_when_the_broker_is_back() -> None:
    async def test() -> None:
        place = MemoryPlace()
        line, watch, inbox = Line(place.transport()), Line(place.transport()), Inbox()
        standing = Standing(line, PIPELINE, "cam", Figures())
        await line.open(will=standing.will)
        await watch.open()
        standing.open()
        place.stop()
        place.start()
        await watch.transport.subscribe(TOPIC, inbox)
        assert (await inbox.next()).payload.nbytes
        await standing.close()
        await line.close()
        await watch.close()

    run(test())


class Refusing(MemoryTransport):
    """A broker that takes no record, however often it is offered one."""

    def __init__(self) -> None:
        super().__init__(MemoryHub())
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
        line = Line(transport)
        standing = Standing(line, PIPELINE, "cam", Figures())
        await line.open(will=standing.will)
        standing.open()
        for _ in range(2):
            await transport.refused.acquire()
        await standing.close()
        await line.close()

    run(test())
    assert [record.levelname for record in caplog.records if "could not report" in record.message] == ["WARNING"]


def test_figures_that_cannot_be_had_do_not_stop_the_source(caplog: pytest.LogCaptureFixture) -> None:
    asked = asyncio.Event()

    def broken() -> SourceLoad:
        asked.set()
        raise ZeroDivisionError("no results yet")

    async def test() -> None:
        line = Line(MemoryTransport(MemoryHub()))
        standing = Standing(line, PIPELINE, "cam", broken)
        await line.open(will=standing.will)
        standing.open()
        await asked.wait()
        await asyncio.sleep(0)
        await standing.close()
        await line.close()

    run(test())
    assert "no results yet" in caplog.text


def test_a_source_that_ends_while_the_broker_is_away_is_not_held_up_for_long() -> None:
    async def test() -> None:
        place = MemoryPlace()
        line = Line(place.transport())
        standing = Standing(line, PIPELINE, "cam", Figures())
        await line.open(will=standing.will)
        standing.open()
        place.stop()
        await standing.close()
        await line.close()

    run(test(), limit_s=30)


def test_whatever_a_source_is_called_its_record_has_one_level_of_a_topic() -> None:
    will = Standing(Line(MemoryTransport(MemoryHub())), PIPELINE, "my cam/" + "n" * 70 + "-1a2b", Figures()).will
    assert will.topic == source_presence("local", "street", "n" * 59 + "-1a2b")


def test_pace_is_of_the_newest_results() -> None:
    pace = Pace()
    assert (pace.rate(0.0), pace.latency_ms().p99) == (0.0, 0.0)
    for index in range(1, 2001):
        pace.answered(float(index % 100), index / 10)  # ten a second
    assert pace.rate(200.0) == pytest.approx(10.0, rel=0.05)
    assert pace.rate(300.0) == 0.0
    assert pace.latency_ms().p50 == pytest.approx(50, abs=2)
    assert pace.latency_ms().p99 == pytest.approx(98, abs=1)


def test_pace_of_more_results_than_are_remembered_is_of_those() -> None:
    pace = Pace()
    for index in range(5000):
        pace.answered(1.0, index / 1000)  # a thousand a second
    assert pace.rate(5.0) == pytest.approx(1000, rel=0.05)
