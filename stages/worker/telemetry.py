"""What a worker tells the monitor of its node: each task that it is done with, and each batch that it has computed."""

from __future__ import annotations

from dataclasses import replace

from brokers.protocol.stage_timing import Hop
from brokers.telemetry.client import EventClient
from stages.worker.batch_runner import Completed, ExecutedBatch, TaskOutcome


class InferenceTelemetry:
    """Of one worker. With no client, or with nobody who listens, it costs next to nothing."""

    def __init__(self, events: EventClient | None) -> None:
        self._events = events or EventClient()

    def now_ns(self) -> int:
        """When something was, for who tells it later."""
        return self._events.now_ns()

    def record_batch(self, batch: ExecutedBatch) -> None:
        """It was computed just now."""
        self._events.emit("batch_processed", tasks=batch.tasks, busy_ms=round(batch.busy_ms, 3))

    def record_task(self, outcome: TaskOutcome, ended_ns: int, error: str, detour_bytes: int | None) -> None:
        """A task was computed by then, and has left now, or failed. `detour_bytes`: what its executor passed on."""
        job = outcome.queued
        hop = (
            outcome.hop
            if isinstance(outcome, Completed)
            else _unfinished(outcome.queued.queue_ms, outcome.queued.decode_ms)
        )
        if detour_bytes is not None:
            hop = replace(hop, bytes_out=detour_bytes)
        self._events.emit(
            "task_processed",
            time_ns=ended_ns,
            request=job.task.request_id,
            queue_ms=hop.queue_ms,
            decode_ms=hop.decode_ms,
            compute_ms=hop.compute_ms,
            encode_ms=hop.encode_ms,
            bytes_in=job.task.content.nbytes,
            bytes_out=hop.bytes_out,
            batch=hop.batch,
            error=error,
            trace=job.trace.trace_id,
            span=job.trace.span_id,
            parent=job.task.trace.span_id if job.task.trace else "",
        )


def _unfinished(queue_ms: float, decode_ms: float) -> Hop:
    return Hop("", "", round(queue_ms, 3), round(decode_ms, 3))
