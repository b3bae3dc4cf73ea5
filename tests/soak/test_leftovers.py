"""Requests of all fates leave nothing in any table of whoever had to do with them: the source, and both workers.

All three are in this process, so that everything they hold on to can be counted, by whatever name it goes.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.errors import DeadlinePassed, RequestFailed
from brokers.mqtt.client import MqttTransport
from brokers.server.local_broker import start_broker
from sources.client.offloader import Offloader
from stages.commands.stage import make_executor
from stages.worker.inference_worker import InferenceWorker
from tests.soak.harness.resource_usage import count_reachable_objects
from tests.support.monitor.fake_monitor import FakeMonitor, monitor_socket_path
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

STAGES = [stage_table("reject_negative", "reject_negative"), stage_table("add", "add_one")]
# A round in which each request leaves one object behind, or each that fails, or is late, or is answered, shows.
ROUND = 300
AT_ONCE = 8
# What was just being done when the objects were counted; a few dictionaries more or less have been seen.
UNSTEADY_OBJECTS = 25
# So that a small message travels in chunks too.
CHUNK_BYTES = 256
# Fewer than a round leaves: the table of messages that have come is full, and stays so.
REMEMBERED = 20
# What is late may still be on its way when its source has given it up.
SETTLED_S = 30.0


@asynccontextmanager
async def serving(pipeline: Pipeline, address: str) -> AsyncIterator[list[InferenceWorker]]:
    """A worker of each stage."""
    workers, working = [], []
    for each in pipeline.stage:
        executor, device = make_executor(pipeline, each, 1)
        workers.append(InferenceWorker(MqttTransport(address), pipeline, each, executor, each.name, device))
    try:
        for worker in workers:
            await worker.start()
            working.append(asyncio.create_task(worker.run()))
        yield workers
    finally:
        for worker in workers:
            await worker.drain()
        await asyncio.gather(*working)
        for worker in workers:
            await worker.stop()


async def one_round(offload: Offloader, values: int) -> Counter[str]:
    """Ask for what is answered, what fails, and what may be late, wherever it is then; how many there were of each."""
    fates: Counter[str] = Counter()
    numbers = iter(range(ROUND))

    async def ask() -> None:
        for number in numbers:
            fails, late = number % 3 == 1, number % 3 == 2
            value = np.full(values, -1.0 if fails else float(number))
            try:
                answer = await offload(value, deadline_ms=1.0 + number % 20 if late else None)
                assert answer.tolist() == [number + 1.0] * values
                fates["answered"] += 1
            except (RequestFailed, DeadlinePassed) as error:
                fates[type(error).__name__] += 1

    await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    return fates


def count(*roots: object) -> int:
    gc.collect()
    return count_reachable_objects(*roots)


async def back_to(before: Sequence[int], roots: Sequence[object]) -> None:
    """Wait until each of `roots` holds as many objects as before."""
    end_s = time.monotonic() + SETTLED_S
    while any(now > then + UNSTEADY_OBJECTS for now, then in zip(map(count, roots), before, strict=True)):
        assert time.monotonic() < end_s, f"{before} objects before, now {[count(each) for each in roots]}"
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("values", [1, 100], ids=["whole", "in chunks"])
def test_requests_that_were_answered_failed_or_late_leave_nothing_in_any_table(
    mosquitto: None, tmp_path: Path, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brokers.protocol.chunking._REMEMBERED", REMEMBERED)
    pipeline = load_pipeline(write_pipeline_file(tmp_path, STAGES))

    async def go(address: str) -> None:
        async with serving(pipeline, address) as workers, Offloader(pipeline, broker=address) as asks:
            lines: list[MessageChannel] = [asks.channel, *(worker.channel for worker in workers)]
            for line in lines:
                line._chunk_bytes = CHUNK_BYTES
            fates = await one_round(asks, values)
            assert fates.total() == ROUND
            assert min(fates["answered"], fates["RequestFailed"]) >= ROUND // 3, fates
            await asyncio.sleep(0.3)  # for what is still on its way; if it took longer, more would be let pass below
            before = [count(each) for each in (asks, *workers)]
            await one_round(asks, values)
            await back_to(before, (asks, *workers))

    # Somebody listens to events: without a monitor thousands of them are kept for one that may come.
    with monitor_socket_path() as path, FakeMonitor(path), start_broker(kind="mosquitto") as broker:
        monkeypatch.setenv("SPARSE_MONITOR", str(path))
        asyncio.run(go(broker.address))
