"""A source whose only worker is full: it waits, asks again, and gives up when its deadline says so."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.errors import DeadlinePassed
from brokers.mqtt.in_memory import MemoryBroker, MemoryTransport
from brokers.protocol.messages import Failure, Message, Task
from sources.client.offloader import Offloader
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.presence_records import make_worker_record
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file


def test_a_deadline_that_passes_while_all_are_full_is_told_when_it_passes(tmp_path: Path) -> None:
    pipeline = load_pipeline(write_pipeline_file(tmp_path, [stage_table("head", "double")]))
    topics = pipeline.topics(pipeline.stage[0])

    async def test() -> None:
        hub = MemoryBroker()
        line = MessageChannel(MemoryTransport(hub))
        asked = []

        def turn_away(topic: str, message: Message) -> None:
            assert isinstance(message, Task)
            asked.append(message.attempt)
            full = Failure(
                request_id=message.request_id,
                stage="head",
                worker="w",
                error="Busy",
                reason="full",
                attempt=message.attempt,
                retry=True,
            )
            telling.append(asyncio.create_task(line.send(message.reply_to.topic, full)))

        telling: list[asyncio.Task[None]] = []
        await line.open()
        await line.subscribe(topics.inbox("w"), turn_away)
        record = make_worker_record("w").model_copy(update={"pipeline": pipeline.name}).to_bytes()
        await line.transport.publish(topics.presence("w"), record, qos=1, retain=True)
        async with Offloader(pipeline, transport=MemoryTransport(hub)) as offload:
            begin_s = time.monotonic()
            with pytest.raises(DeadlinePassed):
                await offload(np.array(1.0), deadline_ms=900)  # in the middle of the wait after the fifth attempt
            took_s = time.monotonic() - begin_s
        await asyncio.gather(*telling)
        await line.close()
        assert asked == [1, 2, 3, 4, 5]
        assert 0.9 <= took_s < 1.3, took_s

    run_async(test())
