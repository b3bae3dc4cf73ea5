"""What a worker's compute thread does with its tasks: prepare, batch, execute, split, finish, and time each part.

No network and no queue: tasks in, outcomes out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from brokers.errors import DeadlinePassed, SparseError
from brokers.protocol.messages import Task, TensorContent
from brokers.protocol.safetensors_codec import from_array
from brokers.protocol.stage_timing import Hop
from brokers.protocol.traceparent import TraceContext, start_span
from stages.executor import TaskContext, TaskExecutor, Tensors
from stages.worker.batching import group_compatible, join_requests, split_outputs

log = logging.getLogger(__name__)

# A library that calls sys.exit in a task ends that task, and not the worker.
_ANYTHING = (Exception, SystemExit)


@dataclass(eq=False)
class NoOutput(SparseError):
    """An executor that returned None without having passed on each of the requests it was called for."""

    stage: str
    requests: int

    def __str__(self) -> str:
        if self.requests > 1:
            hint = f"for {self.requests} requests at once: one that calls node.dispatch must not be batchable"
        else:
            hint = "and passed nothing on: return a dict, or call node.dispatch once before"
        return f"the executor of stage {self.stage!r} gave None {hint}"


@dataclass(slots=True, eq=False)
class QueuedTask:
    """A task in a worker's hands, and when it came (monotonic seconds). `trace` is the span of what is done here."""

    task: Task
    arrived_s: float
    context: TaskContext
    inputs: Tensors = field(default_factory=dict)
    queue_ms: float = 0.0
    decode_ms: float = 0.0
    trace: TraceContext = field(init=False)

    def __post_init__(self) -> None:
        self.trace = start_span(self.task.request_id, self.task.trace)

    def remaining_ms(self, now_s: float) -> float | None:
        """What is left of the deadline; None where there is none."""
        if self.task.deadline_ms is None:
            return None
        return self.task.deadline_ms - 1000 * (now_s - self.arrived_s)

    def is_expired(self, now_s: float) -> bool:
        left_ms = self.remaining_ms(now_s)
        return left_ms is not None and left_ms <= 0

    def deadline_error(self, stage: str) -> DeadlinePassed:
        """What is told of it then."""
        return DeadlinePassed(self.task.request_id.hex(), self.task.deadline_ms or 0.0, f"stage {stage!r}")


@dataclass(frozen=True, slots=True)
class Completed:
    """A body to pass on; None when the executor has passed the request on itself."""

    queued: QueuedTask
    body: TensorContent | None
    hop: Hop


@dataclass(frozen=True, slots=True)
class Failed:
    queued: QueuedTask
    error: Exception | SystemExit


TaskOutcome = Completed | Failed


@dataclass(frozen=True, slots=True)
class ExecutedBatch:
    """Tasks that went into one call of the executor, and how long they kept the worker busy in all."""

    tasks: int
    busy_ms: float


class BatchRunner:
    """An executor, and the arithmetic of batches and durations around it. Runs in one thread."""

    def __init__(self, executor: TaskExecutor, stage: str, worker: str) -> None:
        self.batches: list[ExecutedBatch] = []  # of the latest `work`
        self.executor = executor
        self.stage = stage
        self.worker = worker

    def run(self, jobs: Sequence[QueuedTask]) -> list[TaskOutcome]:
        """The outcome of each job; an executor's exception fails the jobs it was called for, and no others."""
        self.batches = []
        outcomes: list[TaskOutcome] = []
        ready: list[QueuedTask] = []
        for job in jobs:
            try:
                self._prepare(job)
                if self.executor.batchable and len(jobs) > 1:
                    _check_named(job.inputs)  # before it is laid beside others
                ready.append(job)
            except _ANYTHING as error:  # an executor may raise what it likes; the sender is told
                outcomes.append(self._failed(job, error))
        for group in self._groups(ready):
            begin_s = time.monotonic()
            outcomes += self._execute(group)
            busy_ms = sum(job.decode_ms for job in group) + 1000 * (time.monotonic() - begin_s)
            self.batches.append(ExecutedBatch(len(group), busy_ms))
        return outcomes

    def _groups(self, jobs: list[QueuedTask]) -> list[list[QueuedTask]]:
        """What goes into one call. Where nothing is batched, what was prepared may be anything: it is not looked at."""
        if len(jobs) < 2 or not self.executor.batchable:
            return [[job] for job in jobs]
        return [[jobs[index] for index in group] for group in group_compatible([job.inputs for job in jobs])]

    def _prepare(self, job: QueuedTask) -> None:
        begin_s = time.monotonic()
        if job.is_expired(begin_s):
            raise job.deadline_error(self.stage)
        job.queue_ms = 1000 * (begin_s - job.arrived_s)
        job.inputs = self.executor.prepare(job.task.content, job.context)
        job.decode_ms = 1000 * (time.monotonic() - begin_s)

    def _execute(self, jobs: list[QueuedTask]) -> list[TaskOutcome]:
        begin_s = time.monotonic()
        try:
            tensors, rows = join_requests([job.inputs for job in jobs])
            given = self.executor.execute(tensors, jobs[0].context)
            if given is None and len(jobs) > 1:
                raise NoOutput(self.stage, len(jobs))
            answers = [None] if given is None else split_outputs(_checked(given), rows)
        except _ANYTHING as error:
            return [self._failed(job, error) for job in jobs]
        compute_ms = 1000 * (time.monotonic() - begin_s)
        return [self._finish(job, answer, compute_ms, len(jobs)) for job, answer in zip(jobs, answers, strict=True)]

    def _finish(self, job: QueuedTask, answer: Tensors | None, compute_ms: float, batch: int) -> TaskOutcome:
        begin_s = time.monotonic()
        job.inputs = {}
        body = None
        try:
            if answer is not None:
                finished = self.executor.finish(answer, job.context)
                body = TensorContent(
                    {name: from_array(value) for name, value in finished.items()}, job.context.metadata
                )
        except _ANYTHING as error:
            return self._failed(job, error)
        hop = Hop(
            stage=self.stage,
            worker=self.worker,
            queue_ms=round(job.queue_ms, 3),
            decode_ms=round(job.decode_ms, 3),
            compute_ms=round(compute_ms, 3),
            encode_ms=round(1000 * (time.monotonic() - begin_s), 3),
            bytes_in=job.task.content.nbytes,
            bytes_out=body.nbytes if body else 0,
            batch=batch,
        )
        return Completed(job, body, hop)

    def _failed(self, job: QueuedTask, error: Exception | SystemExit) -> Failed:
        if not isinstance(error, SparseError):
            log.error("stage %s failed a task", self.stage, exc_info=error)
        return Failed(job, error)


def _checked(given: object) -> Tensors:
    if not isinstance(given, dict):
        raise TypeError(f"execute must return a dict of named arrays, or None, returned {type(given).__name__}")
    return given


def _check_named(prepared: object) -> None:
    if not isinstance(prepared, dict):
        kind = type(prepared).__name__
        raise TypeError(f"prepare of a batchable executor must return a dict of named arrays, returned {kind}")
