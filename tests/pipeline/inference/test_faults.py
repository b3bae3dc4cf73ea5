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
from brokers.dispatch.presence import Birth
from brokers.dispatch.worker_pool import SILENT_S
from brokers.errors import DeadlinePassed, NoWorker
from brokers.protocol.messages import Body
from brokers.protocol.safetensors_codec import from_numpy, to_numpy
from brokers.server.local_broker import Kind, LocalBroker, start_broker
from sources.client.offloader import Answer, Offloader
from sources.inference.inference_run import _UNRECORDED_LIMIT
from tests.pipeline.conftest import KINDS
from tests.support.brokers.presence import await_workers
from tests.support.environment.external_programs import need
from tests.support.pipelines.pipeline_files import counter, pipeline_file, stage
from tests.support.pipelines.processes import PATIENCE_S, Machine, eventually

# What it may take from a fault until its last request is answered: noticing, reconnecting, a report, the work.
MENDED_S = 15.0
STEP = stage("step", "Slow", settings={"seconds": 0.02})
LAST = stage("last", "add_one")


def body(value: float) -> Body:
    return Body({"values": from_numpy(np.array(value))})


def check(answers: Sequence[Answer]) -> None:
    """Every result is that of its own request."""
    for index, answer in enumerate(answers):
        assert isinstance(answer.content, Body)
        assert float(to_numpy(answer.content.tensors["values"])) == index + 1


async def load(offload: Offloader, count: int, disturb: Callable[[int], None]) -> list[Answer]:
    """Answers to `count` requests, with `disturb` called in a thread as soon as each next one is in."""
    asking = [asyncio.create_task(offload.ask(body(index))) for index in range(count)]
    for done, finished in enumerate(asyncio.as_completed(asking), 1):
        await finished
        await asyncio.to_thread(disturb, done)
    return [task.result() for task in asking]


@pytest.mark.parametrize("kind", KINDS)
def test_a_broker_that_restarts_three_times_costs_seconds_and_no_request(box: Machine, kind: Kind) -> None:
    need({"embedded": "iotcore"}.get(kind, kind))
    path = pipeline_file(box.folder, [STEP, LAST])
    brokers = [start_broker(kind=kind)]
    address = brokers[0].address
    try:
        for name in ("step", "last"):
            box.sparse("stage", path, name, "--broker", address, "--worker", name)
        await_workers(address, lambda workers: len(workers) == 2)

        def disturb(done: int) -> None:
            if done in (20, 60, 100):
                brokers[-1].stop()
                brokers.append(start_broker(kind=kind, port=brokers[0].port))

        async def go() -> tuple[list[Answer], Offloader]:
            async with Offloader(load_pipeline(path), broker=address, window=4) as offload:
                return await load(offload, 140, disturb), offload

        begin_s = time.monotonic()
        answers, offload = asyncio.run(go())
        check(answers)
        assert offload.counters["results"] == 140
        assert time.monotonic() - begin_s < 3 * MENDED_S
    finally:
        brokers[-1].stop()


def test_a_worker_that_dies_while_the_broker_is_away_is_not_waited_for(box: Machine) -> None:
    """No will tells of it, since nobody was there to publish it."""
    need("mosquitto")
    path = pipeline_file(box.folder, [STEP, LAST])
    broker = start_broker(kind="mosquitto")
    try:
        ghost = box.sparse("stage", path, "step", "--broker", broker.address, "--worker", "ghost")
        box.sparse("stage", path, "step", "--broker", broker.address, "--worker", "living")
        box.sparse("stage", path, "last", "--broker", broker.address)
        await_workers(broker.address, lambda workers: len(workers) == 3)

        def disturb(done: int) -> None:
            nonlocal broker
            if done == 10:
                broker.stop()
                ghost.process.kill()
                broker = start_broker(kind="mosquitto", port=broker.port)

        async def go() -> list[Answer]:
            async with Offloader(load_pipeline(path), broker=broker.address, window=6) as offload:
                return await load(offload, 60, disturb)

        begin_s = time.monotonic()
        check(asyncio.run(go()))
        assert time.monotonic() - begin_s < SILENT_S + MENDED_S
    finally:
        broker.stop()


def test_the_work_of_a_frozen_worker_is_done_by_another_and_its_late_answers_change_nothing(
    box: Machine, broker: LocalBroker
) -> None:
    diary = box.folder / "diary"
    settings = {"gate": str(box.folder / "gate"), "diary": str(diary)}
    step = stage("step", executor="tests.soak.harness.numeric_chain:Gated", settings=settings)
    path = pipeline_file(box.folder, [step, LAST], name="frozen")
    frozen = box.sparse("stage", path, "step", "--broker", broker.address, "--worker", "frozen")
    box.sparse("stage", path, "last", "--broker", broker.address)
    await_workers(broker.address, lambda workers: sum("/frozen/" in topic for topic in workers) == 2)

    async def go() -> tuple[list[Answer], Offloader]:
        async with Offloader(load_pipeline(path), broker=broker.address, window=3) as offload:
            asking = [asyncio.create_task(offload.ask(body(index))) for index in range(3)]
            # One is at work, which does not end before the gate is open; the others wait behind it.
            await asyncio.to_thread(eventually, "work in hand", diary.exists)
            await asyncio.to_thread(await_workers, broker.address, lambda workers: waiting(workers) == 2)
            frozen.process.send_signal(signal.SIGSTOP)
            (box.folder / "gate").touch()
            box.sparse("stage", path, "step", "--broker", broker.address, "--worker", "other")
            answers = await asyncio.gather(*asking)
            await asyncio.to_thread(eventually, "status to miss the frozen one", lambda: lost() == {"frozen"})
            frozen.process.send_signal(signal.SIGCONT)
            async with asyncio.timeout(PATIENCE_S):
                while offload.counters["twins"] < 3:  # noqa: ASYNC110 - nobody tells of a counter
                    await asyncio.sleep(0.05)
                again: list[Answer] = []
                while not any(answer.hops[0].worker == "frozen" for answer in again):
                    again = [await offload.ask(body(index)) for index in range(3)]
                    check(again)
            await asyncio.to_thread(eventually, "status to miss nobody", lambda: lost() == set())
            return list(answers), offload

    def lost() -> set[str]:
        """Who is lost, says `sparse status`; all others are up."""
        found = box.sparse("status", path, "--broker", broker.address, "--json").end().answer["workers"]
        assert {worker["state"] for worker in found} == {"up"}
        return {worker["worker"] for worker in found if worker["lost"]}

    answers, offload = asyncio.run(go())
    check(answers)
    assert {answer.hops[0].worker for answer in answers} == {"other"}
    assert offload.counters["results"] == offload.counters["requests"]


