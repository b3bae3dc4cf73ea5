"""A source whose only worker is busy: it retries until the deadline of the request, and no longer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.errors import DeadlinePassed
from brokers.mqtt.in_memory import MemoryBroker, MemoryTransport
from brokers.protocol.messages import Failure, Message, Task
from sources.client.offloader import Offloader
from sources.client.pending_request import PendingRequest
from tests.support.brokers.broker_kinds import async_test
from tests.support.brokers.presence_records import make_worker_record
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file


@async_test
async def test_deadline_ends_the_wait_for_a_busy_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delays_s = iter([0.0, 0.0, 600.0])
    monkeypatch.setattr(PendingRequest, "retry_delay", lambda request, failure: next(delays_s))
    pipeline = load_pipeline(write_pipeline_file(tmp_path, [stage_table("head", "double")]))
    topics = pipeline.topics(pipeline.stage[0])
    broker = MemoryBroker()
    worker = MessageChannel(MemoryTransport(broker))
    attempts: list[int] = []
    replies: list[asyncio.Task[None]] = []

    def refuse(topic: str, message: Message) -> None:
        assert isinstance(message, Task)
        attempts.append(message.attempt)
        failure = Failure(
            request_id=message.request_id,
            stage="head",
            worker="w",
            error="Busy",
            reason="full",
            attempt=message.attempt,
            retry=True,
        )
        replies.append(asyncio.create_task(worker.send(message.reply_to.topic, failure)))

    await worker.open()
    await worker.subscribe(topics.inbox("w"), refuse)
    record = make_worker_record("w").model_copy(update={"pipeline": pipeline.name}).to_bytes()
    await worker.transport.publish(topics.presence("w"), record, qos=1, retain=True)
    async with Offloader(pipeline, transport=MemoryTransport(broker)) as offload:
        with pytest.raises(DeadlinePassed):
            await offload(np.array(1.0), deadline_ms=200)
    await asyncio.gather(*replies)
    await worker.close()
    assert attempts == [1, 2, 3][: len(attempts)]
