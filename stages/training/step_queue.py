"""What a stage has to do next: the steps that have come to it, and how far it is with the first of them. Pure.

* Steps are done one after the other, in the order in which their first micro-batch came, and never mixed.
* Within a step the order of operations is that of its schedule, whatever the order in which messages come: gradients
  add up in one order only.
* A step that is trained ends with its commit, one that is evaluated with its last forward. One that failed stays
  until the term ends.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field

from pydantic import ValidationError

from brokers.errors import WireError
from brokers.protocol.messages import Gradient, StepMessage, Task
from brokers.protocol.safetensors_codec import TensorView
from brokers.protocol.topics import NAME_PATTERN
from brokers.protocol.training import (
    LABELS_TENSOR,
    MICRO_BATCH_LIMIT,
    SETTINGS_LIMIT_CHARACTERS,
    MicroBatch,
    SourceProgress,
)
from stages.training.errors import BadStep, StaleTerm, UnknownForward, WorkerOnStandby
from stages.training.schedule import ScheduledOp, ScheduleName, operations

# Steps that wait for their turn: each source has one, or two.
STEPS_LIMIT = 128
STEPS_LIMIT_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Forward:
    """Do the forward of a micro-batch."""

    micro_batch: MicroBatch
    task: Task
    labels: TensorView | None = None  # where they came by themselves


@dataclass(frozen=True, slots=True)
class Backward:
    """Do its backward; `gradient` is None at the last stage, which has the loss."""

    micro_batch: MicroBatch
    request_id: bytes
    gradient: Gradient | None
    task: Task  # its content has been let go of


@dataclass(frozen=True, slots=True)
class Commit:
    """Make the step a version, with the learning rate `lr`; `progress` is how far its source is then."""

    number: int
    message: StepMessage
    source: str
    lr: float
    progress: SourceProgress


StepOperation = Forward | Backward | Commit


@dataclass(slots=True, eq=False)
class _QueuedStep:
    """One step."""

    first: MicroBatch
    source: str
    reply: str
    ops: tuple[ScheduledOp, ...]
    done: int = 0
    failed: bool = False
    commit: Commit | None = None
    waiting: dict[int, tuple[MicroBatch, Task]] = field(default_factory=dict)
    begun: dict[int, tuple[MicroBatch, Task]] = field(default_factory=dict)
    gradients: dict[int, Gradient] = field(default_factory=dict)


class StepQueue:
    """The steps of one stage, `stage` (from 0) of `stages`. `awaits_labels`: they come by themselves."""

    def __init__(self, schedule: ScheduleName, stage: int, stages: int, *, awaits_labels: bool = False) -> None:
        self.term = 0
        self.duplicates = 0
        self.is_standby = True
        self._schedule, self._stage, self._stages = schedule, stage, stages
        self._is_last = stage == stages - 1
        self._awaits_labels = awaits_labels
        self._steps: dict[str, _QueuedStep] = {}
        self._labels: dict[bytes, TensorView] = {}
        self._over: dict[str, None] = {}  # the latest steps of this term that have ended, the oldest first

    def __len__(self) -> int:
        """Micro-batches that wait."""
        return sum(len(step.waiting) for step in self._steps.values())

    def begin_term(self, term: int) -> None:
        """Whatever was in hand has been given up."""
        self.term = term
        self.is_standby = False
        self._steps.clear()
        self._labels.clear()
        self._over.clear()

    def stand_by(self, term: int) -> None:
        """The same, and nothing of this term is done here: who has not heard of it yet may still send some of it."""
        self.begin_term(term)
        self.is_standby = True

    @property
    def has_uncommitted_work(self) -> bool:
        """Whether something has been done for the step in hand that is no version yet."""
        return any(step.done and not step.failed for step in self._steps.values())

    @property
    def current_source(self) -> str:
        """Whose step is in hand; empty when there is none."""
        return next((step.source for step in self._steps.values()), "")

    @property
    def sources(self) -> set[str]:
        """Whose steps are in hand, or wait."""
        return {step.source for step in self._steps.values()}

    # In ---------------------------------------------------------------------------------------------------------

    def add_task(self, task: Task, micro: MicroBatch) -> str | None:
        """A micro-batch came; if there is no room, why. Raises `StaleTerm`, `WorkerOnStandby` or `BadStep`."""
        self._check_term(micro.term)
        step = self._steps.get(micro.step)
        if micro.step in self._over or (step and micro.index in step.begun):
            self.duplicates += 1
            return None
        tensors = getattr(task.content, "tensors", {})
        if self._awaits_labels and set(tensors) == {LABELS_TENSOR}:
            if len(self._labels) >= STEPS_LIMIT * MICRO_BATCH_LIMIT:
                return f"labels of {len(self._labels)} micro-batches wait already"
            self._labels[task.request_id] = tensors[LABELS_TENSOR]
            return None
        if step is None:
            if len(self._steps) >= STEPS_LIMIT or self._nbytes + task.content.nbytes > STEPS_LIMIT_BYTES:
                return f"{len(self._steps)} steps wait already"
            ops = operations(self._schedule, self._stage, self._stages, micro.count, micro.mode)
            step = self._steps[micro.step] = _QueuedStep(micro, task.source, task.reply_to.topic, ops)
        _check_alike(step.first, micro)
        if micro.index in step.waiting:
            self.duplicates += 1
        else:
            step.waiting[micro.index] = micro, task
        return None

    def add_gradient(self, gradient: Gradient) -> None:
        """A gradient came. Raises `UnknownForward` where no forward of the step in hand waits for it."""
        for step in self._steps.values():
            for index, (_, task) in step.begun.items():
                if task.request_id == gradient.request_id and not self._is_last:
                    if index in step.gradients or ("backward", index) in step.ops[: step.done]:
                        break
                    step.gradients[index] = gradient
                    return
        raise UnknownForward(gradient.request_id.hex())

    def add_commit(self, word: StepMessage) -> None:
        """The source wants its step to become a version. Raises `StaleTerm`, `WorkerOnStandby` or `BadStep`."""
        self._check_term(word.term)
        step = self._steps.get(word.request_id.hex())
        if step is None or step.failed or step.done < len(step.ops):
            raise BadStep(f"step {word.request_id.hex()} cannot be committed: it is not prepared here")
        step.commit = _checked_commit(step, word)

    def rejection(self, order: StepMessage) -> WireError | None:
        """Why an order is not for this worker: of a former term, or to go back where another worker does."""
        if order.term < self.term:
            return StaleTerm(self.term, order.term)
        return WorkerOnStandby(order.term) if order.verb == "restore" and self.is_standby else None

    def _check_term(self, term: int) -> None:
        if term != self.term:
            raise StaleTerm(self.term, term)
        if self.is_standby:
            raise WorkerOnStandby(term)

    # What to do -------------------------------------------------------------------------------------------------

    def next_operation(self) -> StepOperation | None:
        """What can be done now; None while a message is missing for it."""
        if not self._steps:
            return None
        step = next(iter(self._steps.values()))
        if step.failed:
            return None
        if step.done == len(step.ops):
            return step.commit
        kind, index = step.ops[step.done]
        return self._forward(step, index) if kind == "forward" else self._backward(step, index)

    def _forward(self, step: _QueuedStep, index: int) -> Forward | None:
        if index not in step.waiting:
            return None
        micro, task = step.waiting[index]
        if not self._awaits_labels:
            return Forward(micro, task)
        labels = self._labels.get(task.request_id)
        return None if labels is None else Forward(micro, task, labels)

    def _backward(self, step: _QueuedStep, index: int) -> Backward | None:
        micro, task = step.begun[index]
        if self._is_last:
            return Backward(micro, task.request_id, None, task)
        gradient = step.gradients.get(index)
        return None if gradient is None else Backward(micro, task.request_id, gradient, task)

    def mark_done(self, work: StepOperation) -> bool:
        """It has been done; whether its step is prepared by that, and waits for its commit."""
        step = self._step_of(work)
        if step is None:
            return False
        match work:
            case Forward():
                index = work.micro_batch.index
                micro, task = step.waiting.pop(index)
                step.begun[index] = micro, task
                self._labels.pop(task.request_id, None)
            case Backward():
                step.gradients.pop(work.micro_batch.index, None)
            case Commit():
                self._end(step)
                return False
        step.done += 1
        if step.done < len(step.ops):
            return False
        if step.first.mode == "evaluate":
            self._end(step)
            return False
        return True

    def mark_failed(self, work: StepOperation) -> None:
        """It cannot be done: nothing more is, until the term ends."""
        if step := self._step_of(work):
            step.failed = True

    def _step_of(self, work: StepOperation) -> _QueuedStep | None:
        """The step; None when it was given up while a part of it was being done."""
        return self._steps.get(work.message.request_id.hex() if isinstance(work, Commit) else work.micro_batch.step)

    def _end(self, step: _QueuedStep) -> None:
        del self._steps[step.first.step]
        self._over[step.first.step] = None
        if len(self._over) > STEPS_LIMIT:
            del self._over[next(iter(self._over))]

    @property
    def _nbytes(self) -> int:
        return sum(task.content.nbytes for step in self._steps.values() for _, task in step.waiting.values())


def _checked_commit(step: _QueuedStep, word: StepMessage) -> Commit:
    """What the word says to do. Raises `BadStep`: a weight that has changed could not be accounted for afterwards."""
    details, number = word.details, step.first.number
    source, lr = details.get("source"), details.get("lr")
    if source != step.source or not re.fullmatch(NAME_PATTERN, step.source):
        raise BadStep(f"its commit says source {source!r}: expected the name in its tasks, which say {step.source!r}")
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 <= lr <= sys.float_info.max:
        raise BadStep(f"its commit says lr {lr!r}: expected a number from 0")
    try:
        progress = SourceProgress(steps=number + 1, settings=details.get("settings", {}))
    except ValidationError as problem:
        why = f"up to 32 strings, numbers, booleans or nulls, and no more than {SETTINGS_LIMIT_CHARACTERS} characters as JSON"
        raise BadStep(f"its commit says settings that are not {why}") from problem
    return Commit(number, word, step.source, float(lr), progress)


def _check_alike(first: MicroBatch, other: MicroBatch) -> None:
    for name in ("count", "rows", "number", "mode"):
        expected, actual = getattr(first, name), getattr(other, name)
        if expected != actual:
            raise BadStep(f"micro-batch {other.index} says {name} {actual}, the first one of its step {expected}")
