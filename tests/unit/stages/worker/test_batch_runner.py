"""`BatchRunner`: batches, errors, durations, without a thread or a network."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from brokers.errors import DeadlinePassed, SparseError
from brokers.protocol.messages import JSON, BinaryContent, Content, ReplyTo, Task, TensorContent
from brokers.protocol.safetensors_codec import from_array, to_numpy
from stages.executor import TaskContext, TaskExecutor, Tensors
from stages.worker.batch_runner import BatchRunner, QueuedTask


class Doubler(TaskExecutor):
    """Doubles "x"; fails on negative values; remembers the rows of each call."""

    batchable = True

    def __init__(self) -> None:
        self.calls: list[int] = []

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        self.calls.append(len(tensors["x"]))
        if (tensors["x"] < 0).any():
            raise ArithmeticError("below zero")
        return {"x": 2 * tensors["x"]}


def queued_task(content: Content, *, deadline_ms: float | None = None, waited_s: float = 0.0) -> QueuedTask:
    request = b"." * 16
    task = Task(request_id=request, content=content, reply_to=ReplyTo("answers"), source="s", deadline_ms=deadline_ms)
    return QueuedTask(task, time.monotonic() - waited_s, TaskContext(request, "s", 1))


def numbers(*values: float, dtype: Any = np.float64, **options: Any) -> QueuedTask:
    return queued_task(TensorContent({"x": from_array(np.array(values, dtype))}, {"first": str(values[0])}), **options)


def run(executor: TaskExecutor, *tasks: QueuedTask) -> None:
    BatchRunner(executor, "stage", "worker").run(tasks)


def outputs(queued: QueuedTask) -> Any:
    assert queued.error is None
    assert queued.outputs is not None
    return to_numpy(queued.outputs.tensors["x"]).tolist()


def test_batch_is_one_call_and_is_split_by_rows() -> None:
    executor = Doubler()
    tasks = [numbers(1.0), numbers(2.0, 3.0), numbers(4.0)]
    batches = BatchRunner(executor, "stage", "worker").run(tasks)
    assert executor.calls == [4]
    assert [count for count, _ in batches] == [3]
    assert [outputs(queued) for queued in tasks] == [[2.0], [4.0, 6.0], [8.0]]
    assert {queued.hop.batch for queued in tasks} == {3}
    assert [queued.outputs and queued.outputs.metadata for queued in tasks] == [
        {"first": "1.0"},
        {"first": "2.0"},
        {"first": "4.0"},
    ]


def test_executor_that_is_not_batchable_gets_single_tasks() -> None:
    executor = Doubler()
    executor.batchable = False
    tasks = [numbers(1.0), numbers(2.0)]
    run(executor, *tasks)
    assert executor.calls == [1, 1]
    assert [outputs(queued) for queued in tasks] == [[2.0], [4.0]]


def test_error_fails_all_tasks_of_its_call_only() -> None:
    failing, same_call, other_dtype = numbers(-1.0), numbers(2.0), numbers(5.0, dtype=np.float32)
    run(Doubler(), failing, same_call, other_dtype)
    assert [str(queued.error) for queued in (failing, same_call)] == ["below zero", "below zero"]
    assert outputs(other_dtype) == [10.0]


def test_task_that_cannot_be_prepared_fails_alone() -> None:
    malformed, valid = queued_task(BinaryContent(JSON, b"no numbers")), numbers(2.0)
    run(Doubler(), malformed, valid)
    assert isinstance(malformed.error, SparseError)
    assert outputs(valid) == [4.0]


def test_expired_task_is_not_computed() -> None:
    executor = Doubler()
    expired, valid = numbers(1.0, deadline_ms=100, waited_s=0.2), numbers(2.0, deadline_ms=10_000)
    run(executor, expired, valid)
    assert isinstance(expired.error, DeadlinePassed)
    assert expired.error.fields["where"] == "stage 'stage'"
    assert executor.calls == [1]
    assert outputs(valid) == [4.0]


def test_hop_has_the_duration_of_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)

    class Slow(Doubler):
        def prepare(self, content: Any, task: TaskContext) -> Tensors:
            nonlocal now_s
            now_s += 0.25
            return super().prepare(content, task)

        def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
            nonlocal now_s
            now_s += 0.5
            return super().execute(tensors, task)

        def finish(self, tensors: Tensors, task: TaskContext) -> Tensors:
            nonlocal now_s
            now_s += 2.0
            return tensors

    queued = numbers(1.0, waited_s=1.0)
    [(_, busy_ms)] = BatchRunner(Slow(), "stage", "worker").run([queued])
    hop = queued.hop
    assert (hop.stage, hop.worker, hop.bytes_in, hop.bytes_out, hop.batch) == ("stage", "worker", 8, 8, 1)
    assert (hop.queue_ms, hop.decode_ms, hop.compute_ms, hop.encode_ms) == (1000, 250, 500, 2000)
    assert busy_ms == 2750


@pytest.mark.parametrize("result", [[1.0], np.array([1.0]), "text"])
def test_executor_must_return_a_dict(result: Any) -> None:
    class Wrong(TaskExecutor):
        def execute(self, tensors: Tensors, task: TaskContext) -> Any:
            return result

    queued = numbers(1.0)
    run(Wrong(), queued)
    assert isinstance(queued.error, TypeError)
    assert "execute() must return a dict of named arrays, or None" in str(queued.error)


def test_executor_may_return_none_for_a_single_task_only() -> None:
    class Dispatching(Doubler):
        def execute(self, tensors: Tensors, task: TaskContext) -> Any:
            return None

    single = numbers(1.0)
    run(Dispatching(), single)
    assert (single.error, single.outputs) == (None, None)
    batch = [numbers(1.0), numbers(2.0)]
    run(Dispatching(), *batch)
    for queued in batch:
        assert isinstance(queued.error, SparseError)
        assert (queued.error.code, queued.error.fields["requests"]) == ("NoOutput", 2)


def test_outputs_that_cannot_be_encoded_fail_their_task() -> None:
    class Objects(TaskExecutor):
        def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
            return {"x": object()}

    queued = numbers(1.0)
    run(Objects(), queued)
    assert "object" in str(queued.error)


def test_executor_may_prepare_values_that_are_not_arrays() -> None:
    class Text(TaskExecutor):
        batchable = True

        def prepare(self, content: Any, task: TaskContext) -> Tensors:
            return {"x": task.request_id.hex()}

        def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
            return {"x": float(len(tensors["x"]))}

    tasks = [numbers(1.0), numbers(1.0)]
    run(Text(), *tasks)
    assert [outputs(queued) for queued in tasks] == [32.0, 32.0]


def test_batchable_executor_must_prepare_a_dict() -> None:
    class Forgetful(Doubler):
        def prepare(self, content: Content, task: TaskContext) -> Any:
            prepared = super().prepare(content, task)
            return None if task.metadata["first"] == "0.0" else prepared

    tasks = [numbers(0.0), numbers(2.0)]
    run(Forgetful(), *tasks)
    assert isinstance(tasks[0].error, TypeError)
    assert outputs(tasks[1]) == [4.0]
