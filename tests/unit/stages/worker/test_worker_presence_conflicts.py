"""`DuplicateCheck`: which of two conflicting workers may join, and which of two that have joined leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.presence import WorkerRecord
from brokers.errors import UsageError
from brokers.protocol.topics import StageTopics
from stages.worker import worker_presence
from stages.worker.worker_context import WorkerContext
from stages.worker.worker_presence import CONFLICT_WATCH_S, DuplicateCheck, WorkerPresence, conflict_error, must_leave
from tests.support.brokers.broker_kinds import WAIT_S, run_async
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport
from tests.support.brokers.presence_records import make_worker_record
from tests.support.errors import raises_error

PIPELINE = Pipeline.model_validate({"pipeline": {"name": "street"}, "stage": [{"name": "head", "executor": "a:b"}]})
TOPICS = StageTopics("local", "street", "head")
OWN = make_worker_record("m", fingerprint="one", instance="me")


class Member:
    """The presence of one worker, without its work."""

    def __init__(self, hub: MemoryBroker, worker: str, fingerprint: str) -> None:
        self.transport = MemoryTransport(hub)
        self.presence = WorkerPresence(self.transport, WorkerContext(PIPELINE, PIPELINE.stage[0], worker))
        self.presence.set_model(fingerprint, ())
        self.check = DuplicateCheck(self.transport, TOPICS, self.presence)

    async def join(self) -> None:
        await self.transport.connect()
        await self.check.check()
        await self.presence.report(0)

    async def report_until(self, ended: asyncio.Future[Any]) -> None:
        while not ended.done():
            await self.presence.report(0)
            await asyncio.wait({ended}, timeout=0.02)

    async def close(self) -> None:
        await self.check.close()
        await self.transport.close()


async def join_together(*marks: tuple[str, str], leaving: int) -> list[str]:
    """Join workers (id, fingerprint) at once; return the messages of those that leave, once there are so many."""
    hub = MemoryBroker()
    members = [Member(hub, *mark) for mark in marks]
    await asyncio.gather(*(member.join() for member in members))
    watches = [asyncio.create_task(member.check.watch()) for member in members]
    reports = [asyncio.create_task(member.report_until(watch)) for member, watch in zip(members, watches, strict=True)]
    async with asyncio.timeout(WAIT_S):
        while sum(watch.done() for watch in watches) < (leaving or len(watches)):
            await asyncio.wait({watch for watch in watches if not watch.done()}, return_when=asyncio.FIRST_COMPLETED)
    for task in (*watches, *reports):
        task.cancel()
    results = await asyncio.gather(*watches, return_exceptions=True)
    await asyncio.gather(*reports, return_exceptions=True)
    for member in members:
        await member.close()
    return [str(result) for result in results if isinstance(result, UsageError)]


def test_of_two_models_that_join_together_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_presence, "CONFLICT_WATCH_S", WAIT_S)
    [message] = asyncio.run(join_together(("a", "one"), ("b", "two"), leaving=1))
    assert message == str(
        conflict_error(make_worker_record("b", fingerprint="two"), make_worker_record("a", fingerprint="one"))
    )


def test_of_two_workers_of_one_id_that_join_together_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_presence, "CONFLICT_WATCH_S", WAIT_S)
    [message] = asyncio.run(join_together(("w", "one"), ("w", "one"), leaving=1))
    assert message.startswith("worker 'w' cannot join: another worker of this id (process ")


def test_workers_of_one_model_that_join_together_all_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_presence, "CONFLICT_WATCH_S", 0.3)
    assert asyncio.run(join_together(*((f"w{number}", "one") for number in range(5)), leaving=0)) == []


@pytest.mark.parametrize(("worker", "fingerprint"), [("w", "one"), ("other", "two")])
def test_worker_does_not_join_while_a_conflicting_one_is_up(worker: str, fingerprint: str) -> None:
    async def test() -> None:
        hub = MemoryBroker()
        first, second = Member(hub, "w", "one"), Member(hub, worker, fingerprint)
        await first.join()
        joining = asyncio.create_task(second.join())
        await first.report_until(joining)
        with raises_error(UsageError, "WorkerConflict"):
            await joining
        for member in (first, second):
            await member.close()

    run_async(test())


@pytest.mark.parametrize("payload", [make_worker_record("w", fingerprint="two").to_bytes(), b"{}"])
def test_retained_record_of_a_dead_worker_does_not_prevent_joining(
    monkeypatch: pytest.MonkeyPatch, payload: bytes
) -> None:
    monkeypatch.setattr(worker_presence, "_RENEWAL_TIMEOUT_S", 0.1)

    async def test() -> None:
        hub = MemoryBroker()
        transport = MemoryTransport(hub)
        await transport.connect()
        await transport.publish(TOPICS.presence("w"), payload, qos=1, retain=True)
        member = Member(hub, "w", "one")
        await member.join()
        await member.close()
        await transport.close()

    run_async(test())


def test_renewed_record_of_another_version_prevents_joining() -> None:
    async def test() -> None:
        hub = MemoryBroker()
        transport = MemoryTransport(hub)
        await transport.connect()
        member = Member(hub, "w", "one")
        joining = asyncio.create_task(member.join())
        while not joining.done():
            await transport.publish(TOPICS.presence("w"), b'{"version": "99"}', qos=1, retain=True)
            await asyncio.wait({joining}, timeout=0.02)
        with raises_error(UsageError, "WorkerConflict"):
            await joining
        await member.close()
        await transport.close()

    run_async(test())


@pytest.mark.parametrize(
    ("other", "leaves"),
    [
        ({"worker": "a", "fingerprint": "two", "up_s": 0.0}, True),
        ({"worker": "z", "fingerprint": "two", "up_s": 0.0}, False),
        ({"worker": "z", "fingerprint": "two", "up_s": CONFLICT_WATCH_S - 0.001}, False),
        ({"worker": "z", "fingerprint": "two", "up_s": CONFLICT_WATCH_S}, True),
        ({"worker": "z", "fingerprint": "two"}, True),  # a foreign worker without `up_s` would not leave
        ({"worker": "z", "fingerprint": "two", "up_s": 9.0, "state": "draining"}, True),
        ({"worker": "a", "fingerprint": "two", "up_s": 9.0, "state": "stopped"}, False),
        ({"worker": "a", "fingerprint": "one", "up_s": 9.0}, False),
        ({"worker": "m", "fingerprint": "one", "up_s": 0.0, "instance": "a"}, True),
        ({"worker": "m", "fingerprint": "one", "up_s": 0.0, "instance": "z"}, False),
        ({"worker": "m", "fingerprint": "one", "up_s": CONFLICT_WATCH_S, "instance": "z"}, True),
    ],
)
def test_both_records_decide_which_worker_leaves(other: dict[str, Any], leaves: bool) -> None:
    assert must_leave(OWN, make_worker_record(**other)) == leaves


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (("a", "x"), ("b", "x")),
        (("b", "x"), ("a", "x")),
        (("w", "x"), ("w", "y")),
        (("b", ""), ("a", "z")),
    ],
)
def test_exactly_one_of_two_watching_workers_leaves(one: tuple[str, str], two: tuple[str, str]) -> None:
    records: list[WorkerRecord] = [
        make_worker_record(worker, instance=instance, fingerprint=fingerprint, up_s=1.0)
        for (worker, instance), fingerprint in zip((one, two), ("1", "2"), strict=True)
    ]
    assert must_leave(records[0], records[1]) != must_leave(records[1], records[0])
