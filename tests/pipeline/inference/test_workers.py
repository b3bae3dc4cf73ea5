"""Worker processes that stop or are killed while requests are in flight."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import psutil

from brokers.config.pipeline_file import load_pipeline
from brokers.server.local_broker import LocalBroker
from sources.client.offloader import Offloader
from sources.client.pending_request import PendingRequest
from tests.support.brokers.presence import WorkerRecords, wait_for_workers, watch_workers
from tests.support.pipelines.contents import make_content, result_value
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually
from tests.support.pipelines.served_pipeline import GatedExecutor, ServedPipeline, wait_until, with_pipeline


def test_stopped_worker_finishes_its_tasks(sandbox: ProcessSandbox, broker: LocalBroker) -> None:
    started, gate = sandbox.folder / "started", sandbox.folder / "gate"
    settings = {"started_file": str(started), "gate_file": str(gate)}
    path = write_pipeline_file(sandbox.folder, [stage_table("slow", "GateExecutor", settings=settings)])
    worker = sandbox.start_sparse("stage", path, "slow", "--broker", broker.address, "--worker", "w")
    wait_for_workers(broker.address, lambda workers: len(workers) == 1)

    was_registered = False

    def is_deregistered(workers: WorkerRecords) -> bool:
        nonlocal was_registered
        was_registered |= bool(workers)
        return was_registered and not workers

    def wait_for_state(state: str, queued: int) -> None:
        def predicate(workers: WorkerRecords) -> bool:
            return [(record.state, record.load.queue) for record in workers.values()] == [(state, queued)]

        wait_for_workers(broker.address, predicate)

    async def main() -> list[str]:
        states = asyncio.create_task(watch_workers(broker.address, is_deregistered))
        async with Offloader(load_pipeline(path), broker=broker.address, window=3) as offload:
            requests = [asyncio.create_task(offload.request(make_content(index))) for index in range(3)]
            await asyncio.to_thread(eventually, "the first task", started.exists)
            await asyncio.to_thread(wait_for_state, "up", 2)
            worker.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(wait_for_state, "draining", 2)
            gate.touch()
            responses = await asyncio.gather(*requests)
            assert [result_value(response) for response in responses] == [0.0, 1.0, 2.0]
            assert offload.counters["retries"] == 0
        return [record.state for workers in await states for record in workers.values()]

    states = asyncio.run(main())
    assert worker.wait().returncode == 0, worker.read_stderr()
    assert list(dict.fromkeys(states)) == ["up", "draining", "stopped"]
    sandbox.assert_nothing_left()


def test_requests_of_a_draining_worker_go_to_another(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        executor = GatedExecutor()
        first = await served.add_worker(executor=executor)
        async with served.offloader(window=6) as offload:
            requests = [asyncio.create_task(offload.request(make_content(1.0))) for _ in range(20)]
            await wait_until(lambda: executor.values)
            leaving = asyncio.create_task(served.remove_worker(first))
            second = await served.add_worker()
            executor.gate.set()
            responses: list[PendingRequest] = await asyncio.gather(*requests)
            await leaving
            assert offload.counters["results"] == 20
        assert {response.result.hops[0].worker for response in responses} == {first.worker, second.worker}

    with_pipeline(tmp_path, test, stage_table("slow", "double"))


def test_run_restarts_killed_workers_and_loses_nothing(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    stages = [
        stage_table("first", "SleepExecutor", settings={"seconds": 0.02}),
        # So slow that it has a task in hand when it is killed, also on a busy machine.
        stage_table("slow", "SleepExecutor", settings={"seconds": 0.3}),
        stage_table("last", "add_one"),
    ]
    # Results are recorded in order: one that waits for its second attempt holds back up to a window of later ones.
    # There are enough that the run is far from its end at the last kill. No request waits for the end of its lease.
    source = counting_source_table(60, window=9)
    path = write_pipeline_file(sandbox.folder, stages, source, lease_s=600.0)
    out = sandbox.folder / "out"
    run = sandbox.start_sparse("run", path, "--broker", embedded_broker.address, "--json", "--out", out)
    results = out / "results.jsonl"

    def count_results() -> int:
        assert not run.has_exited, run.read_stderr()
        return results.read_text().count("\n") if results.exists() else 0

    for count, name in ((5, "slow-1"), (10, "first-1"), (15, "last-1"), (20, "first-1")):
        eventually("more results", lambda count=count: count_results() >= count)  # type: ignore[misc]
        process = eventually(name, lambda name=name: count_results() and sandbox.find_process("--worker", name))  # type: ignore[misc]
        assert isinstance(process, psutil.Process)
        process.kill()
    result = run.wait()
    assert result.returncode == 0, result.stderr
    summary = result.json_output
    assert (summary["requests"], summary["results"], summary["lost"], summary["failed"]) == (60, 60, 0, 0)
    assert summary["retries"] >= 1
    assert summary["stages"]["slow"]["tasks"] == 60
    assert sorted(json.loads(line)["index"] for line in results.read_text().splitlines()) == list(range(60))
    sandbox.assert_nothing_left()
