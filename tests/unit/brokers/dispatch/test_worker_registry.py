"""The registry of presence records: its rules, and the listener that connects it to a transport."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.worker_registry import (
    ENTRY_LIMIT,
    FORGET_AFTER_S,
    PRESENCE_GAP_S,
    PRESENCE_TIMEOUT_S,
    PresenceEvent,
    PresenceListener,
    WorkerRegistry,
)
from brokers.errors import BadPayload
from brokers.protocol.topics import StageTopics, all_presence_filter
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport
from tests.support.brokers.presence_records import make_worker_record, source_publication

WORKER = make_worker_record()
TOPIC = WORKER.topic


def publish(
    registry: WorkerRegistry, record: WorkerRecord | bytes, now_s: float = 0.0, *, retained: bool = False
) -> list[str]:
    """Apply a message on the topic of WORKER; return the kinds of the events, with the reasons of losses."""
    payload = record if isinstance(record, bytes) else record.to_bytes()
    return describe(registry.on_message(TOPIC, payload, now_s, retained=retained))


def describe(events: list[PresenceEvent]) -> list[str]:
    return [f"{event.kind} {event.reason}" if event.reason else event.kind for event in events]


# Events -----------------------------------------------------------------------------------------------------------


def test_first_record_appears_and_later_ones_update() -> None:
    registry = WorkerRegistry()
    assert publish(registry, WORKER, 0.0) == ["appeared"]
    assert publish(registry, make_worker_record(capacity=9), 1.0) == ["updated"]
    assert registry.workers[TOPIC].record.capacity == 9
    assert registry.workers[TOPIC].last_seen_s == 1.0


def test_empty_payload_loses_a_known_worker_once() -> None:
    registry = WorkerRegistry()
    assert publish(registry, b"") == []
    publish(registry, WORKER)
    assert registry.on_message(TOPIC, b"", 1.0) == [PresenceEvent("lost", TOPIC, WORKER, reason="removed")]
    assert publish(registry, b"") == []
    assert registry.workers == {}


def test_silent_worker_is_lost_once_and_appears_again() -> None:
    registry = WorkerRegistry()
    publish(registry, WORKER, 0.0)
    assert registry.tick(PRESENCE_TIMEOUT_S) == []
    assert describe(registry.tick(PRESENCE_TIMEOUT_S + 0.1)) == ["lost silent"]
    assert registry.tick(PRESENCE_TIMEOUT_S + 1) == []
    assert registry.workers[TOPIC].is_lost
    assert publish(registry, WORKER, PRESENCE_TIMEOUT_S + 2) == ["appeared"]
    assert not registry.workers[TOPIC].is_lost


def test_silent_worker_that_is_removed_is_not_lost_twice() -> None:
    registry = WorkerRegistry()
    publish(registry, WORKER, 0.0)
    registry.tick(PRESENCE_TIMEOUT_S + 1)
    assert publish(registry, b"") == []


def test_silent_worker_is_forgotten_after_a_while() -> None:
    registry = WorkerRegistry()
    publish(registry, WORKER, 0.0)
    registry.tick(FORGET_AFTER_S)
    assert TOPIC in registry.workers
    registry.tick(FORGET_AFTER_S + 1)
    assert registry.workers == {}
    publish(registry, WORKER, 400.0)
    assert describe(registry.tick(400.0 + FORGET_AFTER_S + 1)) == ["lost silent"], "though no tick came in between"


@pytest.mark.parametrize("change", [{"pid": 2}, {"instance": "b"}], ids=str)
def test_another_process_loses_the_former_and_appears_last(change: dict[str, Any]) -> None:
    registry = WorkerRegistry()
    publish(registry, WORKER)
    other = make_worker_record("other")
    registry.on_message(other.topic, other.to_bytes(), 0.0)
    restarted = WORKER.model_copy(update=change)
    assert registry.on_message(TOPIC, restarted.to_bytes(), 0.0) == [
        PresenceEvent("lost", TOPIC, WORKER, reason="restarted"),
        PresenceEvent("appeared", TOPIC, restarted),
    ]
    assert list(registry.workers) == [other.topic, TOPIC]


def test_late_record_is_a_gap() -> None:
    registry = WorkerRegistry()
    publish(registry, WORKER, 0.0)
    assert publish(registry, WORKER, PRESENCE_GAP_S) == ["updated"]
    assert publish(registry, WORKER, 2 * PRESENCE_GAP_S + 0.1) == ["gap"]


def test_another_count_of_reconnects_is_a_gap_of_the_same_process_only() -> None:
    registry = WorkerRegistry()
    publish(registry, make_worker_record(reconnects=0), 0.0)
    assert publish(registry, make_worker_record(reconnects=1), 1.0) == ["gap"]
    assert publish(registry, make_worker_record(reconnects=1), 2.0) == ["updated"]
    assert publish(registry, make_worker_record(reconnects=0, pid=2), 3.0) == ["lost restarted", "appeared"]


def test_entry_is_live_and_renewed_only_by_records_published_while_listening() -> None:
    registry = WorkerRegistry()
    publish(registry, WORKER, retained=True)
    publish(registry, WORKER, retained=True)
    entry = registry.workers[TOPIC]
    assert (entry.is_live, entry.is_renewed) == (False, False)
    publish(registry, WORKER)
    assert (entry.is_live, entry.is_renewed) == (True, True)


def test_first_live_record_alone_is_no_renewal() -> None:
    registry = WorkerRegistry()
    publish(registry, WORKER)
    entry = registry.workers[TOPIC]
    assert (entry.is_live, entry.is_renewed) == (True, False)


def test_reset_loses_all_and_ignores_retained_records_from_then_on() -> None:
    registry = WorkerRegistry()
    publish(registry, WORKER)
    topic, source = source_publication()
    registry.on_message(topic, source.to_bytes(), 0.0)
    assert describe(registry.reset()) == ["lost disconnected"] * 2
    assert registry.reset() == []
    assert publish(registry, WORKER, retained=True) == []
    assert publish(registry, WORKER) == ["appeared"]


def test_sources_are_kept_apart_from_workers() -> None:
    registry = WorkerRegistry()
    topic, record = source_publication("cam")
    [event] = registry.on_message(topic, record.to_bytes(), 0.0)
    assert (event.kind, event.source, event.worker, event.name) == ("appeared", record, None, "cam")
    assert list(registry.sources) == [topic]
    assert registry.workers == {}


def test_workers_up_leaves_out_other_stages_states_and_silent_workers() -> None:
    registry = WorkerRegistry()
    records = [
        make_worker_record("a"),
        make_worker_record("b", state="draining"),
        make_worker_record("c", stage="tail"),
    ]
    for record in records:
        registry.on_message(record.topic, record.to_bytes(), 0.0)
    assert registry.workers_up(1.0) == [records[0], records[2]]
    assert registry.workers_up(1.0, "head") == [records[0]]
    assert registry.workers_up(PRESENCE_TIMEOUT_S + 1) == []


# Rejected messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "topic",
    [
        "sparse/local/street/head/up/other",
        "sparse/local/street/tail/up/w",
        "sparse/local/yard/head/up/w",
        "sparse/cloud/street/head/up/w",
        "sparse/local/street/source/up/w",
        "sparse/local/street/head/in/w",
        "sparse/local/street/head/up/w/x",
    ],
)
def test_record_on_another_topic_is_rejected(topic: str) -> None:
    registry = WorkerRegistry()
    [event] = registry.on_message(topic, WORKER.to_bytes(), 0.0)
    assert event.kind == "rejected"
    assert isinstance(event.error, BadPayload)
    assert (registry.workers, registry.sources, registry.rejected) == ({}, {}, 1)


def test_rejected_message_leaves_the_entry_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    registry = WorkerRegistry()
    publish(registry, WORKER, 0.0)
    assert publish(registry, b"garbage", 1.0) == ["rejected"]
    other_version = WORKER.model_copy(update={"version": "2"})
    [event] = registry.on_message(TOPIC, other_version.to_bytes(), 1.0)
    assert event.error is not None
    assert event.error.code == "VersionMismatch"
    assert registry.workers[TOPIC].last_seen_s == 0.0
    assert registry.rejected == 2
    assert len(caplog.records) == 1
    assert TOPIC in caplog.text


def test_entries_and_log_lines_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    registry = WorkerRegistry()
    for number in range(ENTRY_LIMIT + 100):
        record = make_worker_record(f"w{number}")
        registry.on_message(record.topic, record.to_bytes(), 0.0)
    assert (len(registry.workers), registry.rejected) == (ENTRY_LIMIT, 100)
    assert len(caplog.records) < 100
    topic, source = source_publication()
    assert describe(registry.on_message(topic, source.to_bytes(), 0.0)) == ["appeared"], "sources have their own limit"
    first = next(iter(registry.workers))
    assert describe(registry.on_message(first, registry.workers[first].record.to_bytes(), 1.0)) == ["updated"]


# The listener -----------------------------------------------------------------------------------------------------


class Fixture:
    """A listener on an in-memory broker, and a client that publishes records to it."""

    def __init__(self, *, reset_on_reconnect: bool = False) -> None:
        self.broker = MemoryBroker()
        self.publisher = MemoryTransport(self.broker)
        self.transport = MemoryTransport(self.broker)
        self.events: list[PresenceEvent] = []
        self.listener = PresenceListener(self.transport, self.events.append, reset_on_reconnect=reset_on_reconnect)

    async def __aenter__(self) -> Fixture:
        await self.publisher.connect()
        await self.transport.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.listener.close()
        await self.transport.close()
        await self.publisher.close()

    async def publish(self, record: WorkerRecord) -> None:
        await self.publisher.publish(record.topic, record.to_bytes(), qos=1, retain=True)


def test_listener_reports_retained_and_live_records() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.publish(WORKER)
            await fixture.listener.subscribe(all_presence_filter())
            assert await fixture.listener.wait_for(lambda registry: TOPIC in registry.workers, 20)
            assert [(event.kind, event.retained) for event in fixture.events] == [("appeared", True)]
            await fixture.publish(WORKER)
            assert await fixture.listener.wait_for(lambda registry: registry.workers[TOPIC].is_renewed, 20)

    run_async(test())


def test_wait_for_returns_false_after_its_timeout() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.listener.subscribe(all_presence_filter())
            assert not await fixture.listener.wait_for(lambda registry: bool(registry.workers), 0.01)

    run_async(test())


def test_several_tasks_may_wait_at_once() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.listener.subscribe(all_presence_filter())
            waits = [fixture.listener.wait_for(lambda registry: bool(registry.workers), 20) for _ in range(3)]
            results = asyncio.gather(*waits)
            await fixture.publish(WORKER)
            assert await results == [True] * 3

    run_async(test())


def test_further_filters_and_callbacks_can_be_added() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            added: list[PresenceEvent] = []
            await fixture.listener.subscribe(StageTopics("local", "street", "head").presence_filter)
            fixture.listener.add_callback(added.append)
            await fixture.listener.subscribe(StageTopics("local", "street", "tail").presence_filter)
            await fixture.publish(WORKER)
            await fixture.publish(make_worker_record(stage="tail"))
            assert await fixture.listener.wait_for(lambda registry: len(registry.workers) == 2, 20)
            assert fixture.events == added

    run_async(test())


def test_tick_reports_silence() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.listener.subscribe(all_presence_filter())
            await fixture.publish(WORKER)
            await fixture.listener.wait_for(lambda registry: bool(registry.workers), 20)
            fixture.listener.tick(time.monotonic() + PRESENCE_TIMEOUT_S + 1)
            assert describe(fixture.events) == ["appeared", "lost silent"]

    run_async(test())


def test_ticks_come_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokers.dispatch.worker_registry._TICK_S", 0.001)
    monkeypatch.setattr("brokers.dispatch.worker_registry.PRESENCE_TIMEOUT_S", 0.01)

    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.listener.subscribe(all_presence_filter())
            await fixture.publish(WORKER)
            assert await fixture.listener.wait_for(
                lambda registry: any(entry.is_lost for entry in registry.workers.values()), 20
            )

    run_async(test())


@pytest.mark.parametrize(("reset", "events"), [(True, ["appeared", "lost disconnected"]), (False, ["appeared"])])
def test_reconnection_resets_the_registry_only_if_asked_to(reset: bool, events: list[str]) -> None:
    async def test() -> None:
        async with Fixture(reset_on_reconnect=reset) as fixture:
            await fixture.listener.subscribe(all_presence_filter())
            await fixture.publish(WORKER)
            await fixture.listener.wait_for(lambda registry: bool(registry.workers), 20)
            reconnected = asyncio.Event()

            async def on_reconnect() -> None:
                reconnected.set()

            fixture.transport.on_reconnect(on_reconnect)
            fixture.broker.stop()
            fixture.broker.start()
            await asyncio.wait_for(reconnected.wait(), 20)
            assert describe(fixture.events) == events

    run_async(test())


@pytest.mark.parametrize("end", ["close", "unsubscribe"])
def test_closed_listener_reports_nothing_more(end: str) -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.listener.subscribe(all_presence_filter())
            await getattr(fixture.listener, end)()
            other = PresenceListener(fixture.publisher)
            await other.subscribe(all_presence_filter())
            await fixture.publish(WORKER)
            assert await other.wait_for(lambda registry: bool(registry.workers), 20)
            await other.close()
            assert fixture.events == []

    run_async(test())
