"""The steps that a stage has received, and the operation that it can run next.

* Steps run one after the other, in the order in which their first micro-batches arrived; they are never interleaved.
* Operations of a step run in the order of the schedule, for any order of messages: gradients accumulate in one order
  only, that of the micro-batches, as in the unsplit network, to the last bit.
* A training step ends with its commit, an evaluation with its last forward. A failed step blocks the queue until the
  term ends.

Schedules:

* gpipe (Huang et al., 2019): all forwards, then all backwards; a stage saves one forward per micro-batch of the step.
* 1f1b (PipeDream-Flush, as in Megatron-LM): the n-th stage from the end begins with n forwards, then alternates one
  backward and one forward; it saves at most n forwards.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import ValidationError

from brokers.errors import WireError
from brokers.protocol.messages import Gradient, StepMessage, Task, TensorContent
from brokers.protocol.safetensors_codec import TensorView
from brokers.protocol.topics import NAME_PATTERN
from brokers.protocol.training import (
    LABELS_TENSOR,
    MICRO_BATCH_LIMIT,
    SETTINGS_LIMIT_CHARACTERS,
    MicroBatch,
    SourceProgress,
    StepMode,
)

ScheduleName = Literal["1f1b", "gpipe"]
ScheduledOp = tuple[Literal["forward", "backward"], int]  # the operation and the index of its micro-batch
# Each source has one or two steps in the queue.
STEPS_LIMIT = 128
STEPS_LIMIT_BYTES = 512 << 20


def operations(
    name: ScheduleName, stage: int, stages: int, count: int, mode: StepMode = "train"
) -> tuple[ScheduledOp, ...]:
    """Return the operations of stage number `stage` (from 0) of `stages`, in a step of `count` micro-batches."""
    if mode == "evaluate":
        return tuple(("forward", index) for index in range(count))
    warmup = count if name == "gpipe" else min(count, stages - stage)
    ops: list[ScheduledOp] = [("forward", index) for index in range(warmup)]
    for index in range(count):
        ops.append(("backward", index))
        if warmup + index < count:
            ops.append(("forward", warmup + index))
    return tuple(ops)


@dataclass(frozen=True, slots=True)
class Forward:
    """Run the forward of a micro-batch; `labels` if they arrived in a separate message."""

    micro_batch: MicroBatch
    task: Task
    labels: TensorView | None = None


@dataclass(frozen=True, slots=True)
class Backward:
    """Run the backward of a micro-batch; `gradient` is None at the last stage, which has the loss."""

    micro_batch: MicroBatch
    gradient: Gradient | None
    task: Task


@dataclass(frozen=True, slots=True)
class Commit:
    """Make the step a version with the learning rate `lr`; `progress` is that of its source afterwards."""

    message: StepMessage
    source: str
    lr: float
    progress: SourceProgress


StepOperation = Forward | Backward | Commit


@dataclass(slots=True, eq=False)
class _Step:
    first: MicroBatch
    source: str
    ops: tuple[ScheduledOp, ...]
    completed_ops: int = 0
    failed: bool = False
    commit: Commit | None = None
    # By the index of the micro-batch: forwards to run, forwards that were run, gradients to apply.
    waiting: dict[int, tuple[MicroBatch, Task]] = field(default_factory=dict)
    begun: dict[int, tuple[MicroBatch, Task]] = field(default_factory=dict)
    gradients: dict[int, Gradient] = field(default_factory=dict)

    @property
    def is_prepared(self) -> bool:
        """Whether all its operations but the commit have been run."""
        return self.completed_ops == len(self.ops) and not self.failed


class StepQueue:
    """The steps of stage `stage` (from 0) of `stages`; with `awaits_labels`, labels arrive in separate messages."""

    def __init__(self, schedule: ScheduleName, stage: int, stages: int, *, awaits_labels: bool = False) -> None:
        self.term = 0
        self.is_standby = True
        self._schedule = schedule
        self._stage = stage
        self._stages = stages
        self._is_last = stage == stages - 1
        self._awaits_labels = awaits_labels
        self._steps: dict[str, _Step] = {}
        self._labels: dict[bytes, TensorView] = {}  # by request id
        self._finished: dict[str, None] = {}  # ids of the latest finished steps of this term, the oldest first

    def __len__(self) -> int:
        """Micro-batches that wait for their forward."""
        return sum(len(step.waiting) for step in self._steps.values())

    def begin_term(self, term: int) -> None:
        """Discard all steps, and accept those of `term`."""
        self.term = term
        self.is_standby = False
        self._steps.clear()
        self._labels.clear()
        self._finished.clear()

    def stand_by(self, term: int) -> None:
        """Discard all steps, and refuse those of `term`: sources that do not know yet may still send some."""
        self.begin_term(term)
        self.is_standby = True

    @property
    def has_uncommitted_work(self) -> bool:
        """Whether operations have been run for a step that is not committed yet."""
        return any(step.completed_ops and not step.failed for step in self._steps.values())

    @property
    def sources(self) -> set[str]:
        """The sources of all queued steps."""
        return {step.source for step in self._steps.values()}

    def add_task(self, task: Task, micro_batch: MicroBatch) -> None:
        """Queue a micro-batch. Raises `WireError` "Busy", "StaleTerm", "WorkerOnStandby" or "BadStep"."""
        self._check_term(micro_batch.term)
        step = self._steps.get(micro_batch.step)
        index = micro_batch.index
        if micro_batch.step in self._finished or (step and index in step.begun):
            return  # a duplicate
        tensors = task.content.tensors if isinstance(task.content, TensorContent) else {}
        if self._awaits_labels and set(tensors) == {LABELS_TENSOR}:
            if len(self._labels) >= STEPS_LIMIT * MICRO_BATCH_LIMIT:
                raise _busy_error(f"labels of {len(self._labels)} micro-batches")
            self._labels[task.request_id] = tensors[LABELS_TENSOR]
            return
        if step is None:
            if len(self._steps) >= STEPS_LIMIT or self._nbytes + task.content.nbytes > STEPS_LIMIT_BYTES:
                raise _busy_error(f"{len(self._steps)} steps")
            ops = operations(self._schedule, self._stage, self._stages, micro_batch.count, micro_batch.mode)
            step = self._steps[micro_batch.step] = _Step(micro_batch, task.source, ops)
        _check_same_step(step.first, micro_batch)
        step.waiting.setdefault(index, (micro_batch, task))

    def add_gradient(self, gradient: Gradient) -> None:
        """Queue a gradient. Raises `WireError` "UnknownForward" if no forward of a queued step waits for it."""
        for step in self._steps.values():
            for index, (_, task) in step.begun.items():
                if task.request_id == gradient.request_id and not self._is_last:
                    if index in step.gradients or ("backward", index) in step.ops[: step.completed_ops]:
                        break
                    step.gradients[index] = gradient
                    return
        raise unknown_forward_error(gradient.request_id)

    def add_commit(self, message: StepMessage) -> None:
        """Accept the commit of the current step. Raises `WireError` "StaleTerm", "WorkerOnStandby" or "BadStep"."""
        self._check_term(message.term)
        step = self._steps.get(message.request_id.hex())
        if step is None or not step.is_prepared:
            raise _step_error(f"step {message.request_id.hex()} cannot be committed: it is not prepared here")
        step.commit = _parse_commit(step, message)

    def check_command(self, command: StepMessage) -> None:
        """Raise `WireError` "StaleTerm" or "WorkerOnStandby" if a coordinator's command is not for this worker."""
        if command.term < self.term:
            raise _stale_term_error(self.term, command.term)
        if command.verb == "restore" and self.is_standby:
            raise _standby_error(command.term)

    def _check_term(self, term: int) -> None:
        if term != self.term:
            raise _stale_term_error(self.term, term)
        if self.is_standby:
            raise _standby_error(term)

    def next_operation(self) -> StepOperation | None:
        """Return the next operation in order; None while a message that it needs is missing."""
        step = next(iter(self._steps.values()), None)
        if step is None or step.failed:
            return None
        if step.is_prepared:
            return step.commit
        kind, index = step.ops[step.completed_ops]
        if kind == "forward":
            if index not in step.waiting:
                return None
            micro_batch, task = step.waiting[index]
            labels = self._labels.get(task.request_id)
            return None if self._awaits_labels and labels is None else Forward(micro_batch, task, labels)
        micro_batch, task = step.begun[index]
        gradient = step.gradients.get(index)
        return None if gradient is None and not self._is_last else Backward(micro_batch, gradient, task)

    def mark_done(self, operation: StepOperation) -> bool:
        """Record that an operation has been run. Returns whether its step is now prepared for the commit."""
        step = self._find_step(operation)
        if step is None:
            return False
        match operation:
            case Forward(micro_batch=micro_batch, task=task):
                del step.waiting[micro_batch.index]
                # Without its tensors: the backward needs the saved forward only.
                step.begun[micro_batch.index] = (micro_batch, replace(task, content=TensorContent({})))
                self._labels.pop(task.request_id, None)
            case Backward(micro_batch=micro_batch):
                step.gradients.pop(micro_batch.index, None)
            case Commit():
                self._finish(step)
                return False
        step.completed_ops += 1
        if step.is_prepared and step.first.mode == "evaluate":
            self._finish(step)
            return False
        return step.is_prepared

    def mark_failed(self, operation: StepOperation) -> None:
        """Record that an operation failed: no further operation is returned until the term ends."""
        if step := self._find_step(operation):
            step.failed = True

    def _find_step(self, operation: StepOperation) -> _Step | None:
        """The step of an operation; None if it was discarded while the operation ran."""
        if isinstance(operation, Commit):
            return self._steps.get(operation.message.request_id.hex())
        return self._steps.get(operation.micro_batch.step)

    def _finish(self, step: _Step) -> None:
        del self._steps[step.first.step]
        self._finished[step.first.step] = None
        if len(self._finished) > STEPS_LIMIT:
            del self._finished[next(iter(self._finished))]

    @property
    def _nbytes(self) -> int:
        return sum(task.content.nbytes for step in self._steps.values() for _, task in step.waiting.values())


