"""What a worker that trains tells the monitor of its node: each operation, and each micro-batch that it is done with.

A micro-batch that is trained is done with after its backward; one of an evaluation, which is inference to who counts
phases, after its forward.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from brokers.errors import error_code
from brokers.protocol.messages import Task
from brokers.protocol.traceparent import TraceContext, start_span
from brokers.protocol.training import LABELS_TENSOR
from brokers.telemetry.client import EventClient
from brokers.telemetry.schema import BatchPhase
from stages.training.step_queue import Backward, Commit, Forward, StepOperation
from stages.training.step_timing import StepTimings


@dataclass(slots=True, eq=False)
class _OpenMicroBatch:
    """A micro-batch, and the sums of what was done for it so far."""

    rows: int
    trace: TraceContext
    sums: Counter[str] = field(default_factory=Counter)


class TrainingTelemetry:
    """Of one worker; `times` is where the durations and sizes of its operations are added up."""

    def __init__(self, events: EventClient | None, times: StepTimings) -> None:
        self._events, self._times = events or EventClient(), times
        self._begun: dict[bytes, _OpenMicroBatch] = {}
        self._trained: list[int] = []  # the rows of each micro-batch since the last update

    def reset(self) -> None:
        """The step in hand is given up."""
        self._begun.clear()
        self._trained.clear()

    def trace_context(self, task: Task) -> TraceContext:
        """The span of what is done here for a micro-batch whose forward has begun."""
        return self._begun[task.request_id].trace

    @contextmanager
    def record_operation(self, work: StepOperation) -> Iterator[None]:
        """Tell of an operation, which is the block: how long it took, and what it failed of."""
        if isinstance(work, Forward):
            self._begun[work.task.request_id] = _OpenMicroBatch(
                _rows(work), start_span(work.task.request_id, work.task.trace)
            )
        begin_s, before, error = time.monotonic(), self._times.sums(), ""
        try:
            yield
        except BaseException as problem:
            error = error_code(problem)
            raise
        finally:
            busy_ms = 1000 * (time.monotonic() - begin_s)
            if isinstance(work, Commit):
                self._committed(busy_ms)
            else:
                self._operated(work, busy_ms, self._times.sums() - before, error)

    def _committed(self, busy_ms: float) -> None:
        self._batch("update", len(self._trained), sum(self._trained), busy_ms)
        self._trained.clear()

    def _operated(self, work: Forward | Backward, busy_ms: float, spent: Counter[str], error: str) -> None:
        begun = self._begun.get(work.task.request_id)
        if begun is None:  # it was given up meanwhile
            return
        begun.sums += spent
        phase: BatchPhase = "backward" if isinstance(work, Backward) else "forward"
        if work.micro_batch.mode == "evaluate":
            phase = "inference"
        self._batch(phase, 1, begun.rows, busy_ms)
        if phase == "forward" and not error:
            return
        del self._begun[work.task.request_id]
        if phase == "backward":
            self._trained.append(begun.rows)
        self._task(work.task, begun, error)

    def _batch(self, phase: BatchPhase, tasks: int, rows: int, busy_ms: float) -> None:
        self._events.emit("batch_processed", phase=phase, tasks=tasks, rows=rows, busy_ms=round(busy_ms, 3))

    def _task(self, task: Task, begun: _OpenMicroBatch, error: str) -> None:
        sums: Counter[str] = begun.sums
        self._events.emit(
            "task_processed",
            request=task.request_id,
            decode_ms=round(sums["decode_ms"], 3),
            compute_ms=round(sums["forward_ms"] + sums["backward_ms"], 3),
            encode_ms=round(sums["encode_ms"], 3),
            bytes_in=sums["bytes_in"],
            bytes_out=sums["bytes_out"],
            error=error,
            trace=begun.trace.trace_id,
            span=begun.trace.span_id,
            parent=task.trace.span_id if task.trace else "",
        )


def _rows(work: Forward) -> int:
    """Samples of a micro-batch: as many as it has labels, wherever they come from."""
    tensors = getattr(work.task.content, "tensors", {})
    labels = work.labels or tensors.get(LABELS_TENSOR)
    shape = labels.shape if labels else next((tensor.shape for tensor in tensors.values()), ())
    return int(shape[0]) if shape else 0
