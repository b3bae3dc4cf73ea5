"""The compute thread's work, without a thread or a network: tasks in, outcomes out."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from brokers.errors import DeadlinePassed
from brokers.protocol.messages import JSON, BinaryContent, Content, ReplyTo, Task, TensorContent
from brokers.protocol.safetensors_codec import from_array, to_numpy
from stages.executor import TaskContext, TaskExecutor, Tensors
from stages.worker.batch_runner import BatchRunner, Completed, Failed, NoOutput, QueuedTask, TaskOutcome

REQUESTS = [bytes([index]) * 16 for index in range(8)]


class Doubler(TaskExecutor):
    """Doubles; fails below zero; remembers the rows of each call."""

    batchable = True

    def __init__(self) -> None:
        self.calls: list[int] = []

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        self.calls.append(len(tensors["x"]))
        if (tensors["x"] < 0).any():
            raise ArithmeticError("below zero")
        return {"x": 2 * tensors["x"]}


class Single(Doubler):
    batchable = False


def job(index: int, *values: float, deadline_ms: float | None = None, waited_s: float = 0.0) -> QueuedTask:
    content = TensorContent({"x": from_array(np.array(values))}, {"number": str(index)})
    return job_of(index, content, deadline_ms, waited_s)


def job_of(
    index: int, content: TensorContent | BinaryContent, deadline_ms: float | None = None, waited_s: float = 0.0
) -> QueuedTask:
    request = REQUESTS[index]
    task = Task(request_id=request, content=content, reply_to=ReplyTo("answers"), source="s", deadline_ms=deadline_ms)
    return QueuedTask(task, time.monotonic() - waited_s, TaskContext(request, "s", 1))


def work(executor: TaskExecutor, *jobs: QueuedTask) -> dict[int, TaskOutcome]:
    """The outcome of each job, by its number."""
    outcomes = BatchRunner(executor, "stage", "worker").run(jobs)
    assert len(outcomes) == len(jobs)
    return {REQUESTS.index(outcome.queued.task.request_id): outcome for outcome in outcomes}


def values(outcome: TaskOutcome) -> Any:
    assert isinstance(outcome, Completed)
    assert outcome.body is not None
    return to_numpy(outcome.body.tensors["x"]).tolist()


def test_a_batch_is_one_call_and_each_job_gets_its_own_rows() -> None:
    executor = Doubler()
    outcomes = work(executor, job(0, 1.0), job(1, 2.0, 3.0), job(2, 4.0))
    assert executor.calls == [4]
    assert [values(outcomes[index]) for index in range(3)] == [[2.0], [4.0, 6.0], [8.0]]
    for index, outcome in outcomes.items():
        assert isinstance(outcome, Completed)
        assert outcome.hop.batch == 3
        assert outcome.body is not None
        assert outcome.body.metadata == {"number": str(index)}


def test_without_the_promise_each_job_is_a_call() -> None:
    executor = Single()
    outcomes = work(executor, job(0, 1.0), job(1, 2.0))
    assert executor.calls == [1, 1]
    assert [values(outcomes[index]) for index in range(2)] == [[2.0], [4.0]]


def test_an_exception_fails_the_jobs_of_its_call_and_no_others() -> None:
    outcomes = work(
        Doubler(), job(0, -1.0), job(1, 2.0), job_of(2, TensorContent({"x": from_array(np.array([5], np.float32))}))
    )
    for index in (0, 1):
        failed = outcomes[index]
        assert isinstance(failed, Failed)
        assert str(failed.error) == "below zero"
    assert values(outcomes[2]) == [10.0]  # another dtype, another call


def test_what_cannot_be_prepared_fails_alone() -> None:
    outcomes = work(Doubler(), job_of(0, BinaryContent(JSON, b"no numbers")), job(1, 2.0))
    assert isinstance(outcomes[0], Failed)
    assert values(outcomes[1]) == [4.0]


def test_what_is_past_its_deadline_is_not_computed() -> None:
    executor = Doubler()
    outcomes = work(executor, job(0, 1.0, deadline_ms=100, waited_s=0.2), job(1, 2.0, deadline_ms=10_000))
    late = outcomes[0]
    assert isinstance(late, Failed)
    assert isinstance(late.error, DeadlinePassed)
    assert "stage 'stage'" in str(late.error)
    assert executor.calls == [1]
    assert values(outcomes[1]) == [4.0]


def test_the_hop_says_where_the_time_went() -> None:
    class Sleeper(Doubler):
        def prepare(self, content: Any, task: TaskContext) -> Tensors:
            time.sleep(0.02)
            return super().prepare(content, task)

        def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
            time.sleep(0.04)
            return super().execute(tensors, task)

        def finish(self, tensors: Tensors, task: TaskContext) -> Tensors:
            time.sleep(0.03)
            return tensors

    outcome = work(Sleeper(), job(0, 1.0, waited_s=0.5))[0]
    assert isinstance(outcome, Completed)
    hop = outcome.hop
    assert (hop.stage, hop.worker, hop.bytes_in, hop.bytes_out, hop.batch) == ("stage", "worker", 8, 8, 1)
    assert 500 <= hop.queue_ms < 600
    assert 20 <= hop.decode_ms < 120
    assert 40 <= hop.compute_ms < 140
    assert 30 <= hop.encode_ms < 130


@pytest.mark.parametrize("given", [[1.0], np.array([1.0]), "text"])
def test_an_executor_that_gives_no_dict_is_told_so(given: Any) -> None:
    class Wrong(TaskExecutor):
        def execute(self, tensors: Tensors, task: TaskContext) -> Any:
            return given

    failed = work(Wrong(), job(0, 1.0))[0]
    assert isinstance(failed, Failed)
    assert "execute must return a dict of named arrays, or None" in str(failed.error)


def test_none_is_a_request_that_was_passed_on_and_never_a_batch_of_them() -> None:
    class Gone(Doubler):
        def execute(self, tensors: Tensors, task: TaskContext) -> Any:
            return None

    alone = work(Gone(), job(0, 1.0))[0]
    assert isinstance(alone, Completed)
    assert alone.body is None
    for outcome in work(Gone(), job(0, 1.0), job(1, 2.0)).values():
        assert isinstance(outcome, Failed)
        assert isinstance(outcome.error, NoOutput)
        assert "must not be batchable" in str(outcome.error)


def test_what_no_wire_can_carry_fails_its_job() -> None:
    class Objects(TaskExecutor):
        def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
            return {"x": object()}

    failed = work(Objects(), job(0, 1.0))[0]
    assert isinstance(failed, Failed)
    assert "object" in str(failed.error)


def test_what_an_executor_prepares_for_itself_may_be_anything() -> None:
    class Anything(TaskExecutor):
        batchable = True

        def prepare(self, content: Any, task: TaskContext) -> Tensors:
            return {"x": task.request_id.hex()}

        def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
            return {"x": float(len(tensors["x"]))}

    outcomes = work(Anything(), job(0, 1.0), job(1, 1.0))
    for outcome in outcomes.values():
        assert values(outcome) == 32.0


def test_a_batchable_executor_that_prepares_no_arrays_fails_that_request_only() -> None:
    class Forgetful(TaskExecutor):
        batchable = True

        def prepare(self, content: Content, task: TaskContext) -> Any:
            prepared = super().prepare(content, task)
            return None if task.metadata["number"] == "0" else prepared

        def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
            return tensors

    outcomes = work(Forgetful(), job(0, 1.0), job(1, 2.0))
    assert sorted(type(outcome).__name__ for outcome in outcomes.values()) == ["Done", "Failed"]
