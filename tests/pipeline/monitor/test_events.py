"""Events that workers and sources send to the monitor, from processes connected by a broker.

A socket of the test stands in for the monitor: tests/support/monitor/fake_monitor.py.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.server.local_broker import LocalBroker
from brokers.telemetry.schema import (
    BatchProcessed,
    ProcessStarted,
    ProcessStopped,
    RequestDone,
    StepDone,
    TaskProcessed,
)
from sources.client.offloader import Offloader
from tests.soak.harness.training_run import MICRO_BATCHES, STEPS_PER_EPOCH, write_training_pipeline_file
from tests.support.brokers.presence import wait_for_workers
from tests.support.monitor.fake_monitor import FakeMonitor, monitor_socket_path
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually


@pytest.fixture(name="monitor")
def _monitor(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMonitor]:
    """The monitor of this process and, with `environment_of`, of others."""
    with monitor_socket_path() as path, FakeMonitor(path) as monitor:
        for name, value in environment_of(path).items():
            monkeypatch.setenv(name, value)
        yield monitor


def environment_of(path: Path) -> dict[str, str]:
    return {"SPARSE_MONITOR": str(path), "SPARSE_RUN": "r7"}


def start_workers(
    sandbox: ProcessSandbox, broker: LocalBroker, pipeline: Pipeline, path: Path, *options: str
) -> list[RunningCommand]:
    """Start a worker for each stage, `NAME1`, and wait until they are up."""
    arguments = [
        ("stage", pipeline.path, stage.name, "--broker", broker.address, "--worker", f"{stage.name}1", *options)
        for stage in pipeline.stage
    ]
    workers = [sandbox.start_sparse(*each, environment=environment_of(path)) for each in arguments]
    wait_for_workers(broker.address, lambda records: len(records) == len(workers))
    return workers


def stop_workers(workers: list[RunningCommand]) -> None:
    for worker in workers:
        assert worker.wait(signal.SIGTERM).returncode == 0


def tasks_of(monitor: FakeMonitor, stage: str) -> list[TaskProcessed]:
    return [event for event in list(monitor.events) if isinstance(event, TaskProcessed) and event.stage == stage]


def batches_of(monitor: FakeMonitor, stage: str) -> list[BatchProcessed]:
    return [event for event in list(monitor.events) if isinstance(event, BatchProcessed) and event.stage == stage]


def requests_of(monitor: FakeMonitor) -> list[RequestDone]:
    return [event for event in list(monitor.events) if isinstance(event, RequestDone)]


def test_events_of_inference_are_consistent(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, monitor: FakeMonitor
) -> None:
    # A batch waits until it is full: the number of requests is a multiple of its size.
    stages = [stage_table(name, "BatchableExecutor", max_batch=4, max_wait_ms=60_000) for name in ("head", "tail")]
    pipeline = load_pipeline(write_pipeline_file(sandbox.folder, stages))
    count = 24

    async def send_requests() -> None:
        async with Offloader(pipeline, broker=embedded_broker.address, name="me", window=8) as offload:
            await asyncio.gather(*(offload({"rows": np.full((1, 3), float(index))}) for index in range(count)))

    workers = start_workers(sandbox, embedded_broker, pipeline, monitor.path)
    asyncio.run(send_requests())
    stop_workers(workers)
    eventually("three processes to exit", lambda: len(monitor.events_of_kind("stop")) == 3)
    processes = {("stage", "head1"), ("stage", "tail1"), ("source", "me")}
    for kind in (ProcessStarted, ProcessStopped):
        lifecycle_events = [event for event in monitor.events if isinstance(event, kind)]
        assert len(lifecycle_events) == len(processes)
        assert {(event.role, event.name) for event in lifecycle_events} == processes
        assert {(event.run, event.site, event.pipeline) for event in lifecycle_events} == {("r7", "local", "test")}
        assert all(event.pid for event in lifecycle_events)
    assert len(requests_of(monitor)) == count
    for name in ("head", "tail"):
        assert [batch.tasks for batch in batches_of(monitor, name)] == [4] * (count // 4)
        assert [task.batch for task in tasks_of(monitor, name)] == [4] * count
        assert all(batch.busy_ms > 0 for batch in batches_of(monitor, name))
    assert_spans_are_consistent(monitor)


def assert_spans_are_consistent(monitor: FakeMonitor) -> None:
    """Assert that the hops of each request are those that its workers reported, and that its spans are a chain."""
    heads, tails = ({task.request: task for task in tasks_of(monitor, name)} for name in ("head", "tail"))
    for request in requests_of(monitor):
        assert (request.source, request.attempts, request.error) == ("me", 1, "")
        tasks = [heads[request.request], tails[request.request]]
        for hop, task in zip(request.hops, tasks, strict=True):
            assert hop.model_dump() == task.model_dump(include=set(type(hop).model_fields))
        stages_ms = sum(hop.queue_ms + hop.decode_ms + hop.compute_ms + hop.encode_ms for hop in request.hops)
        assert request.network_ms == pytest.approx(request.latency_ms - stages_ms, abs=0.01)
        assert request.network_ms > 0
        assert {request.trace, *(task.trace for task in tasks)} == {request.request}
        assert [request.parent, *(task.parent for task in tasks)] == ["", request.span, tasks[0].span]
        assert len({request.span, *(task.span for task in tasks)}) == 3


def test_failures_are_reported_by_worker_and_source(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, monitor: FakeMonitor
) -> None:
    pipeline = load_pipeline(write_pipeline_file(sandbox.folder, [stage_table("reject", "reject_negative")]))

    async def send_requests() -> None:
        async with Offloader(pipeline, broker=embedded_broker.address) as offload:
            requests = [offload(np.array(value)) for value in (1.0, -1.0, -2.0)]
            results = await asyncio.gather(*requests, return_exceptions=True)
            assert [isinstance(result, Exception) for result in results] == [False, True, True]

    start_workers(sandbox, embedded_broker, pipeline, monitor.path)
    asyncio.run(send_requests())
    eventually("all events", lambda: len(tasks_of(monitor, "reject")) == len(requests_of(monitor)) == 3)
    for events in (tasks_of(monitor, "reject"), requests_of(monitor)):
        assert Counter(event.error for event in events) == {"": 1, "ArithmeticError": 2}
    failed = [request for request in requests_of(monitor) if request.error]
    assert all(request.latency_ms > 0 and not request.hops for request in failed)


def test_restarted_monitor_receives_the_last_events(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    source = counting_source_table(1_000_000, every_s=0.005)
    pipeline = load_pipeline(write_pipeline_file(sandbox.folder, [stage_table("double", "double")], source))
    out = sandbox.folder / "out"
    results = out / "results.jsonl"
    with monitor_socket_path() as path:
        start_workers(sandbox, embedded_broker, pipeline, path)
        arguments = ("source", pipeline.path, "--broker", embedded_broker.address, "--json", "--out", out)
        command = sandbox.start_sparse(*arguments, environment=environment_of(path))
        with FakeMonitor(path) as first:
            eventually("some requests", lambda: len(requests_of(first)) > 20)
            first.kill()
            count = results.read_text().count("\n")
            eventually("more results", lambda: results.read_text().count("\n") > count + 100)
        with FakeMonitor(path) as second:
            result = command.wait(signal.SIGTERM)
            assert (result.returncode, result.json_output["retries"]) == (0, 0), result.stderr
            eventually("the last event", lambda: second.events_of_kind("stop"))
            assert "monitor" not in result.stderr
        reported = [request.request for monitor in (first, second) for request in requests_of(monitor)]
        assert len(reported) == len(set(reported))
        assert 21 <= len(reported) <= result.json_output["results"]


def test_events_of_training_are_consistent(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, monitor: FakeMonitor
) -> None:
    """Two epochs, each with an evaluation of all test rows at once."""
    pipeline = load_pipeline(write_training_pipeline_file(sandbox.folder, epochs=2, evaluate_every=1))
    checkpoints = ("--checkpoints", str(sandbox.folder / "checkpoints"))
    workers = start_workers(sandbox, embedded_broker, pipeline, monitor.path, *checkpoints)
    out = sandbox.folder / "out"
    arguments = ("source", pipeline.path, "--broker", embedded_broker.address, "--json", "--no-pictures", "--out", out)
    result = sandbox.run_sparse(*arguments, environment=environment_of(monitor.path))
    assert result.returncode == 0, result.stderr
    stop_workers(workers)
    eventually("four processes to exit", lambda: len(monitor.events_of_kind("stop")) == 4)
    steps = [event for event in monitor.events if isinstance(event, StepDone)]
    count = 2 * STEPS_PER_EPOCH
    assert [(step.step, step.epoch, step.rows) for step in steps] == [
        (number, (number - 1) // STEPS_PER_EPOCH, 32) for number in range(1, count + 1)
    ]
    assert all(step.source == "stripes" and step.step_ms > 0 for step in steps)
    recorded = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [step.loss for step in steps] == [event["loss"] for event in recorded if event["event"] == "step"]
    rows = 32 // MICRO_BATCHES
    for stage in pipeline.stage:
        batches = batches_of(monitor, stage.name)
        assert Counter((batch.phase, batch.tasks, batch.rows) for batch in batches) == {
            ("forward", 1, rows): count * MICRO_BATCHES,
            ("backward", 1, rows): count * MICRO_BATCHES,
            ("update", MICRO_BATCHES, 32): count,
            ("inference", 1, 32): 2,
        }
        tasks = tasks_of(monitor, stage.name)
        assert len(tasks) == count * MICRO_BATCHES + 2
        assert all(task.compute_ms > 0 and task.bytes_in and not task.error for task in tasks)
    heads = {task.request: task for task in tasks_of(monitor, "head")}
    assert all(task.parent == heads[task.request].span for task in tasks_of(monitor, "body"))
    assert len({task.trace for task in heads.values()}) == count + 2  # one for each step and evaluation
