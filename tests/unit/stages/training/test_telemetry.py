"""`TrainingTelemetry`: sums of steps, and events of operations and micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from brokers.protocol.messages import Gradient, ReplyTo, StepMessage, Task, TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.training import LABELS_TENSOR, MicroBatch, SourceProgress, StepMode
from stages.training.step_queue import Backward, Commit, Forward, StepOperation
from stages.training.telemetry import TrainingTelemetry

ROWS = 3


class RecordingEventClient:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def batches(self) -> list[tuple[str, int, int, float]]:
        return [
            (fields["phase"], fields["tasks"], fields["rows"], fields["busy_ms"])
            for event, fields in self.events
            if event == "batch_processed"
        ]

    def tasks(self) -> list[dict[str, Any]]:
        return [fields for event, fields in self.events if event == "task_processed"]


def micro_batch(mode: StepMode = "train") -> MicroBatch:
    return MicroBatch(step="0" * 32, term=1, index=0, count=1, rows=ROWS, number=0, seed=0, mode=mode)


def task(number: int) -> Task:
    tensors = {"x": from_numpy(np.zeros((ROWS, 2))), LABELS_TENSOR: from_numpy(np.zeros(ROWS))}
    return Task(request_id=bytes([number]) * 16, content=TensorContent(tensors), reply_to=ReplyTo("source"))


def forward(number: int, mode: StepMode = "train") -> Forward:
    return Forward(micro_batch(mode), task(number))


def backward(number: int) -> Backward:
    gradient = Gradient(request_id=bytes([number]) * 16, content=TensorContent({}))
    return Backward(micro_batch(), gradient, replace(task(number), content=TensorContent({})))


def commit() -> Commit:
    message = StepMessage(request_id=bytes(16), verb="commit", term=1)
    return Commit(message, "source", 0.1, SourceProgress(steps=1))


Run = Callable[..., None]


@pytest.fixture(name="events")
def _events() -> RecordingEventClient:
    return RecordingEventClient()


@pytest.fixture(name="telemetry")
def _telemetry(events: RecordingEventClient) -> TrainingTelemetry:
    return TrainingTelemetry(events)  # type: ignore[arg-type]


@pytest.fixture(name="run")
def _run(telemetry: TrainingTelemetry, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Record an operation that takes so many milliseconds."""
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)

    def run(operation: StepOperation, name: str, ms: float, error: Exception | None = None) -> None:
        nonlocal now_s
        with telemetry.record_operation(operation), telemetry.measure(name):
            now_s += ms / 1000
            telemetry.add("bytes_in", 10)
            if error is not None:
                raise error

    return run


def test_step_has_the_sums_of_its_operations(telemetry: TrainingTelemetry, run: Run) -> None:
    run(forward(1), "forward_ms", 4)
    run(forward(2), "forward_ms", 2)
    run(backward(1), "backward_ms", 8)
    assert telemetry.pop_step_sums() == {"forward_ms": 6, "backward_ms": 8, "bytes_in": 30}
    assert telemetry.pop_step_sums() == {}


def test_evaluation_and_aborted_step_do_not_count_for_the_next_step(telemetry: TrainingTelemetry, run: Run) -> None:
    run(forward(1, "evaluate"), "forward_ms", 4)
    assert telemetry.pop_step_sums() == {}
    run(forward(2), "forward_ms", 4)
    telemetry.reset()
    assert telemetry.pop_step_sums() == {}


def test_trained_micro_batch_is_reported_after_its_backward(events: RecordingEventClient, run: Run) -> None:
    for number in (1, 2):
        run(forward(number), "forward_ms", 4)
    assert events.tasks() == []
    run(backward(1), "backward_ms", 8)
    [fields] = events.tasks()
    assert (fields["request"], fields["compute_ms"], fields["bytes_in"], fields["error"]) == (b"\1" * 16, 12, 20, "")
    run(backward(2), "backward_ms", 8)
    run(commit(), "commit_ms", 1)
    assert events.batches() == [
        ("forward", 1, ROWS, 4),
        ("forward", 1, ROWS, 4),
        ("backward", 1, ROWS, 8),
        ("backward", 1, ROWS, 8),
        ("update", 2, 2 * ROWS, 1),
    ]


def test_evaluated_micro_batch_is_reported_after_its_forward(events: RecordingEventClient, run: Run) -> None:
    run(forward(1, "evaluate"), "forward_ms", 4)
    assert events.batches() == [("inference", 1, ROWS, 4)]
    assert len(events.tasks()) == 1


def test_failed_operation_is_reported_with_its_error(events: RecordingEventClient, run: Run) -> None:
    with pytest.raises(ArithmeticError):
        run(forward(1), "forward_ms", 4, ArithmeticError("below zero"))
    [fields] = events.tasks()
    assert fields["error"] == "ArithmeticError"
