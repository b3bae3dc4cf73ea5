"""The client of a stage on a transport: waiting for credit, lost workers, and cancelled senders."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest

from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.dispatcher import LostTask
from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.stage_client import ISOLATE_FROM_ATTEMPT, StageClient
from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from brokers.errors import Disconnected, NoWorker, TooLarge
from brokers.protocol.messages import BinaryContent, ReplyTo, Task, new_request_id
from brokers.protocol.topics import StageTopics
from tests.support.brokers.broker_kinds import WAIT_S, run_async
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport
from tests.support.brokers.presence_records import make_worker_record

TOPICS = StageTopics("local", "street", "head")
ONE_CREDIT = make_worker_record(capacity=1)


@pytest.fixture(autouse=True)
def only_notifications_resume_senders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokers.dispatch.stage_client._LEASE_CHECK_S", 3600.0)


class Fixture:
    """A stage client on an in-memory broker, where the test publishes the records of its workers."""

    def __init__(self) -> None:
        self.lost: list[LostTask] = []
        self.gaps = 0
        self.broker = MemoryBroker()
        self.channel = MessageChannel(MemoryTransport(self.broker))
        self.client = StageClient(self.channel, TOPICS, self.lost.append, on_gap=self._count_gap)

    async def __aenter__(self) -> Fixture:
        await self.channel.open()
        await self.client.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.channel.close()

    def _count_gap(self) -> None:
        self.gaps += 1

    async def publish(self, record: WorkerRecord | None, worker: str = "w") -> None:
        """Publish a record, or clear the one of `worker`; return when the client has it."""
        topic = TOPICS.presence(worker) if record is None else record.topic
        payload = b"" if record is None else record.to_bytes()
        applied = asyncio.create_task(
            self.client.presence.wait_for(lambda registry: (topic in registry.workers) == bool(payload), WAIT_S)
        )
        await self.channel.transport.publish(topic, payload, qos=1, retain=True)
        assert await applied
        await asyncio.sleep(0)

    async def send(self, task: Task, timeout_s: float = WAIT_S) -> str:
        return await self.client.send(task, timeout_s=timeout_s)

    async def start_send(self, *, timeout_s: float = WAIT_S) -> asyncio.Task[str]:
        """Start to send a task that has to wait for credit; return when it waits."""
        waiting = len(self.client._waiters)
        sending = asyncio.create_task(self.send(make_task(), timeout_s))
        await asyncio.sleep(0)
        assert len(self.client._waiters) == waiting + 1
        return sending


def make_task(request: bytes | None = None, attempt: int = 1, content: bytes = b"1") -> Task:
    return Task(
        request_id=request or new_request_id(),
        content=BinaryContent("application/json", content),
        reply_to=ReplyTo("back"),
        attempt=attempt,
    )


# Credit -----------------------------------------------------------------------------------------------------------


def test_all_waiting_senders_resume_when_a_worker_appears() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            sends = [await fixture.start_send() for _ in range(4)]
            await fixture.publish(make_worker_record(capacity=4))
            assert await asyncio.gather(*sends) == ["w"] * 4

    run_async(test())


def test_timeout_raises_no_worker() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            with pytest.raises(NoWorker):
                await fixture.send(make_task(), timeout_s=0.02)

    run_async(test())


def test_one_freed_credit_resumes_one_sender() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.publish(ONE_CREDIT)
            first = make_task()
            await fixture.send(first)
            sends = [await fixture.start_send() for _ in range(2)]
            fixture.client.task_done("w", first.request_id)
            assert await asyncio.wait_for(sends[0], WAIT_S) == "w"
            await asyncio.sleep(0.01)
            assert not sends[1].done()
            sends[1].cancel()
            await asyncio.gather(sends[1], return_exceptions=True)

    run_async(test())


def test_message_over_the_workers_limit_raises_too_large() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.publish(make_worker_record(max_message_bytes=1))
            with pytest.raises(TooLarge):
                await fixture.send(make_task(content=b"12"))

    run_async(test())


def test_too_large_isolated_request_releases_its_worker() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.publish(make_worker_record(max_message_bytes=1))
            with pytest.raises(TooLarge):
                await fixture.send(make_task(attempt=ISOLATE_FROM_ATTEMPT, content=b"12"))
            assert await fixture.send(make_task(), timeout_s=0.02) == "w"

    run_async(test())


def test_close_ends_all_waiting() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            sending = await fixture.start_send()
            await fixture.client.close()
            with pytest.raises(Disconnected):
                await sending

    run_async(test())


# Lost workers -----------------------------------------------------------------------------------------------------


def test_lost_worker_is_reported_for_each_unfinished_task_once() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.publish(make_worker_record(capacity=3))
            unfinished, finished = make_task(attempt=2), make_task()
            await fixture.send(unfinished)
            await fixture.send(finished)
            fixture.client.task_done("w", finished.request_id)
            await fixture.publish(None)
            assert fixture.lost == [LostTask(unfinished.request_id, 2, ReplyTo("back"), "head", "w")]
            await fixture.publish(None)
            assert len(fixture.lost) == 1
            assert len(fixture.client) == 0

    run_async(test())


def test_restarted_worker_loses_the_tasks_of_its_former_process() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.publish(make_worker_record(pid=1))
            task = make_task()
            await fixture.send(task)
            changed = asyncio.Event()
            fixture.client.presence.add_callback(lambda _: changed.set())
            await fixture.publish(make_worker_record(pid=2))
            await asyncio.wait_for(changed.wait(), WAIT_S)
            assert [lost.request for lost in fixture.lost] == [task.request_id]
            assert await fixture.send(make_task()) == "w"

    run_async(test())


def test_silent_worker_is_lost_until_its_next_record() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.publish(make_worker_record())
            task = make_task()
            await fixture.send(task)
            fixture.client.presence.tick(time.monotonic() + PRESENCE_TIMEOUT_S + 1)
            assert [lost.request for lost in fixture.lost] == [task.request_id]
            assert len(fixture.client) == 0
            await fixture.publish(make_worker_record())
            assert await fixture.send(make_task()) == "w"

    run_async(test())


def test_gap_is_reported_and_frees_credit() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.publish(ONE_CREDIT)
            await fixture.send(make_task())
            await fixture.publish(make_worker_record(capacity=1, reconnects=1))
            assert await fixture.send(make_task()) == "w"
            assert fixture.gaps == 1
            assert fixture.lost == []

    run_async(test())


def test_reconnection_reports_tasks_and_waits_for_live_records() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.publish(ONE_CREDIT)
            task = make_task()
            await fixture.send(task)
            fixture.broker.stop()
            fixture.broker.start()
            assert await fixture.client.presence.wait_for(lambda registry: not registry.workers, WAIT_S)
            assert [(lost.request, lost.cause) for lost in fixture.lost] == [(task.request_id, "disconnected")]
            retained = fixture.client.presence.registry.on_message(
                ONE_CREDIT.topic, ONE_CREDIT.to_bytes(), time.monotonic(), retained=True
            )
            assert retained == []
            await fixture.publish(ONE_CREDIT)
            assert await fixture.send(make_task()) == "w"

    run_async(test())


def test_records_of_other_stages_are_ignored() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            other = StageTopics("local", "street", "tail")
            await fixture.client.presence.subscribe(other.presence_filter)
            await fixture.publish(make_worker_record(stage="tail"))
            assert len(fixture.client) == 0

    run_async(test())


# Cancelled senders ------------------------------------------------------------------------------------------------


def test_timeout_at_the_moment_of_notification_raises_no_worker() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            sending = await fixture.start_send(timeout_s=0.05)
            [waiter] = fixture.client._waiters._queues[0]
            waiter.add_done_callback(lambda _: fixture.client.task_done("unknown", b""))  # notifies as it is cancelled
            with pytest.raises(NoWorker):
                await sending

    run_async(test())


def test_cancelled_sender_passes_its_notification_on() -> None:
    async def test() -> None:
        async with Fixture() as fixture:
            await fixture.publish(ONE_CREDIT)
            first = make_task()
            await fixture.send(first)
            cancelled, waiting = await fixture.start_send(), await fixture.start_send()
            fixture.client.task_done("w", first.request_id)
            cancelled.cancel()
            with suppress(asyncio.CancelledError):
                await cancelled
            assert await asyncio.wait_for(waiting, WAIT_S) == "w"

    run_async(test())
