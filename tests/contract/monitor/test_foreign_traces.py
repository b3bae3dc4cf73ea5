"""Distributed traces through Mosquitto: a client's trace continues through all stages as a chain of parents."""

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
from sources.inputs.source import SampleBuffer
from stages.executor import FunctionExecutor
from stages.worker.inference_worker import InferenceWorker
from stages.worker.worker_context import WorkerContext
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.foreign_client import ForeignClient
from tests.support.environment.external_programs import require_dependency
from tests.support.monitor.fake_monitor import FakeMonitor, monitor_socket_path
from tests.support.pipelines.processes import eventually

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
STAGES = ("first", "second", "third")
TASKS_TOPIC = "sparse/local/room/first/tasks"
RESULTS_TOPIC = "results/foreign"


def double(x: np.ndarray[Any, np.dtype[Any]]) -> dict[str, Any]:
    return {"x": 2 * x}


@pytest.fixture(scope="module", name="address")
def _address() -> Iterator[str]:
    require_dependency("mosquitto")
    with start_broker(kind="mosquitto") as broker:
        yield broker.address


@pytest.fixture(name="monitor")
def _monitor(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMonitor]:
    """Receives the events of all workers and sources."""
    with monitor_socket_path() as path, FakeMonitor(path) as fake:
        monkeypatch.setenv("SPARSE_MONITOR", str(path))
        yield fake


@pytest.fixture(name="pipeline")
def _pipeline(tmp_path: Path) -> Pipeline:
    file = tmp_path / "room.toml"
    stages = "".join(f'[[stage]]\nname = "{name}"\nexecutor = "m:f"\n' for name in STAGES)
    file.write_text(f'[pipeline]\nname = "room"\n{stages}', encoding="utf-8")
    return load_pipeline(file)


@asynccontextmanager
async def serving(address: str, pipeline: Pipeline, monitor: FakeMonitor) -> AsyncIterator[None]:
    """A worker for each stage that sends its events to the monitor."""
    with ExitStack() as clients:
        workers = []
        for stage in pipeline.stage:
            labels = {"stage": stage.name, "worker": stage.name}
            events = clients.enter_context(EventClient(monitor.path, "stage", stage.name, {}, labels))
            context = WorkerContext(pipeline, stage, stage.name, events=events)
            workers.append(InferenceWorker(MqttTransport(address), context, FunctionExecutor(double)))
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


def task_events(monitor: FakeMonitor, count: int) -> list[list[TaskProcessed]]:
    """The workers' events for `count` requests: for each request, its tasks by stage."""

    def received() -> list[TaskProcessed]:
        return [event for event in monitor.events if isinstance(event, TaskProcessed)]

    eventually("all tasks", lambda: len(received()) == count * len(STAGES))
    requests = dict.fromkeys(task.request for task in received())
    by_stage = {(task.request, task.stage): task for task in received()}
    return [[by_stage[request, stage] for stage in STAGES] for request in requests]


def assert_chain(chain: list[TaskProcessed], trace: str, parent: str) -> None:
    assert {task.trace for task in chain} == {trace}
    assert [task.parent for task in chain] == [parent, *(task.span for task in chain[:-1])]
    assert len({parent, *(task.span for task in chain)}) == len(chain) + 1


def test_client_is_the_parent_of_its_tasks(address: str, pipeline: Pipeline, monitor: FakeMonitor) -> None:
    def send_task(user: dict[str, str]) -> None:
        with ForeignClient(address, [(RESULTS_TOPIC, 1)]) as client:
            client.publish(TASKS_TOPIC, b'{"x": 1}', response_topic=RESULTS_TOPIC, user_properties=user)
            assert json.loads(client.receive().payload)["values"] == {"x": 8.0}

    async def test() -> None:
        async with serving(address, pipeline, monitor):
            for user in ({"traceparent": PARENT}, {"traceparent": PARENT.upper()}, {}):
                await asyncio.to_thread(send_task, user)

    run_async(test())
    traced, invalid, untraced = task_events(monitor, 3)
    assert_chain(traced, TRACE, SPAN)
    for chain in (invalid, untraced):  # they have the request id as their trace
        assert_chain(chain, chain[0].request, "")


def test_publisher_of_a_frame_is_the_parent_of_its_request(
    address: str, pipeline: Pipeline, monitor: FakeMonitor
) -> None:
    def publish_frame() -> None:
        with ForeignClient(address, [("sparse/local/results/door", 1)]) as client:
            client.publish("sparse/local/ingress/door", b'{"x": 1}', user_properties={"traceparent": PARENT})
            assert json.loads(client.receive().payload)["values"] == {"x": 8.0}

    async def test() -> None:
        async with serving(address, pipeline, monitor), Offloader(pipeline, broker=address) as offloader:
            samples = SampleBuffer("all")
            run = InferenceRun(offloader, samples)
            gateway = IngressGateway(offloader.channel.transport, "local", samples, run.reject)
            await gateway.start()
            running = asyncio.create_task(run.run(), name="run")
            await asyncio.to_thread(publish_frame)
            await gateway.drain()
            await running

    run_async(test())
    [chain] = task_events(monitor, 1)
    [done] = [event for event in monitor.events if isinstance(event, RequestDone)]
    assert (done.trace, done.parent) == (TRACE, SPAN)
    assert_chain(chain, TRACE, done.span)
