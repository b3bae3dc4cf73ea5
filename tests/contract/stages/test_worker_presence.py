"""Workers that join a stage together: none has told of itself when the others look, and yet one of two twins leaves."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import WorkerRecord
from brokers.mqtt.in_memory import MemoryBroker, MemoryTransport
from brokers.protocol.topics import StageTopics
from brokers.protocol.transport import Delivery, Properties
from stages.errors import WorkerConflict
from stages.worker.duplicate_check import CONFLICT_WATCH_S, PeerWorkers
from stages.worker.worker_presence import WorkerPresence
from tests.support.brokers.broker_kinds import run_async

PIPELINE = Pipeline.model_validate({"pipeline": {"name": "street"}, "stage": [{"name": "head", "executor": "a:b"}]})
TOPICS = StageTopics("local", "street", "head")


def birth(worker: str, fingerprint: str = "one", **fields: Any) -> WorkerRecord:
    given = {"stage": "head", "pipeline": "street", "site": "local", "node": "here", "pid": 1, "device": "cpu"}
    return WorkerRecord.model_validate({**given, "worker": worker, "fingerprint": fingerprint, "capacity": 3, **fields})


class Member:
    """The presence of one worker, without its work."""

    def __init__(self, hub: MemoryBroker, worker: str, fingerprint: str) -> None:
        self.worker, self.fingerprint = worker, fingerprint
        self.line = MessageChannel(MemoryTransport(hub))
        self.vitals = WorkerPresence(self.line, TOPICS, PIPELINE, PIPELINE.stage[0], worker, "cpu")

    async def check(self) -> None:
        await self.line.open()
        await self.vitals.check_for_conflict(self.fingerprint)

    async def live(self, for_s: float) -> str | None:
        """Report for some time; what made it leave before, if anything did."""
        probation = asyncio.create_task(self.vitals.watch_for_conflict(), name="probation")
        with suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                while not probation.done():
                    await self.vitals.report(0)
                    await asyncio.wait({probation}, timeout=0.2)
        probation.cancel()
        (left,) = await asyncio.gather(probation, return_exceptions=True)
        await self.vitals.deregister()
        await self.line.close()
        return str(left) if isinstance(left, WorkerConflict) else None


async def live_together(*marks: tuple[str, str], for_s: float = 2.0) -> list[str | None]:
    hub = MemoryBroker()
    members = [Member(hub, *mark) for mark in marks]
    await asyncio.gather(*(member.check() for member in members))
    return list(await asyncio.gather(*(member.live(for_s) for member in members)))


def test_of_two_models_that_join_together_the_one_with_the_smaller_id_stays() -> None:
    async def test() -> None:
        first, second = await live_together(("a", "one"), ("b", "two"))
        assert first is None
        assert second is not None
        assert second.startswith("worker 'b' cannot join: worker 'a' serves stage 'head' with the model 'one', this")

    run_async(test())


def test_of_two_of_one_id_that_join_together_one_stays_and_keeps_the_record() -> None:
    async def test() -> None:
        found = await live_together(("w", "one"), ("w", "one"))
        (left,) = [each for each in found if each is not None]
        assert left.startswith("worker 'w' cannot join: another worker of this id (process ")

    run_async(test())


def test_workers_of_one_model_that_join_together_all_stay_beyond_probation() -> None:
    async def test() -> None:
        found = await live_together(*((f"w{number}", "one") for number in range(5)), for_s=CONFLICT_WATCH_S + 0.5)
        assert found == [None] * 5

    run_async(test())


def heard(peers: PeerWorkers, record: WorkerRecord, *, retain: bool = False) -> WorkerRecord | None:
    topic = TOPICS.presence(record.worker)
    return peers.on_presence(Delivery(topic, Properties(), memoryview(record.to_bytes()), retain))


OWN = birth("m", "one", instance="me")


@pytest.mark.parametrize(
    ("other", "leaves"),
    [
        (birth("a", "two", up_s=0.0), True),
        (birth("z", "two", up_s=0.0), False),
        (birth("z", "two", up_s=CONFLICT_WATCH_S - 0.001), False),
        (birth("z", "two", up_s=CONFLICT_WATCH_S), True),
        (birth("z", "two"), True),  # a foreign worker that does not say: it would not leave
        (birth("z", "two", up_s=9.0, state="draining"), True),
        (birth("a", "two", up_s=9.0, state="stopped"), False),
        (birth("a", "one", up_s=9.0), False),
        (birth("m", "one", up_s=0.0, instance="a"), True),
        (birth("m", "one", up_s=0.0, instance="z"), False),
        (birth("m", "one", up_s=CONFLICT_WATCH_S, instance="z"), True),
    ],
)
def test_who_leaves_is_decided_by_what_both_records_say(other: WorkerRecord, leaves: bool) -> None:
    peers = PeerWorkers(OWN)
    assert heard(peers, other) == other
    assert (peers.conflict_with(other) is not None) == leaves


def test_of_two_on_probation_exactly_one_leaves_whoever_they_are() -> None:
    for one, two in [
        (("a", "x"), ("b", "x")),
        (("b", "x"), ("a", "x")),
        (("w", "x"), ("w", "y")),
        (("b", ""), ("a", "z")),
    ]:
        births = [
            birth(name, mark, instance=instance, up_s=1.0)
            for (name, instance), mark in zip((one, two), ("1", "2"), strict=True)
        ]
        leaving = [PeerWorkers(births[0]).conflict_with(births[1]), PeerWorkers(births[1]).conflict_with(births[0])]
        assert [each is None for each in leaving].count(True) == 1


def test_a_record_that_was_kept_or_is_its_own_moves_no_worker() -> None:
    peers = PeerWorkers(OWN)
    assert heard(peers, birth("a", "two", up_s=9.0), retain=True) is None
    assert heard(peers, OWN) is None


def test_a_record_of_another_model_that_outlived_its_worker_keeps_nobody_out() -> None:
    peers = PeerWorkers(OWN)
    stale = birth("a", "two")
    heard(peers, stale, retain=True)
    doubts = [peers.is_uncertain]
    assert peers.find_conflict() is None
    heard(peers, stale)
    doubts.append(peers.is_uncertain)
    assert doubts == [True, False]
    assert "worker 'a' serves stage 'head' with the model 'two'" in str(peers.find_conflict())


# How long tasks wait --------------------------------------------------------------------------------------------------


def waits_told(*intervals: tuple[list[float], float | None]) -> list[float]:
    """The `queue_ms` of reports, each after such waits (s) of begun tasks, with one that has waited so long (s)."""

    told: list[float] = []

    async def test() -> None:
        hub = MemoryBroker()
        member = Member(hub, "w", "one")
        listener = MemoryTransport(hub)
        await listener.connect()
        await listener.subscribe(
            TOPICS.presence_filter, lambda it: told.append(WorkerRecord.from_bytes(bytes(it.payload)).load.queue_ms)
        )
        await member.check()
        for begun_s, oldest_s in intervals:
            member.vitals.record_queue_waits(begun_s)
            await member.vitals.report(9, None if oldest_s is None else time.monotonic() - oldest_s)
        await asyncio.sleep(0.01)
        await member.line.close()
        await listener.close()

    run_async(test())
    return told


def test_the_wait_is_that_of_the_tasks_begun_in_this_interval_and_nothing_of_it_is_left_in_the_next() -> None:
    assert waits_told(([], None), ([0.2, 0.4], None), ([], None)) == [0, 300, 0]


def test_a_task_that_waits_longer_than_those_that_were_begun_counts_before_its_turn() -> None:
    (behind_a_long_task, behind_others, before_others) = waits_told(([], 5.0), ([0.1], 2.0), ([3.0], 2.0))
    assert 5000 <= behind_a_long_task < 5500
    assert 2000 <= behind_others < 2500
    assert before_others == 3000
