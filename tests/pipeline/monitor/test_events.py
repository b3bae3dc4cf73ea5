"""What workers and sources tell the monitor, as processes of their own through a real broker: it all adds up.

A socket of the test plays the monitor: tests/support/monitor/fake_monitor.py.
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
    TelemetryEvent,
)
from sources.client.offloader import Offloader
from tests.pipeline.training.test_bad_input import write_training_pipeline_file
from tests.support.brokers.presence import wait_for_workers
from tests.support.monitor.fake_monitor import FakeMonitor, monitor_socket_path
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually


@pytest.fixture(name="monitor")
def _monitor(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMonitor]:
    """At the place that this process, too, is told of by its environment."""
    with monitor_socket_path() as path, FakeMonitor(path) as found:
        monkeypatch.setenv("SPARSE_MONITOR", str(path))
        monkeypatch.setenv("SPARSE_RUN", "r7")
        yield found


def told_to(path: Path) -> dict[str, str]:
    return {"SPARSE_MONITOR": str(path), "SPARSE_RUN": "r7"}


def serve(
    sandbox: ProcessSandbox, broker: LocalBroker, pipeline: Pipeline, path: Path, *words: str
) -> list[RunningCommand]:
    """A worker for each stage, called as the stage is with a 1; they are up."""
    workers = [
        sandbox.start_sparse(
            "stage",
            pipeline.path,
            each.name,
            "--broker",
            broker.address,
            "--worker",
            f"{each.name}1",
            *words,
            environment=told_to(path),
        )
        for each in pipeline.stage
    ]
    wait_for_workers(broker.address, lambda found: len(found) == len(workers))
    return workers


def tasks_of(monitor: FakeMonitor, name: str) -> list[TaskProcessed]:
    return [event for event in monitor.events if isinstance(event, TaskProcessed) and event.stage == name]


def batches_of(monitor: FakeMonitor, name: str) -> list[BatchProcessed]:
    return [event for event in monitor.events if isinstance(event, BatchProcessed) and event.stage == name]


def requests_of(monitor: FakeMonitor) -> list[RequestDone]:
    return [event for event in monitor.events if isinstance(event, RequestDone)]


def test_the_events_of_a_run_add_up(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, monitor: FakeMonitor
) -> None:
    batched = {"max_batch": 4, "max_wait_ms": 20}
    pipeline = load_pipeline(
        write_pipeline_file(
            sandbox.folder,
            [stage_table("head", "BatchableExecutor", **batched), stage_table("tail", "BatchableExecutor", **batched)],
        )
    )
    count = 30

    async def ask() -> None:
        async with Offloader(pipeline, broker=embedded_broker.address, name="me", window=8) as offload:
            await asyncio.gather(*(offload({"rows": np.full((1, 3), float(index))}) for index in range(count)))

    workers = serve(sandbox, embedded_broker, pipeline, monitor.path)
    asyncio.run(ask())
    for worker in workers:
        assert worker.wait(signal.SIGTERM).returncode == 0
    eventually("the end of all", lambda: len(monitor.events_of_kind("stop")) == 3)
    assert_life(monitor.events, {("stage", "head1"), ("stage", "tail1"), ("source", "me")})
    assert Counter(event.event for event in monitor.events if isinstance(event, TaskProcessed | RequestDone)) == {
        "request_done": count,
        "task_processed": 2 * count,
    }
    for name in ("head", "tail"):
        batches = batches_of(monitor, name)
        assert sum(batch.tasks for batch in batches) == len(tasks_of(monitor, name)) == count
        assert max(batch.tasks for batch in batches) > 1
        # Each batch of n is what n tasks say that they were in.
        sizes = Counter(task.batch for task in tasks_of(monitor, name))
        assert sizes == Counter({n: n * times for n, times in Counter(batch.tasks for batch in batches).items()})
        assert all(batch.busy_ms > 20 for batch in batches)  # Rows sleeps so long
    assert_requests(monitor)


def assert_life(events: list[TelemetryEvent], expected: set[tuple[str, str]]) -> None:
    for kind in (ProcessStarted, ProcessStopped):
        lives = [event for event in events if isinstance(event, kind)]
        assert {(life.role, life.name) for life in lives} == expected
        assert len(lives) == len(expected)
        assert {(life.run, life.site, life.pipeline) for life in lives} == {("r7", "local", "test")}
        assert all(life.pid for life in lives)


def assert_requests(monitor: FakeMonitor) -> None:
    """Each request's hops are what its workers said themselves, and its spans are a chain."""
    heads, tails = ({task.request: task for task in tasks_of(monitor, name)} for name in ("head", "tail"))
    for done in requests_of(monitor):
        assert (done.source, done.attempts, done.error, done.bytes_out) == ("me", 1, "", 24)
        tasks = [heads[done.request], tails[done.request]]
        for hop, task in zip(done.hops, tasks, strict=True):
            assert hop.model_dump() == task.model_dump(include=set(type(hop).model_fields))
        spent_ms = sum(hop.queue_ms + hop.decode_ms + hop.compute_ms + hop.encode_ms for hop in done.hops)
        assert done.network_ms == pytest.approx(done.latency_ms - spent_ms, abs=0.01)
        assert done.network_ms > 0
        assert {done.trace, *(task.trace for task in tasks)} == {done.request}
        assert [done.parent, *(task.parent for task in tasks)] == ["", done.span, tasks[0].span]
        assert len({done.span, *(task.span for task in tasks)}) == 3


