"""The way to the workers of a stage, over a line: room, turns, deaths, and words that come late."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.stage_client import LostTask, StageClient
from brokers.errors import NoWorker
from brokers.mqtt.in_memory import MemoryBroker, MemoryTransport
from brokers.protocol.messages import BinaryContent, ReplyTo, Task, new_request_id
from brokers.protocol.topics import StageTopics
from tests.support.brokers.broker_kinds import run_async
from tests.unit.brokers.dispatch.test_worker_pool import make_worker_record

TOPICS = StageTopics("local", "street", "head")


class Yard:
    """An outbox on a hub, and the means to play its workers."""

    def __init__(self) -> None:
        self.lost: list[LostTask] = []
        self.hub = MemoryBroker()
        self.line = MessageChannel(MemoryTransport(self.hub))
        self.outbox = StageClient(self.line, TOPICS, self.lost.append)

    async def __aenter__(self) -> Yard:
        await self.line.open()
        await self.outbox.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.outbox.close()
        await self.line.close()

    async def say(self, record: WorkerRecord | bytes, topic_worker: str = "w") -> None:
        payload = record if isinstance(record, bytes) else record.to_bytes()
        await self.line.transport.publish(TOPICS.presence(topic_worker), payload, qos=1, retain=True)
        await asyncio.sleep(0.01)


def task(request: bytes | None = None, attempt: int = 1) -> Task:
    return Task(
        request_id=request or new_request_id(),
        content=BinaryContent("application/json", b"1"),
        reply_to=ReplyTo("back"),
        attempt=attempt,
    )


def test_all_that_wait_go_at_once_when_a_worker_with_room_for_them_is_born() -> None:
    async def test() -> None:
        async with Yard() as yard:
            waiting = [asyncio.create_task(yard.outbox.send(task(), timeout_s=5)) for _ in range(4)]
            await asyncio.sleep(0.01)
            await yard.say(make_worker_record(capacity=4))
            done, _ = await asyncio.wait(waiting, timeout=0.3)  # well within the second after which they look again
            assert len(done) == 4
            assert await asyncio.gather(*waiting) == ["w"] * 4

    run_async(test())


def test_nobody_up_is_told_after_the_wait() -> None:
    async def test() -> None:
        async with Yard() as yard:
            with pytest.raises(
                NoWorker, match=r"no worker of stage 'head' of pipeline 'street' came up within 0\.02 s"
            ):
                await yard.outbox.send(task(), timeout_s=0.02)

    run_async(test())


def test_one_place_that_is_freed_lets_one_go() -> None:
    async def test() -> None:
        async with Yard() as yard:
            await yard.say(make_worker_record(capacity=1))
            first = task()
            await yard.outbox.send(first, timeout_s=1)
            waiting = [asyncio.create_task(yard.outbox.send(task(), timeout_s=0.3)) for _ in range(2)]
            await asyncio.sleep(0.01)
            yard.outbox.task_done("w", first.request_id)
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(each) for each in found] == [str, NoWorker]

    run_async(test())


def test_a_worker_that_dies_is_told_for_each_request_it_held() -> None:
    async def test() -> None:
        async with Yard() as yard:
            await yard.say(make_worker_record(capacity=3))
            held, finished = task(attempt=2), task()
            await yard.outbox.send(held, timeout_s=1)
            await yard.outbox.send(finished, timeout_s=1)
            yard.outbox.task_done("w", finished.request_id)
            await yard.say(b"")
            assert yard.lost == [LostTask(held.request_id, 2, ReplyTo("back"), "head", "w")]
            await yard.say(b"")
            assert len(yard.lost) == 1
            assert len(yard.outbox) == 0

    run_async(test())


def test_a_worker_that_falls_silent_is_given_up_until_it_is_heard_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokers.dispatch.stage_client._WATCH_EVERY_S", 0.01)
    monkeypatch.setattr("brokers.dispatch.worker_pool.PRESENCE_TIMEOUT_S", 0.1)

    async def test() -> None:
        async with Yard() as yard:
            await yard.say(make_worker_record())
            held = task()
            await yard.outbox.send(held, timeout_s=1)
            await asyncio.sleep(0.2)
            assert [lost.request for lost in yard.lost] == [held.request_id]
            assert len(yard.outbox) == 0
            await yard.say(make_worker_record())
            assert await yard.outbox.send(task(), timeout_s=1) == "w"

    run_async(test())


def test_after_a_broken_connection_what_was_in_hand_is_told_and_only_who_is_heard_live_gets_work() -> None:
    async def test() -> None:
        async with Yard() as yard:
            await yard.say(make_worker_record(capacity=1))
            held = task()
            await yard.outbox.send(held, timeout_s=1)
            yard.hub.stop()
            yard.hub.start()
            await asyncio.sleep(0.01)
            assert [(lost.request, lost.cause) for lost in yard.lost] == [(held.request_id, "disconnected")]
            # The record that the broker has kept proves nothing: its worker may not have found back yet.
            with pytest.raises(NoWorker):
                await yard.outbox.send(task(), timeout_s=0.1)
            await yard.say(make_worker_record(capacity=1))
            assert await yard.outbox.send(task(), timeout_s=0.1) == "w"

    run_async(test())


def test_the_death_of_an_earlier_worker_says_nothing_of_the_later_attempt() -> None:
    async def test() -> None:
        async with Yard() as yard:
            await yard.say(make_worker_record("w", capacity=1))
            request = new_request_id()
            assert await yard.outbox.send(task(request), timeout_s=1) == "w"
            await yard.say(make_worker_record("v", capacity=1), "v")
            assert await yard.outbox.send(task(request, 2), timeout_s=1) == "v"
            await yard.say(b"", "w")
            assert yard.lost == []
            await yard.say(b"", "v")
            assert [(lost.attempt, lost.worker) for lost in yard.lost] == [(2, "v")]

    run_async(test())


def test_a_late_word_of_an_earlier_attempt_does_not_hide_the_death_of_the_later() -> None:
    async def test() -> None:
        async with Yard() as yard:
            await yard.say(make_worker_record("w", capacity=1))
            request = new_request_id()
            assert await yard.outbox.send(task(request), timeout_s=1) == "w"
            await yard.say(make_worker_record("v", capacity=1), "v")
            assert await yard.outbox.send(task(request, 2), timeout_s=1) == "v"
            yard.outbox.task_done("w", request)
            await yard.say(b"", "v")
            assert [(lost.attempt, lost.worker) for lost in yard.lost] == [(2, "v")]

    run_async(test())


def test_a_record_on_the_topic_of_another_worker_or_of_garbage_is_passed_over() -> None:
    async def test() -> None:
        async with Yard() as yard:
            await yard.say(make_worker_record("someone-else"))
            await yard.say(b"garbage")
            await yard.say(make_worker_record(version="2"))
            assert len(yard.outbox) == 0
            await yard.say(make_worker_record())
            assert len(yard.outbox) == 1

    run_async(test())


def test_a_wait_that_ends_as_it_is_woken_ends_in_good_order() -> None:
    async def test() -> None:
        async with Yard() as yard:
            sending = asyncio.create_task(yard.outbox.send(task(), timeout_s=0.05))
            await asyncio.sleep(0.01)
            [turn] = yard.outbox._turns._lines[0]
            turn.add_done_callback(lambda _: yard.outbox.task_done("nobody", b""))  # wakes as the wait is cancelled
            with pytest.raises(NoWorker):
                await sending

    run_async(test())


def test_a_sender_that_is_cancelled_while_it_waits_keeps_no_turn_from_the_others() -> None:
    async def test() -> None:
        async with Yard() as yard:
            await yard.say(make_worker_record(capacity=1))
            first = task()
            await yard.outbox.send(first, timeout_s=1)
            gone, stays = (asyncio.create_task(yard.outbox.send(task(), timeout_s=5)) for _ in range(2))
            await asyncio.sleep(0.01)
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone
            yard.outbox.task_done("w", first.request_id)
            assert await asyncio.wait_for(stays, 0.5) == "w"

    run_async(test())
