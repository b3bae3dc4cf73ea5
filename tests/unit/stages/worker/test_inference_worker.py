"""`InferenceWorker` and `StageWorker`: the processing of a task, draining, and a broker that refuses publications."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.mqtt.socket_connect import OperationRefused
from brokers.protocol.messages import Failure, Message, ReplyTo, Result, Task, TaskDone, TensorContent, new_request_id
from brokers.protocol.safetensors_codec import from_numpy, to_numpy
from brokers.protocol.transport import Properties
from stages.executor import FunctionExecutor, Node, TaskContext, TaskExecutor, Tensors
from stages.worker import worker_presence
from stages.worker.inference_worker import InferenceWorker
from stages.worker.result_sender import REASON_MAX_CHARS, failure_reason
from stages.worker.worker_context import WorkerContext
from tests.support.brokers.broker_kinds import WAIT_S, run_async
from tests.support.brokers.channel_ends import MessageRecorder
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport

STAGES = [{"name": name, "executor": "a:b", "max_wait_ms": 0} for name in ("head", "body", "tail")]
PIPELINE = Pipeline.model_validate({"pipeline": {"name": "street"}, "stage": STAGES})
INBOX = "client/inbox"


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_presence, "_RETAINED_WAIT_S", 0.01)


class GatedExecutor(TaskExecutor):
    """Returns the value of "x" once the gate is open; negative values raise an error."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.gate = threading.Event()
        self.started = threading.Event()
        self.values: list[float] = []
        self.is_stopped = False
        if is_open:
            self.gate.set()

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        self.started.set()
        assert self.gate.wait(WAIT_S)
        self.values.append(float(tensors["x"]))
        if self.values[-1] < 0:
            raise ArithmeticError("below zero")
        return tensors

    def stop(self) -> None:
        self.is_stopped = True


class Harness:
    """Workers of a pipeline on an in-memory broker, and a client that sends tasks to one of them."""

    def __init__(self) -> None:
        self.hub = MemoryBroker()
        self.workers: list[InferenceWorker] = []
        self.runs: list[asyncio.Task[None]] = []
        self.channel = MessageChannel(MemoryTransport(self.hub))
        self._recorder = MessageRecorder()

    async def open(self) -> None:
        await self.channel.open()
        await self.channel.subscribe(INBOX, self._recorder.on_message)

    async def start_worker(
        self, executor: TaskExecutor, stage: str = "tail", transport: MemoryTransport | None = None
    ) -> InferenceWorker:
        transport = transport or MemoryTransport(self.hub)
        context = WorkerContext(PIPELINE, PIPELINE.find_stage(stage), f"{stage}-1")
        worker = InferenceWorker(transport, context, executor)
        await worker.start()
        self.workers.append(worker)
        self.runs.append(asyncio.create_task(worker.run()))
        return worker

    async def send(self, worker: InferenceWorker, value: float, **fields: Any) -> Task:
        content = TensorContent({"x": from_numpy(np.array(value))})
        fields = {"request_id": new_request_id(), "reply_to": ReplyTo(INBOX), "sender_inbox": INBOX, **fields}
        task = Task(content=content, **fields)
        await self.channel.send(worker.context.inbox, task)
        return task

    async def receive(self) -> Message:
        return await self._recorder.next_message()

    async def receive_value(self) -> float:
        """The value of a result, whose sender then returns the credit."""
        result = await self.receive()
        assert isinstance(result, Result)
        assert isinstance(result.content, TensorContent)
        assert isinstance(await self.receive(), TaskDone)
        return float(to_numpy(result.content.tensors["x"]))

    async def receive_failure(self) -> Failure:
        failure = await self.receive()
        assert isinstance(failure, Failure)
        assert isinstance(await self.receive(), TaskDone)
        return failure

    async def close(self) -> None:
        for worker, run in zip(self.workers, self.runs, strict=True):
            await worker.drain()
            await run
            await worker.stop()
        await self.channel.close()


