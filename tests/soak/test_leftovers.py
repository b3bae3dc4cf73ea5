"""Requests that are answered, fail or pass their deadline leave no entry in any table of the source and the workers.

All of them run in this process, so that every object they hold can be counted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.errors import DeadlinePassed, RequestFailed
from brokers.mqtt.client import MqttTransport
from brokers.server.local_broker import start_broker
from sources.client.offloader import Offloader
from stages.commands.stage import make_executor
from stages.worker.inference_worker import InferenceWorker
from stages.worker.worker_context import WorkerContext
from tests.soak.harness.request_load import CONCURRENCY, OBJECT_TOLERANCE
from tests.soak.harness.resource_usage import count_reachable_objects, settle
from tests.support.monitor.fake_monitor import FakeMonitor, monitor_socket_path
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

STAGES = [stage_table("reject_negative", "reject_negative"), stage_table("add", "add_one")]
# Far more than the tolerance, so that one object that is kept for each request of one kind shows.
REQUESTS = 300
# Small messages travel in chunks too.
CHUNK_BYTES = 256
# The table of received messages is full after fewer requests than one round has.
REMEMBERED_MESSAGES = 20


@asynccontextmanager
async def running_workers(pipeline: Pipeline, address: str) -> AsyncIterator[list[InferenceWorker]]:
    """One worker of each stage."""
    workers = []
    tasks = []
    for stage in pipeline.stage:
        context = WorkerContext(pipeline, stage, stage.name)
        workers.append(InferenceWorker(MqttTransport(address), context, make_executor(context)))
    try:
        for worker in workers:
            await worker.start()
            tasks.append(asyncio.create_task(worker.run()))
        yield workers
    finally:
        for worker in workers:
            await worker.drain()
        await asyncio.gather(*tasks)
        for worker in workers:
            await worker.stop()


async def send_requests(offload: Offloader, values: int) -> Counter[str]:
    """Send requests of three kinds: answered, failed, and with a short deadline. Return the outcomes."""
    outcomes: Counter[str] = Counter()
    numbers = iter(range(REQUESTS))

    async def send() -> None:
        for number in numbers:
            kind = ("answered", "failed", "short deadline")[number % 3]
            value = np.full(values, -1.0 if kind == "failed" else float(number))
            try:
                result = await offload(value, deadline_ms=1.0 + number % 20 if kind == "short deadline" else None)
                assert result.tolist() == [number + 1.0] * values
                outcomes["answered"] += 1
            except (RequestFailed, DeadlinePassed) as error:
                outcomes[type(error).__name__] += 1

    await asyncio.gather(*(send() for _ in range(CONCURRENCY)))
    return outcomes


@pytest.mark.parametrize("values", [1, 100], ids=["one message", "chunks"])
def test_finished_requests_leave_no_entry_in_any_table(
    require_mosquitto: None, tmp_path: Path, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brokers.protocol.chunking._ENDED_LIMIT", REMEMBERED_MESSAGES)
    pipeline = load_pipeline(write_pipeline_file(tmp_path, STAGES))

    async def test(address: str) -> None:
        async with running_workers(pipeline, address) as workers, Offloader(pipeline, broker=address) as offload:
            for channel in (offload.channel, *(worker.channel for worker in workers)):
                channel._chunk_bytes = CHUNK_BYTES
            outcomes = await send_requests(offload, values)
            assert outcomes.total() == REQUESTS
            assert min(outcomes["answered"], outcomes["RequestFailed"]) >= REQUESTS // 3, outcomes
            owners = (offload, *workers)
            before = [await settle(lambda: count_reachable_objects(owner)) for owner in owners]  # noqa: B023 - at once
            await send_requests(offload, values)
            limits = [count + OBJECT_TOLERANCE for count in before]
            after = [
                await settle(lambda: count_reachable_objects(owner), limit)  # noqa: B023 - at once
                for owner, limit in zip(owners, limits, strict=True)
            ]
            assert all(count <= limit for count, limit in zip(after, limits, strict=True)), (before, after)

    # Without a monitor the telemetry client keeps thousands of events for one that may start later.
    with monitor_socket_path() as path, FakeMonitor(path), start_broker(kind="mosquitto") as broker:
        monkeypatch.setenv("SPARSE_MONITOR", str(path))
        asyncio.run(test(broker.address))
