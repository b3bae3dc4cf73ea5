"""A trace through Mosquitto: what a client of any language begins goes through all stages, as a chain of parents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.mqtt.client import MqttTransport
from brokers.server.local_broker import start_broker
from brokers.telemetry.client import EventClient
from brokers.telemetry.schema import RequestDone, TaskProcessed
from sources.client.offloader import Offloader
from sources.inference.inference_run import InferenceRun
from sources.inputs.ingress import IngressGateway
from sources.inputs.sample_buffer import SampleBuffer
from stages.executor import FunctionExecutor
from stages.worker.worker import InferenceWorker
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.foreign_client import ForeignClient
from tests.support.environment.external_programs import require_dependency
from tests.support.monitor.fake_monitor import FakeMonitor, monitor_socket_path
from tests.support.pipelines.processes import eventually

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
STAGES = ("first", "second", "third")
DOOR = "sparse/local/room/first/tasks"
ANSWERS = "answers/stranger"


def double(x: np.ndarray[Any, np.dtype[Any]]) -> dict[str, Any]:
    return {"x": 2 * x}


@pytest.fixture(scope="module", name="address")
def _address() -> Iterator[str]:
    require_dependency("mosquitto")
    with start_broker(kind="mosquitto") as broker:
        yield broker.address


@pytest.fixture(name="monitor")
def _monitor(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMonitor]:
    """A socket that plays the monitor."""
    with monitor_socket_path() as path, FakeMonitor(path) as found:
        monkeypatch.setenv("SPARSE_MONITOR", str(path))
        yield found


@pytest.fixture(name="pipeline")
def _pipeline(tmp_path: Path) -> Pipeline:
    file = tmp_path / "room.toml"
    stages = "".join(f'[[stage]]\nname = "{name}"\nexecutor = "m:f"\n' for name in STAGES)
    file.write_text(f'[pipeline]\nname = "room"\n{stages}', encoding="utf-8")
    return load_pipeline(file)


@asynccontextmanager
async def serving(address: str, pipeline: Pipeline, monitor: FakeMonitor) -> AsyncIterator[None]:
    """A worker at each stage, which tells what it does."""
    with ExitStack() as clients:
        workers = []
        for stage in pipeline.stage:
            names = {"stage": stage.name, "worker": stage.name}
            events = clients.enter_context(EventClient(monitor.path, "stage", stage.name, {}, names))
            workers.append(
                InferenceWorker(
                    MqttTransport(address), pipeline, stage, FunctionExecutor(double), stage.name, "cpu", events
                )
            )
        for worker in workers:
            await worker.start()
        running = [asyncio.create_task(worker.run(), name="serve") for worker in workers]
        try:
            yield
        finally:
            for worker in workers:
                await worker.drain()
            await asyncio.gather(*running)
            for worker in workers:
                await worker.stop()


def tasks(monitor: FakeMonitor, count: int) -> list[list[TaskProcessed]]:
    """What the workers said of so many requests: for each, its tasks by stage."""

    def found() -> list[TaskProcessed]:
        return [event for event in monitor.events if isinstance(event, TaskProcessed)]

    eventually("all tasks", lambda: len(found()) == count * len(STAGES))
    requests = dict.fromkeys(task.request for task in found())
    by_stage = {(task.request, task.stage): task for task in found()}
    return [[by_stage[request, stage] for stage in STAGES] for request in requests]


def assert_chain(chain: list[TaskProcessed], trace: str, parent: str) -> None:
    assert {task.trace for task in chain} == {trace}
    assert [task.parent for task in chain] == [parent, *(task.span for task in chain[:-1])]
    assert len({parent, *(task.span for task in chain)}) == len(chain) + 1


def test_a_foreign_client_is_the_parent_of_what_is_done_for_it(
    address: str, pipeline: Pipeline, monitor: FakeMonitor
) -> None:
    def ask(user: dict[str, str]) -> None:
        with ForeignClient(address, [(ANSWERS, 1)]) as me:
            me.publish(DOOR, b'{"x": 1}', response_topic=ANSWERS, user_properties=user)
            assert json.loads(me.receive().payload)["values"] == {"x": 8.0}

    async def whole() -> None:
        async with serving(address, pipeline, monitor):
            for user in ({"traceparent": PARENT}, {"traceparent": PARENT.upper()}, {}):
                await asyncio.to_thread(ask, user)

    run_async(whole())
    traced, broken, bare = tasks(monitor, 3)
    assert_chain(traced, TRACE, SPAN)
    for chain in (broken, bare):  # a trace of its own, as good as with none
        assert_chain(chain, chain[0].request, "")


def test_a_camera_is_the_parent_of_the_request_that_its_frame_becomes(
    address: str, pipeline: Pipeline, monitor: FakeMonitor
) -> None:
    def publish() -> None:
        with ForeignClient(address, [("sparse/local/results/door", 1)]) as me:
            me.publish("sparse/local/ingress/door", b'{"x": 1}', user_properties={"traceparent": PARENT})
            assert json.loads(me.receive().payload)["values"] == {"x": 8.0}

    async def whole() -> None:
        async with serving(address, pipeline, monitor), Offloader(pipeline, broker=address) as offloader:
            intake = SampleBuffer("all")
            feed = InferenceRun(offloader, intake)
            gateway = IngressGateway(offloader.channel.transport, "local", intake, feed.reject)
            await gateway.start()
            feeding = asyncio.create_task(feed.run(), name="feed")
            await asyncio.to_thread(publish)
            await gateway.drain()
            await feeding

    run_async(whole())
    [chain] = tasks(monitor, 1)
    [done] = [event for event in monitor.events if isinstance(event, RequestDone)]
    assert (done.trace, done.parent) == (TRACE, SPAN)
    assert_chain(chain, TRACE, done.span)
