"""What fails and what holds: brokers that come and go, workers that freeze or die unseen, ways that come back."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from brokers.errors import DeadlinePassed, NoWorker
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_numpy, to_numpy
from brokers.server.local_broker import BrokerKind, LocalBroker, start_broker
from sources.client.offloader import Offloader
from sources.client.pending_request import PendingRequest
from sources.inference.inference_run import _UNRECORDED_LIMIT
from tests.pipeline.conftest import BROKER_KINDS
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S, ProcessSandbox, eventually

# What it may take from a fault until its last request is answered: noticing, reconnecting, a report, the work.
MENDED_S = 15.0
STEP = stage_table("step", "SleepExecutor", settings={"seconds": 0.02})
LAST = stage_table("last", "add_one")


def body(value: float) -> TensorContent:
    return TensorContent({"values": from_numpy(np.array(value))})


def check(answers: Sequence[PendingRequest]) -> None:
    """Every result is that of its own request."""
    for index, answer in enumerate(answers):
        assert isinstance(answer.result.content, TensorContent)
        assert float(to_numpy(answer.result.content.tensors["values"])) == index + 1


async def load(offload: Offloader, count: int, disturb: Callable[[int], None]) -> list[PendingRequest]:
    """Answers to `count` requests, with `disturb` called in a thread as soon as each next one is in."""
    asking = [asyncio.create_task(offload.request(body(index))) for index in range(count)]
    for done, finished in enumerate(asyncio.as_completed(asking), 1):
        await finished
        await asyncio.to_thread(disturb, done)
    return [task.result() for task in asking]


@pytest.mark.parametrize("kind", BROKER_KINDS)
def test_a_broker_that_restarts_three_times_costs_seconds_and_no_request(
    sandbox: ProcessSandbox, kind: BrokerKind
) -> None:
    require_dependency({"embedded": "iotcore"}.get(kind, kind))
    path = write_pipeline_file(sandbox.folder, [STEP, LAST])
    brokers = [start_broker(kind=kind)]
    address = brokers[0].address
    try:
        for name in ("step", "last"):
            sandbox.start_sparse("stage", path, name, "--broker", address, "--worker", name)
        wait_for_workers(address, lambda workers: len(workers) == 2)

        def disturb(done: int) -> None:
            if done in (20, 60, 100):
                brokers[-1].stop()
                brokers.append(start_broker(kind=kind, port=brokers[0].port))

        async def go() -> tuple[list[PendingRequest], Offloader]:
            async with Offloader(load_pipeline(path), broker=address, window=4) as offload:
                return await load(offload, 140, disturb), offload

        begin_s = time.monotonic()
        answers, offload = asyncio.run(go())
        check(answers)
        assert offload.counters["results"] == 140
        assert time.monotonic() - begin_s < 3 * MENDED_S
    finally:
        brokers[-1].stop()


def test_a_worker_that_dies_while_the_broker_is_away_is_not_waited_for(sandbox: ProcessSandbox) -> None:
    """No will tells of it, since nobody was there to publish it."""
    require_dependency("mosquitto")
    path = write_pipeline_file(sandbox.folder, [STEP, LAST])
    broker = start_broker(kind="mosquitto")
    try:
        ghost = sandbox.start_sparse("stage", path, "step", "--broker", broker.address, "--worker", "ghost")
        sandbox.start_sparse("stage", path, "step", "--broker", broker.address, "--worker", "living")
        sandbox.start_sparse("stage", path, "last", "--broker", broker.address)
        wait_for_workers(broker.address, lambda workers: len(workers) == 3)

        def disturb(done: int) -> None:
            nonlocal broker
            if done == 10:
                broker.stop()
                ghost.process.kill()
                broker = start_broker(kind="mosquitto", port=broker.port)

        async def go() -> list[PendingRequest]:
            async with Offloader(load_pipeline(path), broker=broker.address, window=6) as offload:
                return await load(offload, 60, disturb)

        begin_s = time.monotonic()
        check(asyncio.run(go()))
        assert time.monotonic() - begin_s < PRESENCE_TIMEOUT_S + MENDED_S
    finally:
        broker.stop()


def test_the_work_of_a_frozen_worker_is_done_by_another_and_its_late_answers_change_nothing(
    sandbox: ProcessSandbox, broker: LocalBroker
) -> None:
    diary = sandbox.folder / "diary"
    settings = {"gate": str(sandbox.folder / "gate"), "diary": str(diary)}
    step = stage_table("step", executor="tests.soak.harness.numeric_chain:GatedExecutor", settings=settings)
    path = write_pipeline_file(sandbox.folder, [step, LAST], name="frozen")
    frozen = sandbox.start_sparse("stage", path, "step", "--broker", broker.address, "--worker", "frozen")
    sandbox.start_sparse("stage", path, "last", "--broker", broker.address)
    wait_for_workers(broker.address, lambda workers: sum("/frozen/" in topic for topic in workers) == 2)

    async def go() -> tuple[list[PendingRequest], Offloader]:
        async with Offloader(load_pipeline(path), broker=broker.address, window=3) as offload:
            asking = [asyncio.create_task(offload.request(body(index))) for index in range(3)]
            # One is at work, which does not end before the gate is open; the others wait behind it.
            await asyncio.to_thread(eventually, "work in hand", diary.exists)
            await asyncio.to_thread(wait_for_workers, broker.address, lambda workers: waiting(workers) == 2)
            frozen.process.send_signal(signal.SIGSTOP)
            (sandbox.folder / "gate").touch()
            sandbox.start_sparse("stage", path, "step", "--broker", broker.address, "--worker", "other")
            answers = await asyncio.gather(*asking)
            await asyncio.to_thread(eventually, "status to miss the frozen one", lambda: lost() == {"frozen"})
            frozen.process.send_signal(signal.SIGCONT)
            async with asyncio.timeout(PROCESS_TIMEOUT_S):
                while offload.counters["duplicates"] < 3:  # noqa: ASYNC110 - nobody tells of a counter
                    await asyncio.sleep(0.05)
                again: list[PendingRequest] = []
                while not any(answer.result.hops[0].worker == "frozen" for answer in again):
                    again = [await offload.request(body(index)) for index in range(3)]
                    check(again)
            await asyncio.to_thread(eventually, "status to miss nobody", lambda: lost() == set())
            return list(answers), offload

    def lost() -> set[str]:
        """Who is lost, says `sparse status`; all others are up."""
        found = sandbox.start_sparse("status", path, "--broker", broker.address, "--json").wait().json_output["workers"]
        assert {worker["state"] for worker in found} == {"up"}
        return {worker["worker"] for worker in found if worker["lost"]}

    answers, offload = asyncio.run(go())
    check(answers)
    assert {answer.result.hops[0].worker for answer in answers} == {"other"}
    assert offload.counters["results"] == offload.counters["requests"]


def waiting(workers: dict[str, WorkerRecord]) -> int:
    """How many tasks wait at the worker that will be frozen."""
    return sum(birth.load.queue for birth in workers.values() if birth.worker == "frozen")


def test_a_worker_whose_queue_expires_while_nothing_can_be_sent_on_lives(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    """Two answers wait for a worker of the next stage, so nothing is computed; meanwhile all else is late, and goes."""
    path = write_pipeline_file(sandbox.folder, [stage_table("step", "double", max_batch=8), LAST], name="late")
    lonely = sandbox.start_sparse("stage", path, "step", "--broker", embedded_broker.address, "--worker", "lonely")
    wait_for_workers(embedded_broker.address, lambda workers: any("/late/" in topic for topic in workers))

    async def go() -> float:
        async with Offloader(load_pipeline(path), broker=embedded_broker.address, window=8) as offload:
            asking = [asyncio.create_task(offload.request(body(0), deadline_ms=5000)) for _ in range(2)]
            await asyncio.to_thread(
                wait_for_workers, embedded_broker.address, lambda workers: told(workers, "done") == 2
            )
            asking += [asyncio.create_task(offload.request(body(0), deadline_ms=1000)) for _ in range(3)]
            errors = await asyncio.gather(*asking, return_exceptions=True)
            assert all(isinstance(error, DeadlinePassed) for error in errors), errors
            await asyncio.to_thread(
                wait_for_workers, embedded_broker.address, lambda workers: told(workers, "failed") >= 5
            )
            sandbox.start_sparse("stage", path, "last", "--broker", embedded_broker.address)
            answer = await offload.request(body(1))
            assert isinstance(answer.result.content, TensorContent)
            return float(to_numpy(answer.result.content.tensors["values"]))

    def told(workers: dict[str, WorkerRecord], count: str) -> int:
        """What the worker says of itself; nothing once it has died."""
        return sum(getattr(birth.load, count) for birth in workers.values() if birth.worker == "lonely")

    assert asyncio.run(go()) == 3
    assert lonely.process.poll() is None, lonely.read_stderr()


def test_a_deadline_holds_while_the_broker_is_away(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, [STEP])
    broker = start_broker()
    sandbox.start_sparse("stage", path, "step", "--broker", broker.address)
    wait_for_workers(broker.address, lambda workers: len(workers) == 1)

    async def go() -> float:
        async with Offloader(load_pipeline(path), broker=broker.address) as offload:
            await offload.request(body(0))
            await asyncio.to_thread(broker.stop)
            await asyncio.sleep(0.1)
            begin_s = time.monotonic()
            # Which of the two depends on whether the broker still told of the worker's end.
            with pytest.raises((DeadlinePassed, NoWorker)):
                await offload.request(body(0), deadline_ms=1000)
            return time.monotonic() - begin_s

    try:
        assert 0.9 < asyncio.run(go()) < 5
    finally:
        broker.stop()


def test_a_large_message_may_pass_one_worker_twice(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    """A detour that comes back: the second pass is no twin of the first, though all but its chunks' name are alike."""
    path = write_pipeline_file(
        sandbox.folder, [stage_table("there", "LoopbackExecutor"), stage_table("back", "LoopbackExecutor")]
    )
    for name in ("there", "back"):
        sandbox.start_sparse("stage", path, name, "--broker", embedded_broker.address)
    wait_for_workers(embedded_broker.address, lambda workers: len(workers) >= 2)

    async def go() -> PendingRequest:
        async with Offloader(load_pipeline(path), broker=embedded_broker.address) as offload:
            content = TensorContent({"values": from_numpy(np.zeros(1 << 18))})  # 2 MiB: four chunks
            return await offload.request(content, deadline_ms=20_000)

    answer = asyncio.run(go())
    assert [hop.stage for hop in answer.result.hops] == ["there", "back", "there", "back"]