def test_what_fails_is_told_with_its_error_by_worker_and_source(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, monitor: FakeMonitor
) -> None:
    pipeline = load_pipeline(write_pipeline_file(sandbox.folder, [stage_table("reject_negative", "reject_negative")]))

    async def ask() -> None:
        async with Offloader(pipeline, broker=embedded_broker.address) as offload:
            asked = [offload(np.array(value)) for value in (1.0, -1.0, -2.0)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert [isinstance(answer, Exception) for answer in answers] == [False, True, True]

    serve(sandbox, embedded_broker, pipeline, monitor.path)
    asyncio.run(ask())
    eventually("all tasks", lambda: len(tasks_of(monitor, "reject_negative")) == 3)
    for found in (tasks_of(monitor, "reject_negative"), requests_of(monitor)):
        assert Counter(event.error for event in found) == {"": 1, "ArithmeticError": 2}
    failed = [done for done in requests_of(monitor) if done.error]
    assert all(done.latency_ms > 0 and not done.hops for done in failed)


def test_a_run_with_no_monitor_or_one_that_comes_and_goes_is_as_any_other(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    """The last thing that is told is heard by a monitor that was started again, whatever went before."""
    pipeline = load_pipeline(
        write_pipeline_file(sandbox.folder, [stage_table("double", "double")], counting_source_table(400, every_s=0.01))
    )
    with monitor_socket_path() as path:
        serve(sandbox, embedded_broker, pipeline, path)
        words = (
            "source",
            pipeline.path,
            "--broker",
            embedded_broker.address,
            "--json",
            "--out",
            sandbox.folder / "out",
        )
        source = sandbox.start_sparse(*words, environment=told_to(path))
        with FakeMonitor(path) as first:
            eventually("some results", lambda: len(requests_of(first)) > 20)
            first.kill()
            eventually("more results", lambda: _results(sandbox.folder / "out") > 150)
        with FakeMonitor(path) as second:
            said = source.wait()
            assert (said.returncode, said.json_output["results"], said.json_output["retries"]) == (0, 400, 0), (
                said.stderr
            )
            eventually("the end", lambda: second.events_of_kind("stop"))
            assert said.stderr.count("monitor") == 0
        heard = [done.request for monitor in (first, second) for done in requests_of(monitor)]
        assert len(heard) == len(set(heard))
        assert 21 <= len(heard) <= 400


def _results(folder: Path) -> int:
    file = folder / "results.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_a_training_run_tells_each_step_and_each_operation(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, monitor: FakeMonitor
) -> None:
    """Two epochs of 3 steps of 32 rows in 2 micro-batches; after each epoch 32 rows are evaluated at once."""
    pipeline = load_pipeline(write_training_pipeline_file(sandbox.folder, evaluate_every=1))
    workers = serve(
        sandbox, embedded_broker, pipeline, monitor.path, "--checkpoints", str(sandbox.folder / "checkpoints")
    )
    words = ("source", pipeline.path, "--broker", embedded_broker.address, "--json", "--no-pictures")
    said = sandbox.start_sparse(*words, "--out", sandbox.folder / "out", environment=told_to(monitor.path)).wait()
    assert said.returncode == 0, said.stderr
    for worker in workers:
        assert worker.wait(signal.SIGTERM).returncode == 0
    eventually("the end of all", lambda: len(monitor.events_of_kind("stop")) == 3)
    steps = [event for event in monitor.events if isinstance(event, StepDone)]
    assert [(step.step, step.epoch, step.rows) for step in steps] == [(n, (n - 1) // 3, 32) for n in range(1, 7)]
    assert all(step.source == "stripes" and step.step_ms > 0 for step in steps)
    written = [json.loads(line) for line in (sandbox.folder / "out" / "training.jsonl").read_text().splitlines()]
    assert [step.loss for step in steps] == [event["loss"] for event in written if event["event"] == "step"]
    for name in ("head", "tail"):
        batches = batches_of(monitor, name)
        assert Counter((batch.phase, batch.tasks, batch.rows) for batch in batches) == {
            ("forward", 1, 16): 12,
            ("backward", 1, 16): 12,
            ("update", 2, 32): 6,
            ("inference", 1, 32): 2,
        }
        tasks = tasks_of(monitor, name)
        assert len(tasks) == 14
        assert all(task.compute_ms > 0 and task.bytes_in and not task.error for task in tasks)
    heads = {task.request: task for task in tasks_of(monitor, "head")}
    assert all(task.parent == heads[task.request].span for task in tasks_of(monitor, "tail"))
    assert len({task.trace for task in heads.values()}) == 8  # one for each step, and each evaluation
