"""The presence record of a worker: its state and its load, published every second while it is up."""

import time
from collections.abc import Mapping, Sequence
from typing import Literal

from brokers.dispatch.presence import PREFETCH_TASKS, WorkerLoad, WorkerRecord
from brokers.dispatch.presence_publisher import PresencePublisher, describe_process
from brokers.protocol.training import TrainingStatus
from brokers.protocol.transport import Transport
from stages.worker.worker_context import WorkerContext

# Weight of the newest task in the moving average of task times.
_NEWEST_WEIGHT = 0.2
# A worker reports every second, even while its compute thread is busy: after a longer gap its process was frozen.
_FROZEN_S = 5.0
_COUNTERS = ("failed", "malformed", "rejected", "expired")


class WorkerPresence(PresencePublisher[WorkerRecord]):
    """Measures the load of one worker, and publishes and removes its record."""

    def __init__(self, transport: Transport, context: WorkerContext) -> None:
        self.state: Literal["up", "draining", "standby"] = "up"
        self.training: TrainingStatus | None = None
        record = WorkerRecord(
            worker=context.worker,
            stage=context.stage.name,
            pipeline=context.pipeline.name,
            site=context.stage.site,
            device=context.device,
            fingerprint="",
            capacity=context.stage.max_batch + PREFETCH_TASKS,
            **describe_process(),
        )
        super().__init__(transport, record)
        transport.on_reconnect(self._on_reconnect)
        self._reconnects = 0
        self._is_revoked = False
        self._done = 0
        self._task_ms = 0.0
        self._thawed_s = 0.0  # when this process was last found to have been frozen
        self._interval_begin_s = time.monotonic()
        self._interval_busy_s = 0.0
        self._interval_done = 0
        self._interval_waits_s: list[float] = []

    def set_model(self, fingerprint: str, formats: tuple[str, ...]) -> None:
        """Set the model's fingerprint and the Content Types that the worker accepts; before the first report."""
        self.record = self.record.model_copy(update={"fingerprint": fingerprint, "formats": formats})

    async def _on_reconnect(self) -> None:
        self._reconnects += 1

    # Load -------------------------------------------------------------------------------------------------------------

    def record_queue_waits(self, waits_s: Sequence[float]) -> None:
        """Tasks have left the queue after these times."""
        self._interval_waits_s += waits_s

    def record_compute(self, tasks: int, seconds: float) -> None:
        """The compute thread has been busy with so many tasks for so long."""
        task_ms = 1000 * seconds / tasks
        now_s = time.monotonic()
        self._detect_freeze(now_s)
        if not self._done:
            self._task_ms = task_ms
        elif now_s - seconds >= self._thawed_s:  # a time that includes a freeze says nothing about the speed
            self._task_ms = (1 - _NEWEST_WEIGHT) * self._task_ms + _NEWEST_WEIGHT * task_ms
        self._done += tasks
        self._interval_done += tasks
        self._interval_busy_s += seconds

    def _detect_freeze(self, now_s: float) -> None:
        if now_s - self._interval_begin_s > _FROZEN_S:
            self._thawed_s = now_s

    def _mean_wait_s(self, oldest_arrival_s: float | None, now_s: float) -> float:
        """Return how long tasks wait: the mean of those begun in this interval, or the oldest queued one's if longer.

        The mean alone would hide a queue behind one long task.
        """
        waits_s = self._interval_waits_s
        mean_s = sum(waits_s) / len(waits_s) if waits_s else 0.0
        return mean_s if oldest_arrival_s is None else max(mean_s, now_s - oldest_arrival_s)

    # The record -------------------------------------------------------------------------------------------------------

    async def report(
        self, queue: int, oldest_arrival_s: float | None = None, counters: Mapping[str, int] | None = None
    ) -> None:
        """Publish the record, with the load of the interval that ends now. The first report joins the stage.

        `queue` tasks wait, the oldest since `oldest_arrival_s` (monotonic seconds); `counters` has the keys "failed",
        "malformed", "rejected" and "expired".
        """
        if self._is_revoked:
            return
        now_s = time.monotonic()
        self._detect_freeze(now_s)
        interval_s = max(now_s - self._interval_begin_s, 1e-3)
        load = WorkerLoad(
            queue=queue,
            queue_ms=round(1000 * self._mean_wait_s(oldest_arrival_s, now_s), 3),
            done=self._done,
            busy=round(min(1.0, self._interval_busy_s / interval_s), 3),
            rate=round(self._interval_done / interval_s, 2),
            task_ms=round(self._task_ms, 3),
            **{name: (counters or {}).get(name, 0) for name in _COUNTERS},
        )
        self._interval_begin_s = now_s
        self._interval_busy_s = 0.0
        self._interval_done = 0
        self._interval_waits_s = []
        await self.publish(load=load, state=self.state, reconnects=self._reconnects, training=self.training)

    def revoke(self, *, keep_record: bool) -> None:
        """Report no more; `keep_record`: another worker with this id uses the topic, so that its record must stay."""
        self._is_revoked = True
        if keep_record:
            self._joined_s = None
