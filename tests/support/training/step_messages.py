"""Messages of a training step, and functions that pass them to a `StepQueue` and run its operations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from brokers.protocol.messages import Activation, Gradient, ReplyTo, StepMessage, Task, TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.training import LABELS_TENSOR, MICRO_BATCH_KEY, MicroBatch, StepMode
from stages.training.step_queue import Backward, Commit, Forward, ScheduleName, StepOperation, StepQueue

TERM = 5
Incoming = tuple[Literal["task", "labels", "gradient", "commit"], int]  # the kind, and the index of the micro-batch


class Step:
    """One step of one source, and the messages about it that a stage may receive."""

    def __init__(
        self, count: int = 4, *, term: int = TERM, number: int = 0, mode: StepMode = "train", source: str = "digits"
    ) -> None:
        self.id = random.randbytes(16)
        self.count = count
        self.source = source
        self.requests = [random.randbytes(16) for _ in range(count)]
        self.first = MicroBatch(
            step=self.id.hex(), term=term, index=0, count=count, rows=count, number=number, seed=0, mode=mode
        )

    def task(self, index: int, *, labels_only: bool = False, **change: Any) -> tuple[Task, MicroBatch]:
        micro_batch = replace(self.first, index=index, **change)
        name = LABELS_TENSOR if labels_only else "cut"
        tensors = {name: from_numpy(np.zeros((1, 2), np.float32))}
        task = Activation(
            request_id=self.requests[index],
            content=TensorContent(tensors, {MICRO_BATCH_KEY: micro_batch.to_json()}),
            reply_to=ReplyTo("source"),
            sender_inbox="before",
            source=self.source,
        )
        return task, micro_batch

    def gradient(self, index: int) -> Gradient:
        return Gradient(request_id=self.requests[index], content=TensorContent({}), sender_inbox="after")

    def commit(self, **change: Any) -> StepMessage:
        details = {"source": self.source, "lr": 0.05, "settings": {"batch": 4}}
        message = StepMessage(
            request_id=self.id, verb="commit", term=self.first.term, sender_inbox="source", details=details
        )
        return replace(message, **change)


def make_queue(stage: int = 0, stages: int = 2, schedule: ScheduleName = "1f1b", **options: Any) -> StepQueue:
    queue = StepQueue(schedule, stage, stages, **options)
    queue.begin_term(TERM)
    return queue


def add(queue: StepQueue, step: Step, incoming: Incoming) -> None:
    kind, index = incoming
    match kind:
        case "task" | "labels":
            queue.add_task(*step.task(index, labels_only=kind == "labels"))
        case "gradient":
            queue.add_gradient(step.gradient(index))
        case "commit":
            queue.add_commit(step.commit())


def add_all(queue: StepQueue, step: Step, kind: Literal["task", "labels", "gradient"] = "task") -> None:
    for index in range(step.count):
        add(queue, step, (kind, index))


def run(queue: StepQueue) -> Iterator[tuple[str, int]]:
    """Run all operations that are ready."""
    while (operation := queue.next_operation()) is not None:
        queue.mark_done(operation)
        yield describe(operation)


def describe(operation: StepOperation) -> tuple[str, int]:
    match operation:
        case Forward(micro_batch=micro_batch):
            return "forward", micro_batch.index
        case Backward(micro_batch=micro_batch):
            return "backward", micro_batch.index
        case Commit(progress=progress):
            return "commit", progress.steps


def next_of(queue: StepQueue) -> StepOperation:
    operation = queue.next_operation()
    assert operation is not None
    return operation


def commit_last_stage_step(queue: StepQueue, step: Step) -> None:
    add_all(queue, step)
    list(run(queue))
    add(queue, step, ("commit", 0))
    assert list(run(queue)) == [("commit", 1)]