def test_a_worker_that_hangs_holds_up_no_other_frame_of_a_live_source(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    source = counting_source_table(1_000_000, every_s=0.01, live=True)
    path = write_pipeline_file(sandbox.folder, [STEP], source, name="lively")
    hangs = sandbox.start_sparse("stage", path, "step", "--broker", embedded_broker.address, "--worker", "hangs")
    sandbox.start_sparse("stage", path, "step", "--broker", embedded_broker.address, "--worker", "works")
    wait_for_workers(embedded_broker.address, lambda workers: sum("/lively/" in topic for topic in workers) == 2)
    feed = sandbox.start_sparse(
        "source", path, "--broker", embedded_broker.address, "--json", "--out", sandbox.folder / "out"
    )
    results = sandbox.folder / "out" / "results.jsonl"

    def rows() -> list[dict[str, Any]]:
        said = results.read_text() if results.exists() else ""
        return [json.loads(line) for line in said.splitlines(keepends=True) if line.endswith("\n")]

    eventually("results", lambda: len(rows()) >= 30)
    hangs.process.send_signal(signal.SIGSTOP)
    before = len(rows())

    def was_overtaken() -> bool:
        """By many later frames, and done by the other worker in the end: what hung. (A busy machine delays others.)"""
        found = rows()
        again = [place for place, row in enumerate(found) if place >= before and row["attempts"] > 1]
        overtaken_by = (sum(row["index"] > found[place]["index"] for row in found[:place]) for place in again)
        return any(count > 2 * _UNRECORDED_LIMIT for count in overtaken_by)

    eventually("the frames that hung, after many later ones", was_overtaken)
    assert feed.wait(signal.SIGTERM).returncode == 0
