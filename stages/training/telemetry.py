"""Durations and sizes of training operations: sums of a step for its source, events for the monitor of the node.

A trained micro-batch is finished after its backward; one of an evaluation, which counts as inference, after its
forward.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from brokers.errors import error_code
from brokers.protocol.messages import Task, TensorContent
from brokers.protocol.traceparent import TraceContext, start_span
from brokers.protocol.training import LABELS_TENSOR
from brokers.telemetry.client import EventClient
from brokers.telemetry.schema import BatchPhase
from stages.training.step_queue import Backward, Commit, Forward, StepOperation


@dataclass(slots=True, eq=False)
class _OpenMicroBatch:
    """A micro-batch that is not finished; `sums` are those of its operations so far."""

    rows: int
    trace: TraceContext
    sums: Counter[str] = field(default_factory=Counter)


class TrainingTelemetry:
    """Sums by name (milliseconds and bytes) of the current step and its micro-batches, at one worker."""

    def __init__(self, events: EventClient) -> None:
        self._events = events
        self._step_sums: Counter[str] = Counter()
        self._micro_batches: dict[bytes, _OpenMicroBatch] = {}  # by request id
        self._current: _OpenMicroBatch | None = None  # the micro-batch of the operation in progress
        self._trained_rows: list[int] = []  # of each micro-batch since the last commit

    def reset(self) -> None:
        """Discard the current step."""
        self._step_sums.clear()
        self._micro_batches.clear()
        self._trained_rows.clear()

    def pop_step_sums(self) -> dict[str, float]:
        """Return the sums of the step so far, and start again at 0."""
        sums: dict[str, float] = {name: round(value, 3) for name, value in self._step_sums.items()}
        self._step_sums.clear()
        return sums

    def trace_context(self, task: Task) -> TraceContext:
        """Return the span of a micro-batch whose forward has begun."""
        return self._micro_batches[task.request_id].trace

    def add(self, name: str, amount: float) -> None:
        """Add to a sum of the step and of the micro-batch of the operation in progress."""
        self._step_sums[name] += amount  # type: ignore[assignment]  # a Counter adds floats as well
        if self._current is not None:
            self._current.sums[name] += amount  # type: ignore[assignment]

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the duration of the block."""
        begin_s = time.monotonic()
        try:
            yield
        finally:
            self.add(name, 1000 * (time.monotonic() - begin_s))

    @contextmanager
    def record_operation(self, operation: StepOperation) -> Iterator[None]:
        """Report the block as one operation: its duration, and the code of the error that it raises."""
        if isinstance(operation, Forward):
            task = operation.task
            trace = start_span(task.request_id, task.trace)
            self._micro_batches[task.request_id] = _OpenMicroBatch(_count_rows(operation), trace)
        if not isinstance(operation, Commit):
            self._current = self._micro_batches.get(operation.task.request_id)
        begin_s = time.monotonic()
        error = ""
        try:
            yield
        except BaseException as problem:
            error = error_code(problem)
            raise
        finally:
            busy_ms = 1000 * (time.monotonic() - begin_s)
            if isinstance(operation, Commit):
                self._emit_batch("update", len(self._trained_rows), sum(self._trained_rows), busy_ms)
                self._trained_rows.clear()
            elif self._current is not None:
                self._finish_operation(operation, self._current, busy_ms, error)
            self._current = None

    def _finish_operation(
        self, operation: Forward | Backward, micro_batch: _OpenMicroBatch, busy_ms: float, error: str
    ) -> None:
        phase: BatchPhase = "backward" if isinstance(operation, Backward) else "forward"
        if operation.micro_batch.mode == "evaluate":
            phase = "inference"
            self._step_sums.clear()  # they would be added to those of the next step
        self._emit_batch(phase, 1, micro_batch.rows, busy_ms)
        if phase == "forward" and not error:
            return
        del self._micro_batches[operation.task.request_id]
        if phase == "backward":
            self._trained_rows.append(micro_batch.rows)
        self._emit_task(operation.task, micro_batch, error)

    def _emit_batch(self, phase: BatchPhase, tasks: int, rows: int, busy_ms: float) -> None:
        self._events.emit("batch_processed", phase=phase, tasks=tasks, rows=rows, busy_ms=round(busy_ms, 3))

    def _emit_task(self, task: Task, micro_batch: _OpenMicroBatch, error: str) -> None:
        sums: Counter[str] = micro_batch.sums
        self._events.emit(
            "task_processed",
            request=task.request_id,
            decode_ms=round(sums["decode_ms"], 3),
            compute_ms=round(sums["forward_ms"] + sums["backward_ms"], 3),
            encode_ms=round(sums["encode_ms"], 3),
            bytes_in=sums["bytes_in"],
            bytes_out=sums["bytes_out"],
            error=error,
            trace=micro_batch.trace.trace_id,
            span=micro_batch.trace.span_id,
            parent=task.trace.span_id if task.trace else "",
        )


def _count_rows(operation: Forward) -> int:
    """Count the rows of a micro-batch: as many as it has labels."""
    tensors = operation.task.content.tensors if isinstance(operation.task.content, TensorContent) else {}
    labels = operation.labels or tensors.get(LABELS_TENSOR)
    shape = labels.shape if labels else next((tensor.shape for tensor in tensors.values()), ())
    return int(shape[0]) if shape else 0
