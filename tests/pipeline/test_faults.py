"""What fails and what holds: brokers that come and go, workers that freeze or die unseen, ways that come back."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from brokers.dispatch import SILENT_S
from brokers.errors import DeadlinePassed, NoWorker
from brokers.messages import Body
from brokers.pipeline import load_pipeline
from brokers.site import Kind, LocalBroker, start_broker
from brokers.tensors import from_numpy, to_numpy
from sources.offload import Answer, Offloader
from tests.pipeline.conftest import KINDS
from tests.support.parts import need
from tests.support.pipelines import pipeline_file, stage
from tests.support.presence import await_workers
from tests.support.processes import Machine

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
    path = pipeline_file(box.folder, [STEP, LAST])
    frozen = box.sparse("stage", path, "step", "--broker", broker.address, "--worker", "frozen")
    box.sparse("stage", path, "last", "--broker", broker.address)
    await_workers(broker.address, lambda workers: len(workers) == 2)

    async def go() -> tuple[list[Answer], int]:
        async with Offloader(load_pipeline(path), broker=broker.address, window=3) as offload:
            check([await offload.ask(body(0))])
            frozen.process.send_signal(signal.SIGSTOP)
            asking = [asyncio.create_task(offload.ask(body(index))) for index in range(3)]
            await asyncio.sleep(0.2)
            box.sparse("stage", path, "step", "--broker", broker.address, "--worker", "other")
            answers = await asyncio.gather(*asking)
            frozen.process.send_signal(signal.SIGCONT)
            async with asyncio.timeout(MENDED_S):
                while offload.counters["twins"] < 3:  # noqa: ASYNC110 - nobody tells of a counter
                    await asyncio.sleep(0.05)
            again = [await offload.ask(body(index)) for index in range(10)]
            check(again)
            return list(answers), offload.counters["results"]

    begin_s = time.monotonic()
    answers, results = asyncio.run(go())
    check(answers)
    assert {answer.hops[0].worker for answer in answers} == {"other"}
    assert results == 14
    assert time.monotonic() - begin_s < 2 * SILENT_S + MENDED_S


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
