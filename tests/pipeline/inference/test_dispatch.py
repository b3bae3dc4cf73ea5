"""Who gets what, with real workers: poison, priority, and a window that follows the workers that are up."""

from __future__ import annotations

import asyncio
import json
import signal

import numpy as np

from brokers.config.pipeline_file import load_pipeline
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from brokers.server.local_broker import LocalBroker
from sources.client.offloader import PREFETCH_PER_WORKER, Offloader
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S, ProcessSandbox

POISON = 7


def body(value: float) -> TensorContent:
    return TensorContent({"values": from_numpy(np.array(value))})


def test_a_request_that_kills_three_workers_is_given_back_and_no_other_is_blamed(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    stages = [
        stage_table("first", "add_one"),
        stage_table("deadly", "CrashingExecutor", settings={"value": POISON + 1.0}, workers=2),
    ]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(20), name="poisoned")
    out = sandbox.folder / "out"
    said = sandbox.start_sparse("run", path, "--broker", embedded_broker.address, "--json", "--out", out).wait()
    summary = said.json_output
    assert (summary["requests"], summary["results"], summary["lost"]) == (20, 19, 0), said.stderr
    assert summary["failures"] == {"PoisonRequest": 1}
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    (poison,) = [result for result in found if "error" in result]
    assert (poison["index"], poison["error"], poison["stage"]) == (POISON, "PoisonRequest", "deadly")
    assert "3 workers in turn did not come back from it: deadly-" in poison["reason"]
    assert {result["index"] for result in found} == set(range(20))
    assert summary["retried"]["WorkerLost"] >= 2


def test_what_somebody_waits_for_overtakes_what_waits_in_the_background(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(
        sandbox.folder, [stage_table("slow", "SleepExecutor", settings={"seconds": 0.05})], name="ranked"
    )
    sandbox.start_sparse("stage", path, "slow", "--broker", embedded_broker.address)
    wait_for_workers(embedded_broker.address, lambda workers: any("/ranked/" in topic for topic in workers))

    async def go() -> list[int]:
        done = 0

        async def background(offload: Offloader) -> None:
            nonlocal done
            await offload.request(body(1.0), priority="background")
            done += 1

        pipeline = load_pipeline(path)
        async with (
            Offloader(pipeline, broker=embedded_broker.address) as crowd,
            Offloader(pipeline, broker=embedded_broker.address) as person,
        ):
            asking = [asyncio.create_task(background(crowd)) for _ in range(30)]
            await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            overtaken = []
            for _ in range(5):
                before = done
                await person.request(body(2.0))
                overtaken.append(done - before)
            assert done < 30, "there was nothing left to overtake"
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        return overtaken

    # Of the background, the one that was being computed ends first, and the word of the one before may be on its way.
    assert max(asyncio.run(go())) <= 2


def test_the_window_follows_the_workers_that_are_up(sandbox: ProcessSandbox, broker: LocalBroker) -> None:
    stages = [stage_table("one", "add_one"), stage_table("two", "add_one")]
    path = write_pipeline_file(sandbox.folder, stages, name="grows")

    async def reaches(offload: Offloader, places: int, widest: int) -> None:
        async with asyncio.timeout(PROCESS_TIMEOUT_S):
            while offload.inflight_limit.limit != places + PREFETCH_PER_WORKER * widest:  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.05)

    async def go() -> None:
        async with Offloader(load_pipeline(path), broker=broker.address) as offload:
            assert offload.inflight_limit.limit == 2 + PREFETCH_PER_WORKER  # what the file says, while nobody is up
            workers = [
                sandbox.start_sparse("stage", path, name, "--broker", broker.address) for name in ("one", "two", "two")
            ]
            await reaches(offload, 3, 2)
            workers[-1].process.send_signal(signal.SIGTERM)
            await reaches(offload, 2, 1)
            workers[0].process.kill()
            workers.append(sandbox.start_sparse("stage", path, "two", "--broker", broker.address))
            await reaches(offload, 2, 2)

    asyncio.run(go())


def test_a_source_of_priority_background_asks_in_the_background(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(
        sandbox.folder, [stage_table("one", "add_one")], {"priority": "background"}, name="humble"
    )

    async def go() -> None:
        async with Offloader(load_pipeline(path), broker=embedded_broker.address) as offload:
            heard: asyncio.Queue[dict[str, str]] = asyncio.Queue()
            topics = offload.pipeline.topics(offload.pipeline.stage[0])
            await offload.channel.transport.subscribe(
                topics.inbox("+"), lambda delivery: heard.put_nowait(dict(delivery.properties.user_properties)), qos=0
            )
            sandbox.start_sparse("stage", path, "one", "--broker", embedded_broker.address)
            await offload.request(body(1.0))
            await offload.request(body(1.0), priority="interactive")
            asked = [(await heard.get()).get("priority") for _ in range(2)]
            assert asked == ["background", None]

    asyncio.run(go())
