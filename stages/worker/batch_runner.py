"""The work of a worker's compute thread: prepare tasks, execute them in batches, finish and time each one.

Independent of the network and the queue: each task is completed with its outputs or its error.
"""

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

# An executor may raise anything. A library that calls sys.exit ends its task, not the worker.
_EXECUTOR_ERRORS = (Exception, SystemExit)


@dataclass(slots=True, eq=False)
class QueuedTask:
    """A task at this worker, since `arrived_s` (monotonic seconds); once it has run, with its `outputs` or `error`.

    If the executor dispatched the request itself, `outputs` is None and `next_stage` is its destination. `trace` is the
    span of the work here.
    """

    task: Task
    arrived_s: float
    context: TaskContext
    trace: TraceContext = field(init=False)
    inputs: Tensors = field(default_factory=dict)
    hop: Hop = field(init=False)
    outputs: TensorContent | None = None
    next_stage: str | None = None
    error: Exception | SystemExit | None = None

    def __post_init__(self) -> None:
        self.trace = start_span(self.task.request_id, self.task.trace)
        self.hop = Hop("", "")

    def remaining_ms(self, now_s: float) -> float | None:
        """Return the time until the deadline; None without one."""
        if self.task.deadline_ms is None:
            return None
        return self.task.deadline_ms - 1000 * (now_s - self.arrived_s)

    def is_expired(self, now_s: float) -> bool:
        remaining_ms = self.remaining_ms(now_s)
        return remaining_ms is not None and remaining_ms <= 0

    def deadline_error(self, stage: str) -> DeadlinePassed:
        return DeadlinePassed(self.task.request_id.hex(), self.task.deadline_ms or 0.0, f"stage {stage!r}")


class BatchRunner:
    """Runs an executor on batches of tasks. All calls are in one thread."""

    def __init__(self, executor: TaskExecutor, stage: str, worker: str) -> None:
        self._executor = executor
        self._stage = stage
        self._worker = worker

    def run(self, tasks: Sequence[QueuedTask]) -> list[tuple[int, float]]:
        """Set `outputs` or `error`, and the hop, of each task; an error of the executor fails the tasks of its call.

        Returns the number of tasks of each call, and the milliseconds for which they kept the worker busy.
        """
        ready = [queued for queued in tasks if self._prepare(queued, is_batch=len(tasks) > 1)]
        batches = []
        for group in self._group(ready):
            begin_s = time.monotonic()
            self._execute(group)
            busy_ms = sum(queued.hop.decode_ms for queued in group) + _ms_since(begin_s)
            batches.append((len(group), busy_ms))
        return batches

    def _group(self, tasks: list[QueuedTask]) -> list[list[QueuedTask]]:
        if len(tasks) < 2 or not self._executor.batchable:
            return [[queued] for queued in tasks]  # prepared inputs may be anything: they are not inspected
        return [[tasks[index] for index in group] for group in group_compatible([queued.inputs for queued in tasks])]

    def _prepare(self, queued: QueuedTask, *, is_batch: bool) -> bool:
        begin_s = time.monotonic()
        queue_ms = 1000 * (begin_s - queued.arrived_s)
        try:
            if queued.is_expired(begin_s):
                raise queued.deadline_error(self._stage)
            queued.inputs = self._executor.prepare(queued.task.content, queued.context)
            if is_batch and self._executor.batchable:
                _check_dict(queued.inputs, "prepare() of a batchable executor must return a dict of named arrays")
        except _EXECUTOR_ERRORS as error:
            self._fail(queued, error)
        queued.hop = Hop(self._stage, self._worker, round(queue_ms, 3), round(_ms_since(begin_s), 3))
        return queued.error is None

    def _execute(self, tasks: list[QueuedTask]) -> None:
        begin_s = time.monotonic()
        try:
            inputs, rows = join_requests([queued.inputs for queued in tasks])
            outputs = self._executor.execute(inputs, tasks[0].context)
            if outputs is None and len(tasks) > 1:
                raise no_output_error(self._stage, len(tasks))
            if outputs is not None:
                _check_dict(outputs, "execute() must return a dict of named arrays, or None")
            split = [None] if outputs is None else split_outputs(outputs, rows)
        except _EXECUTOR_ERRORS as error:
            for queued in tasks:
                self._fail(queued, error)
            return
        compute_ms = _ms_since(begin_s)
        for queued, task_outputs in zip(tasks, split, strict=True):
            self._finish(queued, task_outputs, compute_ms, len(tasks))

    def _finish(self, queued: QueuedTask, outputs: Tensors | None, compute_ms: float, batch: int) -> None:
        begin_s = time.monotonic()
        queued.inputs = {}
        try:
            if outputs is not None:
                finished = self._executor.finish(outputs, queued.context)
                tensors = {name: from_array(value) for name, value in finished.items()}
                queued.outputs = TensorContent(tensors, queued.context.metadata)
        except _EXECUTOR_ERRORS as error:
            self._fail(queued, error)
            return
        queued.hop = Hop(
            stage=self._stage,
            worker=self._worker,
            queue_ms=queued.hop.queue_ms,
            decode_ms=queued.hop.decode_ms,
            compute_ms=round(compute_ms, 3),
            encode_ms=round(_ms_since(begin_s), 3),
            bytes_in=queued.task.content.nbytes,
            bytes_out=queued.outputs.nbytes if queued.outputs else 0,
            batch=batch,
        )

    def _fail(self, queued: QueuedTask, error: Exception | SystemExit) -> None:
        if not isinstance(error, SparseError):
            log.error("stage %s failed a task", self._stage, exc_info=error)
        queued.error = error


def no_output_error(stage: str, requests: int) -> SparseError:
    """Return the error for an executor that returned None without dispatching the request."""
    if requests > 1:
        hint = f"for a batch of {requests} requests: an executor that calls node.dispatch() must not be batchable"
    else:
        hint = "without calling node.dispatch(): return a dict, or dispatch the request first"
    return SparseError("NoOutput", f"stage {stage!r}: execute() returned None {hint}", stage=stage, requests=requests)


def _check_dict(value: object, rule: str) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{rule}, it returned {type(value).__name__}")


def _ms_since(begin_s: float) -> float:
    return 1000 * (time.monotonic() - begin_s)