def waiting(workers: dict[str, Birth]) -> int:
    """How many tasks wait at the worker that will be frozen."""
    return sum(birth.load.queue for birth in workers.values() if birth.worker == "frozen")


def test_a_worker_whose_queue_expires_while_nothing_can_be_sent_on_lives(box: Machine, embedded: LocalBroker) -> None:
    """Two answers wait for a worker of the next stage, so nothing is computed; meanwhile all else is late, and goes."""
    path = pipeline_file(box.folder, [stage("step", "double", max_batch=8), LAST], name="late")
    lonely = box.sparse("stage", path, "step", "--broker", embedded.address, "--worker", "lonely")
    await_workers(embedded.address, lambda workers: any("/late/" in topic for topic in workers))

    async def go() -> float:
        async with Offloader(load_pipeline(path), broker=embedded.address, window=8) as offload:
            asking = [asyncio.create_task(offload.ask(body(0), deadline_ms=5000)) for _ in range(2)]
            await asyncio.to_thread(await_workers, embedded.address, lambda workers: told(workers, "done") == 2)
            asking += [asyncio.create_task(offload.ask(body(0), deadline_ms=1000)) for _ in range(3)]
            errors = await asyncio.gather(*asking, return_exceptions=True)
            assert all(isinstance(error, DeadlinePassed) for error in errors), errors
            await asyncio.to_thread(await_workers, embedded.address, lambda workers: told(workers, "failed") >= 5)
            box.sparse("stage", path, "last", "--broker", embedded.address)
            answer = await offload.ask(body(1))
            assert isinstance(answer.content, Body)
            return float(to_numpy(answer.content.tensors["values"]))

    def told(workers: dict[str, Birth], count: str) -> int:
        """What the worker says of itself; nothing once it has died."""
        return sum(getattr(birth.load, count) for birth in workers.values() if birth.worker == "lonely")

    assert asyncio.run(go()) == 3
    assert lonely.process.poll() is None, lonely.said()


def test_a_deadline_holds_while_the_broker_is_away(box: Machine) -> None:
    path = pipeline_file(box.folder, [STEP])
    broker = start_broker()
    box.sparse("stage", path, "step", "--broker", broker.address)
    await_workers(broker.address, lambda workers: len(workers) == 1)

    async def go() -> float:
        async with Offloader(load_pipeline(path), broker=broker.address) as offload:
            await offload.ask(body(0))
            await asyncio.to_thread(broker.stop)
            await asyncio.sleep(0.1)
            begin_s = time.monotonic()
            # Which of the two depends on whether the broker still told of the worker's end.
            with pytest.raises((DeadlinePassed, NoWorker)):
                await offload.ask(body(0), deadline_ms=1000)
            return time.monotonic() - begin_s

    try:
        assert 0.9 < asyncio.run(go()) < 5
    finally:
        broker.stop()


def test_a_large_message_may_pass_one_worker_twice(box: Machine, embedded: LocalBroker) -> None:
    """A detour that comes back: the second pass is no twin of the first, though all but its chunks' name are alike."""
    path = pipeline_file(box.folder, [stage("there", "Boomerang"), stage("back", "Boomerang")])
    for name in ("there", "back"):
        box.sparse("stage", path, name, "--broker", embedded.address)
    await_workers(embedded.address, lambda workers: len(workers) >= 2)

    async def go() -> Answer:
        async with Offloader(load_pipeline(path), broker=embedded.address) as offload:
            content = Body({"values": from_numpy(np.zeros(1 << 18))})  # 2 MiB: four chunks
            return await offload.ask(content, deadline_ms=20_000)

    answer = asyncio.run(go())
    assert [hop.stage for hop in answer.hops] == ["there", "back", "there", "back"]


def test_a_worker_that_hangs_holds_up_no_other_frame_of_a_live_source(box: Machine, embedded: LocalBroker) -> None:
    source = counter(1_000_000, every_s=0.01, live=True)
    path = pipeline_file(box.folder, [STEP], source, name="lively")
    hangs = box.sparse("stage", path, "step", "--broker", embedded.address, "--worker", "hangs")
    box.sparse("stage", path, "step", "--broker", embedded.address, "--worker", "works")
    await_workers(embedded.address, lambda workers: sum("/lively/" in topic for topic in workers) == 2)
    feed = box.sparse("source", path, "--broker", embedded.address, "--json", "--out", box.folder / "out")
    results = box.folder / "out" / "results.jsonl"

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
    assert feed.end(signal.SIGTERM).status == 0
