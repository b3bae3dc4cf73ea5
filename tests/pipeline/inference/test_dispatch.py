"""Dispatch to real workers: poison requests, priorities, and a window that follows the workers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from brokers.server.local_broker import LocalBroker
from sources.client.offloader import PREFETCH_PER_WORKER
from tests.support.pipelines.contents import make_content
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox
from tests.support.pipelines.served_pipeline import GatedExecutor, ServedPipeline, wait_until, with_pipeline

POISON = 7


def test_poison_request_fails_after_three_workers_and_alone(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    stages = [
        stage_table("first", "add_one"),
        stage_table("deadly", "CrashingExecutor", settings={"value": POISON + 1.0}, workers=2),
    ]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(20), name="poisoned")
    out = sandbox.folder / "out"
    result = sandbox.run_sparse("run", path, "--broker", embedded_broker.address, "--json", "--out", out)
    summary = result.json_output
    assert (summary["requests"], summary["results"], summary["lost"]) == (20, 19, 0), result.stderr
    assert summary["failures"] == {"PoisonRequest": 1}
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    (poison,) = [each for each in results if "error" in each]
    assert (poison["index"], poison["error"], poison["stage"]) == (POISON, "PoisonRequest", "deadly")
    assert {each["index"] for each in results} == set(range(20))
    assert summary["retries_by_reason"]["WorkerLost"] >= 2


def test_interactive_request_overtakes_queued_background_requests(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        executor = GatedExecutor()
        worker = await served.add_worker(executor=executor)
        async with served.offloader(window=3) as background, served.offloader() as interactive:
            requests = [asyncio.create_task(background.request(make_content(1.0), priority="background"))]
            await wait_until(lambda: executor.values)
            more = [background.request(make_content(1.0), priority="background") for _ in range(2)]
            requests += [asyncio.create_task(request) for request in more]
            await wait_until(lambda: len(worker._queue) == 2)
            requests.append(asyncio.create_task(interactive.request(make_content(2.0))))
            await wait_until(lambda: len(worker._queue) == 3)
            executor.gate.set()
            await asyncio.gather(*requests)
        assert executor.values == [1.0, 2.0, 1.0, 1.0]

    with_pipeline(tmp_path, test, stage_table("slow", "double"))


def test_requests_have_the_priority_of_their_source(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        executor = GatedExecutor()
        worker = await served.add_worker(executor=executor)
        async with served.offloader(window=4) as offload:
            requests = [asyncio.create_task(offload.request(make_content(0.0)))]
            await wait_until(lambda: executor.values)
            requests.append(asyncio.create_task(offload.request(make_content(1.0))))
            await wait_until(lambda: len(worker._queue) == 1)
            requests.append(asyncio.create_task(offload.request(make_content(2.0), priority="interactive")))
            await wait_until(lambda: len(worker._queue) == 2)
            executor.gate.set()
            await asyncio.gather(*requests)
        assert executor.values == [0.0, 2.0, 1.0]

    with_pipeline(tmp_path, test, stage_table("slow", "double"), source={"priority": "background"})


def test_window_follows_the_workers_that_are_up(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        async with served.offloader() as offload:

            async def wait_for_limit(workers: int, widest_stage: int) -> None:
                limit = workers + PREFETCH_PER_WORKER * widest_stage
                await wait_until(lambda: offload.inflight_limit.limit == limit)

            await wait_for_limit(2, 1)  # those of the file, while none is up
            one, two, other = [await served.add_worker(name) for name in ("one", "two", "two")]
            await wait_for_limit(3, 2)
            await served.remove_worker(other)
            await wait_for_limit(2, 1)
            served.kill_worker(one)
            await served.add_worker("two")
            await wait_for_limit(2, 2)
            assert two.worker

    with_pipeline(tmp_path, test, stage_table("one", "add_one"), stage_table("two", "add_one"))
