"""One of two workers is stuck: it holds no more than its credit, and the other does all further requests."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np

from brokers.config.pipeline_file import load_pipeline
from brokers.dispatch.presence import PREFETCH_TASKS, WorkerRecord
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from brokers.server.local_broker import LocalBroker
from sources.client.offloader import Offloader
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox

REQUESTS = 60
CREDIT = 1 + PREFETCH_TASKS  # of a worker with batches of one


def test_stuck_worker_gets_only_its_credit(sandbox: ProcessSandbox, broker: LocalBroker) -> None:
    gates = {name: sandbox.folder / f"{name}.gate" for name in ("stuck", "free")}
    for name, gate in gates.items():
        settings = {"gate_file": str(gate), "log_file": str(sandbox.folder / f"{name}.log")}
        table = stage_table("step", executor="tests.soak.harness.numeric_chain:GatedExecutor", settings=settings)
        folder = sandbox.folder / name
        folder.mkdir()
        path = write_pipeline_file(folder, [table], name="unequal")
        sandbox.start_sparse("stage", path, "step", "--broker", broker.address, "--worker", name)
    wait_for_workers(broker.address, lambda workers: len(unequal_records(workers)) == len(gates))

    async def test() -> Counter[str]:
        results: Counter[str] = Counter()
        async with Offloader(load_pipeline(path), broker=broker.address, window=2 * CREDIT) as offload:
            content = TensorContent({"values": from_numpy(np.array(1.0))})
            requests = [asyncio.create_task(offload.request(content)) for _ in range(REQUESTS)]
            # Both are busy with one task, and have all others of their credit in the queue.
            await asyncio.to_thread(wait_for_workers, broker.address, all_credit_is_used)
            gates["free"].touch()
            for done, request in enumerate(asyncio.as_completed(requests), 1):
                results[(await request).result.hops[0].worker] += 1
                if done == REQUESTS - CREDIT:
                    assert results == {"free": REQUESTS - CREDIT}
                    gates["stuck"].touch()
            assert offload.counters["duplicates"] == 0
        return results

    assert asyncio.run(test()) == {"free": REQUESTS - CREDIT, "stuck": CREDIT}


def unequal_records(workers: dict[str, WorkerRecord]) -> list[WorkerRecord]:
    return [record for record in workers.values() if record.pipeline == "unequal"]


def all_credit_is_used(workers: dict[str, WorkerRecord]) -> bool:
    return [record.load.queue for record in unequal_records(workers)] == [PREFETCH_TASKS] * 2