def _parse_commit(step: _Step, message: StepMessage) -> Commit:
    """Validate the details of a commit before a weight changes. Raises `WireError` "BadStep"."""
    details: Mapping[str, object] = message.details
    source = details.get("source")
    lr = details.get("lr")
    if source != step.source or not re.fullmatch(NAME_PATTERN, step.source):
        raise _step_error(f"source of a commit must be the name in its tasks, {step.source!r}, is {source!r}")
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 <= lr <= sys.float_info.max:
        raise _step_error(f"lr of a commit must be a finite number from 0, is {lr!r}")
    try:
        progress = SourceProgress.model_validate(
            {"steps": step.first.number + 1, "settings": details.get("settings", {})}
        )
    except ValidationError as error:
        limits = f"at most 32 strings, numbers, booleans or nulls, and {SETTINGS_LIMIT_CHARACTERS} characters as JSON"
        raise _step_error(f"settings of a commit must be {limits}") from error
    return Commit(message, step.source, float(lr), progress)


def _check_same_step(first: MicroBatch, other: MicroBatch) -> None:
    for name in ("count", "rows", "number", "mode"):
        expected = getattr(first, name)
        actual = getattr(other, name)
        if expected != actual:
            raise _step_error(
                f"{name} of micro-batch {other.index} is {actual}, of the first one of its step {expected}"
            )


def unknown_forward_error(request: bytes) -> WireError:
    """Return the error for a gradient without a saved forward."""
    message = f"no saved forward of request {request.hex()}: the gradient is late, a duplicate, or for another worker"
    return WireError("UnknownForward", message, request=request.hex())


def _busy_error(contents: str) -> WireError:
    return WireError("Busy", f"the queue is full: {contents}", retry=True)


def _step_error(problem: str) -> WireError:
    return WireError("BadStep", problem)


def _stale_term_error(expected: int, actual: int) -> WireError:
    message = f"the message is of term {actual}, this worker is in term {expected}"
    return WireError("StaleTerm", message, retry=True, expected_term=expected, actual_term=actual)


def _standby_error(term: int) -> WireError:
    return WireError("WorkerOnStandby", f"another worker trains this stage in term {term}", retry=True, term=term)
