"""Faults that no last will reports: brokers that restart, workers that freeze, deadlines that pass meanwhile."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import numpy as np
import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import DeadlinePassed, NoWorker
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from brokers.server.local_broker import LocalBroker, start_broker
from sources.client.offloader import Offloader
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_broker
from tests.support.pipelines.contents import make_content, result_value
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually
from tests.support.pipelines.served_pipeline import ServedPipeline, wait_until, with_pipeline

STEP = stage_table("step", "SleepExecutor", settings={"seconds": 0.02})
LAST = stage_table("last", "add_one")
# Longer than any test: no request is sent again because its lease ended.
LEASE_S = 600.0


def test_broker_restarts_cost_no_request(sandbox: ProcessSandbox) -> None:
    require_broker("mosquitto")
    path = write_pipeline_file(sandbox.folder, [STEP, LAST], lease_s=LEASE_S)
    brokers = [start_broker(kind="mosquitto")]
    address = brokers[0].address

    def restart_broker() -> None:
        brokers[-1].stop()
        brokers.append(start_broker(kind="mosquitto", port=brokers[0].port))

    async def main() -> None:
        async with Offloader(load_pipeline(path), broker=address, window=4) as offload:
            requests = [asyncio.create_task(offload.request(make_content(index))) for index in range(100)]
            for count, completed in enumerate(asyncio.as_completed(requests), start=1):
                await completed
                if count in (20, 60):
                    await asyncio.to_thread(restart_broker)
            assert [result_value(request.result()) for request in requests] == [index + 1 for index in range(100)]
            assert offload.counters["results"] == 100

    try:
        for name in ("step", "last"):
            sandbox.start_sparse("stage", path, name, "--broker", address)
        wait_for_workers(address, lambda workers: len(workers) == 2)
        asyncio.run(main())
    finally:
        brokers[-1].stop()


def test_worker_that_dies_while_the_broker_is_down_is_lost(sandbox: ProcessSandbox) -> None:
    """The broker restarts with its retained record, and publishes no last will."""
    require_broker("mosquitto")
    path = write_pipeline_file(sandbox.folder, [STEP, LAST], lease_s=LEASE_S)
    broker = start_broker(kind="mosquitto")
    address = broker.address

    async def main() -> None:
        nonlocal broker
        async with Offloader(load_pipeline(path), broker=address, window=6) as offload:
            requests = [asyncio.create_task(offload.request(make_content(index))) for index in range(60)]
            for count, completed in enumerate(asyncio.as_completed(requests), start=1):
                await completed
                if count == 10:
                    await asyncio.to_thread(broker.stop)
                    dying.process.kill()
                    broker = await asyncio.to_thread(start_broker, kind="mosquitto", port=broker.port)
            assert [result_value(request.result()) for request in requests] == [index + 1 for index in range(60)]

    try:
        dying = sandbox.start_sparse("stage", path, "step", "--broker", address, "--worker", "dying")
        sandbox.start_sparse("stage", path, "step", "--broker", address, "--worker", "staying")
        sandbox.start_sparse("stage", path, "last", "--broker", address)
        wait_for_workers(address, lambda workers: len(workers) == 3)
        asyncio.run(main())
    finally:
        broker.stop()


def test_frozen_worker_is_replaced_and_its_late_results_are_dropped(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    address = embedded_broker.address
    gate, log = sandbox.folder / "gate", sandbox.folder / "log"
    settings = {"gate_file": str(gate), "log_file": str(log)}
    step = stage_table("step", executor="tests.soak.harness.numeric_chain:GatedExecutor", settings=settings)
    path = write_pipeline_file(sandbox.folder, [step, LAST], name="frozen", lease_s=LEASE_S)
    frozen = sandbox.start_sparse("stage", path, "step", "--broker", address, "--worker", "frozen")
    sandbox.start_sparse("stage", path, "last", "--broker", address)
    wait_for_workers(address, lambda workers: sum("/frozen/" in topic for topic in workers) == 2)

    def wait_for_queue(length: int) -> None:
        queues = ("frozen", length)
        wait_for_workers(address, lambda workers: queues in [(r.worker, r.load.queue) for r in workers.values()])

    def lost_workers() -> set[str]:
        """The lost workers of `sparse status`; all others are up."""
        workers = sandbox.run_sparse("status", path, "--broker", address, "--json").json_output["workers"]
        assert {worker["state"] for worker in workers} == {"up"}
        return {worker["worker"] for worker in workers if worker["lost"]}

    async def main() -> None:
        async with Offloader(load_pipeline(path), broker=address, window=3) as offload:
            requests = [asyncio.create_task(offload.request(make_content(index))) for index in range(3)]
            # One is executed, which does not end before the gate is open; the others wait in the queue.
            await asyncio.to_thread(eventually, "the first task", log.exists)
            await asyncio.to_thread(wait_for_queue, 2)
            frozen.process.send_signal(signal.SIGSTOP)
            gate.touch()
            sandbox.start_sparse("stage", path, "step", "--broker", address, "--worker", "other")
            responses = await asyncio.gather(*requests)
            assert [result_value(response) for response in responses] == [1.0, 2.0, 3.0]
            assert {response.result.hops[0].worker for response in responses} == {"other"}
            await asyncio.to_thread(eventually, "a lost worker", lambda: lost_workers() == {"frozen"})
            frozen.process.send_signal(signal.SIGCONT)
            await wait_until(lambda: offload.counters["duplicates"] >= 3)
            await asyncio.to_thread(eventually, "no lost worker", lambda: not lost_workers())
            assert offload.counters["results"] == offload.counters["requests"]

    asyncio.run(main())


def test_deadline_passes_while_the_broker_is_down(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, [STEP], lease_s=LEASE_S)
    broker = start_broker()
    try:
        sandbox.start_sparse("stage", path, "step", "--broker", broker.address)
        wait_for_workers(broker.address, lambda workers: len(workers) == 1)

        async def main() -> None:
            async with Offloader(load_pipeline(path), broker=broker.address) as offload:
                await offload.request(make_content(0))
                await asyncio.to_thread(broker.stop)
                # NoWorker if the broker has published the removal of the worker before.
                with pytest.raises((DeadlinePassed, NoWorker)):
                    await offload.request(make_content(0), deadline_ms=1000)

        asyncio.run(main())
    finally:
        broker.stop()


def test_worker_survives_the_expiry_of_its_queue(tmp_path: Path) -> None:
    """Two results wait for a worker of the next stage, so that nothing is computed; other tasks expire in the queue."""

    async def test(served: ServedPipeline) -> None:
        worker = await served.add_worker("step")
        async with served.offloader(window=8) as offload:
            requests = [offload.request(make_content(0), deadline_ms=500) for _ in range(5)]
            errors = await asyncio.gather(*requests, return_exceptions=True)
            assert [type(error) for error in errors] == [DeadlinePassed] * 5
            await wait_until(lambda: worker.counters["failed"] >= 5)
            await served.add_worker("last")
            assert result_value(await offload.request(make_content(1))) == 3

    with_pipeline(tmp_path, test, stage_table("step", "double", max_batch=8), LAST)


def test_large_request_visits_a_worker_twice(tmp_path: Path) -> None:
    """The chunks of its second visit are not taken for duplicates of those of its first."""

    async def test(served: ServedPipeline) -> None:
        await served.add_all()
        async with served.offloader() as offload:
            response = await offload.request(TensorContent({"values": from_numpy(np.zeros(1 << 18))}))  # 4 chunks
        assert [hop.stage for hop in response.result.hops] == ["there", "back", "there", "back"]

    with_pipeline(tmp_path, test, stage_table("there", "LoopbackExecutor"), stage_table("back", "LoopbackExecutor"))
