"""The life of a worker: it drains when told to leave, is missed when it dies, does not join where it does not fit."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
from typing import Any

import numpy as np
import psutil

from brokers.config.pipeline_file import load_pipeline
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from brokers.server.local_broker import LocalBroker
from sources.client.offloader import Offloader
from sources.client.pending_request import PendingRequest
from tests.support.brokers.presence import wait_for_workers, watch_workers
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually

SLOW = stage_table("slow", "SleepExecutor", settings={"seconds": 0.1})


def test_a_worker_that_is_told_to_leave_finishes_what_it_holds(sandbox: ProcessSandbox, broker: LocalBroker) -> None:
    path = write_pipeline_file(sandbox.folder, [SLOW])
    leaver = sandbox.start_sparse("stage", path, "slow", "--broker", broker.address, "--worker", "leaver")
    wait_for_workers(broker.address, lambda workers: len(workers) == 1)

    async def go() -> tuple[list[PendingRequest], list[str]]:
        loop = asyncio.get_running_loop()
        watching = asyncio.create_task(watch_workers(broker.address, _left()))
        async with Offloader(load_pipeline(path), broker=broker.address, window=3) as offload:
            content = TensorContent({"values": from_numpy(np.array(1.0))})
            asking = [asyncio.create_task(offload.request(content)) for _ in range(3)]
            await asyncio.sleep(0.05)  # all three are in its hands: its capacity is three
            leaver.process.send_signal(signal.SIGTERM)
            answers = await asyncio.gather(*asking)
            said = await loop.run_in_executor(None, leaver.wait)
            assert said.returncode == 0, said.stderr
            assert offload.counters["retries"] == 0
        states: list[str] = [next(iter(workers.values())).state for workers in await watching if workers]
        return answers, states

    answers, states = asyncio.run(go())
    assert {answer.result.hops[0].worker for answer in answers} == {"leaver"}
    assert list(dict.fromkeys(states)) == ["up", "draining", "stopped"]
    sandbox.assert_nothing_left()


def test_requests_of_a_worker_that_leaves_go_to_another(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    """Rolling over all workers of a stage under load: each request is answered once, whoever leaves."""
    path = write_pipeline_file(sandbox.folder, [SLOW])
    old = sandbox.start_sparse("stage", path, "slow", "--broker", embedded_broker.address, "--worker", "old")
    wait_for_workers(embedded_broker.address, lambda workers: len(workers) == 1)

    async def go() -> list[PendingRequest]:
        async with Offloader(load_pipeline(path), broker=embedded_broker.address, window=6) as offload:
            content = TensorContent({"values": from_numpy(np.array(1.0))})
            asking = [asyncio.create_task(offload.request(content)) for _ in range(20)]
            await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            old.process.send_signal(signal.SIGTERM)
            sandbox.start_sparse("stage", path, "slow", "--broker", embedded_broker.address, "--worker", "new")
            answers = await asyncio.gather(*asking)
            assert offload.counters["results"] == 20
            return list(answers)

    answers = asyncio.run(go())
    assert {answer.result.hops[0].worker for answer in answers} == {"old", "new"}


def test_a_run_starts_a_killed_worker_again_and_loses_nothing(sandbox: ProcessSandbox, broker: LocalBroker) -> None:
    stages = [
        stage_table(name, "SleepExecutor", settings={"seconds": seconds})
        for name, seconds in (("first", 0.02), ("slow", 0.05))
    ]
    # Results are written in order: one that waits for its second attempt holds back up to a window of later ones, so
    # the count may leap. There are enough that the run is far from its end at the last kill.
    path = write_pipeline_file(
        sandbox.folder, [*stages, stage_table("last", "add_one")], counting_source_table(150, window=9)
    )
    out = sandbox.folder / "out"
    run = sandbox.start_sparse("run", path, "--broker", broker.address, "--json", "--out", out)
    results = out / "results.jsonl"

    def recorded() -> int:
        assert run.process.poll() is None, f"it ended too soon: {run.read_stderr()}"
        return results.read_text().count("\n") if results.exists() else 0

    for count, name in ((5, "slow-1"), (10, "first-1"), (15, "last-1"), (20, "first-1")):
        eventually("more results", lambda count=count: recorded() >= count)  # type: ignore[misc]
        killed = eventually(f"worker {name}", lambda name=name: recorded() and sandbox.find_process("--worker", name))  # type: ignore[misc]
        assert isinstance(killed, psutil.Process)
        killed.kill()
    said = run.wait()
    summary = said.json_output
    assert said.returncode == 0, said.stderr
    assert (summary["requests"], summary["results"], summary["lost"], summary["failed"]) == (150, 150, 0, 0)
    assert summary["retries"] >= 2
    assert summary["elapsed_s"] < 45  # it is their last wills that tell: a lease would take 60 s
    assert summary["stages"]["slow"]["tasks"] == 150
    assert results.read_text().count("\n") == 150
    sandbox.assert_nothing_left()


def test_a_worker_with_another_model_is_refused(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    factory = "tests.support.training.factories:tiny_network"
    file = write_pipeline_file(sandbox.folder, [{"name": "head"}, {"name": "tail"}], model=factory, cuts=[2])
    (sandbox.folder / "other").mkdir()
    seed = write_pipeline_file(
        sandbox.folder / "other", [{"name": "head"}, {"name": "tail"}], model=factory, cuts=[2], seed=1
    )
    first = sandbox.start_sparse("stage", file, "head", "--broker", embedded_broker.address, "--worker", "first")
    wait_for_workers(embedded_broker.address, lambda workers: any(topic.endswith("/first") for topic in workers))
    twin = sandbox.start_sparse("stage", file, "head", "--broker", embedded_broker.address, "--worker", "twin")
    other = sandbox.start_sparse("stage", seed, "head", "--broker", embedded_broker.address, "--worker", "other")
    said = other.wait()
    assert said.returncode == 2
    line = r"sparse: worker 'other' cannot join: worker '(first|twin)' serves stage 'head' with the model"
    assert re.match(line, said.stderr), said.stderr
    assert said.stderr.count("\n") == 1
    workers = wait_for_workers(
        embedded_broker.address, lambda workers: any(topic.endswith("/twin") for topic in workers)
    )
    assert not any(topic.endswith("/other") for topic in workers)
    assert first.wait(signal.SIGINT).returncode == 130
    assert twin.wait(signal.SIGTERM).returncode == 0
    sandbox.assert_nothing_left()


def test_the_failures_of_a_worker_are_counted_where_anybody_sees_them(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("reject_negative", "reject_negative")], name="counted")
    sandbox.start_sparse("stage", path, "reject_negative", "--broker", embedded_broker.address)

    async def go() -> None:
        async with Offloader(load_pipeline(path), broker=embedded_broker.address) as offload:
            asking = (offload(np.array(value)) for value in (1.0, -1.0, -2.0))
            await asyncio.gather(*asking, return_exceptions=True)

    asyncio.run(go())

    def loads() -> dict[str, Any] | None:
        found = sandbox.start_sparse("status", path, "--broker", embedded_broker.address, "--json").wait().json_output
        (worker,) = found["workers"]
        load: dict[str, Any] = worker["load"]
        return load if load["done"] == 3 else None

    load = eventually("the report of three tasks", loads)
    assert load is not None
    assert (load["failed"], load["refused"]) == (2, 0)


def _left() -> Any:
    """A condition that holds once somebody has been there and has gone."""
    seen = threading.Event()

    def left(workers: dict[str, Any]) -> bool:
        if workers:
            seen.set()
        return seen.is_set() and not workers

    return left