async def wait_until(predicate: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not predicate():  # noqa: ASYNC110 - a counter, which has no event
            await asyncio.sleep(0.01)


def with_harness(test: Callable[[Harness], Awaitable[None]]) -> None:
    async def run() -> None:
        harness = Harness()
        await harness.open()
        await test(harness)
        await harness.close()

    run_async(run())


def test_result_and_credit_are_sent_and_errors_fail_their_task() -> None:
    async def test(harness: Harness) -> None:
        executor = GatedExecutor()
        worker = await harness.start_worker(executor)
        await harness.send(worker, 2.0)
        assert await harness.receive_value() == 2.0
        task = await harness.send(worker, -1.0)
        failure = await harness.receive_failure()
        assert failure.request_id == task.request_id
        assert (failure.stage, failure.worker, failure.error, failure.reason, failure.retry) == (
            "tail",
            "tail-1",
            "ArithmeticError",
            "below zero",
            False,
        )
        await harness.send(worker, 3.0)
        assert await harness.receive_value() == 3.0
        assert worker.counters == {"failed": 1}
        assert not executor.is_stopped

    with_harness(test)


def test_executor_is_stopped_with_its_worker() -> None:
    executor = GatedExecutor()

    async def test(harness: Harness) -> None:
        await harness.start_worker(executor)

    with_harness(test)
    assert executor.is_stopped


def test_activation_goes_to_the_next_stage_or_where_it_is_dispatched() -> None:
    class Dispatching(TaskExecutor):
        def start(self, node: Node) -> None:
            self.node = node

        def execute(self, tensors: Tensors, task: TaskContext) -> Tensors | None:
            if tensors["x"] < 10:
                return tensors
            self.node.dispatch(tensors, task, "tail")
            return None

    async def test(harness: Harness) -> None:
        head = await harness.start_worker(Dispatching(), "head")
        await harness.start_worker(FunctionExecutor(lambda x: {"x": x + 1}), "body")
        await harness.start_worker(FunctionExecutor(lambda x: {"x": x + 100}), "tail")
        for value, expected in ((1.0, 102.0), (10.0, 110.0)):
            await harness.send(head, value)
            assert isinstance(await harness.receive(), TaskDone)  # the next worker has it
            result = await harness.receive()
            assert isinstance(result, Result)
            assert isinstance(result.content, TensorContent)
            assert float(to_numpy(result.content.tensors["x"])) == expected
            assert [hop.stage for hop in result.hops] == ["head", *(["body"] if value < 10 else []), "tail"]

    with_harness(test)


def test_executor_that_neither_returns_nor_dispatches_fails_its_task() -> None:
    async def test(harness: Harness) -> None:
        class Silent(TaskExecutor):
            def execute(self, tensors: Tensors, task: TaskContext) -> None:
                return None

        await harness.send(await harness.start_worker(Silent()), 1.0)
        assert (await harness.receive_failure()).error == "NoOutput"

    with_harness(test)


def test_draining_worker_finishes_accepted_tasks_and_rejects_new_ones() -> None:
    async def test(harness: Harness) -> None:
        executor = GatedExecutor(is_open=False)
        worker = await harness.start_worker(executor)
        for value in (1.0, 2.0):
            await harness.send(worker, value)
        await asyncio.to_thread(executor.started.wait, WAIT_S)
        await worker.drain()
        await harness.send(worker, 3.0)
        failure = await harness.receive_failure()
        assert (failure.error, failure.retry) == ("Draining", True)
        executor.gate.set()
        assert [await harness.receive_value() for _ in range(2)] == [1.0, 2.0]
        await harness.runs[0]
        assert worker.counters == {"failed": 1, "rejected": 1}

    with_harness(test)


def test_queue_refuses_duplicates_expired_tasks_and_too_many_tasks() -> None:
    async def test(harness: Harness) -> None:
        executor = GatedExecutor(is_open=False)
        worker = await harness.start_worker(executor)
        worker._queue._limit = 2
        await harness.send(worker, 1.0)
        await asyncio.to_thread(executor.started.wait, WAIT_S)
        first = await harness.send(worker, 2.0)
        await harness.send(worker, 3.0, request_id=first.request_id, attempt=2)
        assert isinstance(await harness.receive(), TaskDone)  # of the first attempt
        await harness.send(worker, 4.0, deadline_ms=0.01)
        await harness.send(worker, 5.0)
        failure = await harness.receive_failure()
        assert (failure.error, failure.retry) == ("Busy", True)
        executor.gate.set()
        messages = [await harness.receive() for _ in range(6)]
        assert [each.error for each in messages if isinstance(each, Failure)] == ["DeadlinePassed"]
        assert executor.values == [1.0, 3.0]
        assert worker.counters == {"failed": 2, "rejected": 1, "expired": 1}

    with_harness(test)


def test_task_without_a_response_topic_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.start_worker(GatedExecutor())
        await harness.channel.transport.publish(
            worker.context.topics.shared_task_topic, b"[1]", Properties(content_type="application/json"), qos=1
        )
        await harness.send(worker, 1.0)
        await harness.receive_value()
        assert worker.counters == {"no_reply_address": 1}

    with_harness(test)


# A broker that refuses presence records -------------------------------------------------------------------------------


class RefusingTransport(MemoryTransport):
    """Refuses presence records after the first `allowed` ones."""

    allowed = 1
    refused = 0

    async def publish(self, topic: str, *arguments: Any, **options: Any) -> None:
        if "/up/" in topic:
            self.allowed -= 1
            if self.allowed < 0:
                self.refused += 1
                raise OperationRefused("publication to", topic, "Not authorized")
        await super().publish(topic, *arguments, **options)


def test_refused_reports_are_logged_once_and_do_not_stop_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("brokers.dispatch.presence_publisher.REPORT_INTERVAL_S", 0.01)
    caplog.set_level(logging.WARNING)

    async def test(harness: Harness) -> None:
        transport = RefusingTransport(harness.hub)
        worker = await harness.start_worker(GatedExecutor(), transport=transport)
        await wait_until(lambda: transport.refused == 5)
        messages = [record.message for record in caplog.records]
        assert len(messages) == 1
        assert "/up/tail-1: the broker refused the publication" in messages[0]
        await harness.send(worker, 1.0)
        assert await harness.receive_value() == 1.0
        transport.allowed = 10
        await wait_until(lambda: transport.allowed < 5)  # it reports again

    with_harness(test)


def test_worker_stops_although_its_stopped_record_is_refused() -> None:
    async def test(harness: Harness) -> None:
        await harness.start_worker(GatedExecutor(), transport=RefusingTransport(harness.hub))

    with_harness(test)


# Reasons of failures --------------------------------------------------------------------------------------------------


class BrokenError(Exception):
    def __str__(self) -> str:
        raise AttributeError("a bug in the message")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("first\n second"), "first second"),
        (KeyError("x"), "no key 'x'"),
        (SystemExit("enough"), "enough"),
        (BrokenError(), "its message could not be formatted: AttributeError"),
        (ValueError("x" * 1001), f"{'x' * REASON_MAX_CHARS}... (1001 characters)"),
    ],
)
def test_failure_reason_is_one_line_of_limited_length(error: BaseException, reason: str) -> None:
    assert failure_reason(error) == reason
