"""The presence record of a worker, with its state and load; detection of conflicting workers through these records.

Workers conflict if two have one id, or two of one stage different models. A worker checks twice. Before it joins, it
reads the records of its stage; a retained record may have outlived its worker, so only a record that is renewed
prevents the worker from joining. Two workers that start at the same instant see no record of each other and both join,
so each watches for CONFLICT_WATCH_S more. The order of joining cannot be determined from clocks or delays: of two that
watch, the one with the smaller (id, instance) stays, a rule that both apply to the same two records.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

from brokers.dispatch.presence import PREFETCH_TASKS, WorkerLoad, WorkerRecord
from brokers.dispatch.presence_publisher import PresencePublisher, describe_process
from brokers.dispatch.worker_registry import PresenceEntry, PresenceEvent, PresenceListener, WorkerRegistry
from brokers.errors import SparseError, UsageError
from brokers.protocol.topics import StageTopics
from brokers.protocol.training import TrainingStatus
from brokers.protocol.transport import Transport
from stages.worker.worker_context import WorkerContext

# Weight of the newest task in the moving average of task times.
_NEWEST_WEIGHT = 0.2
# A worker reports every second, even while its compute thread is busy: after a longer gap its process was frozen.
_FROZEN_S = 5.0
_COUNTERS = ("failed", "malformed", "rejected", "expired")
# Three renewals of a record, which is published every second.
CONFLICT_WATCH_S = 3.0
# The broker sends retained records right after its SUBACK; ample on one machine and on a fog link.
_RETAINED_WAIT_S = 0.1
# Two renewals, on a busy machine.
_RENEWAL_TIMEOUT_S = 2.5


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
        self._last_freeze_end_s = 0.0  # when this process was last found to have been frozen
        self._interval_begin_s = time.monotonic()
        self._interval_busy_s = 0.0
        self._interval_done = 0
        self._interval_waits_s: list[float] = []

    def set_model(self, fingerprint: str, formats: tuple[str, ...]) -> None:
        """Set the model's fingerprint and the Content Types that the worker accepts; before the first report."""
        self.record = self.record.model_copy(update={"fingerprint": fingerprint, "formats": formats})

    async def _on_reconnect(self) -> None:
        self._reconnects += 1

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
        elif now_s - seconds >= self._last_freeze_end_s:  # a time that includes a freeze says nothing about the speed
            self._task_ms = (1 - _NEWEST_WEIGHT) * self._task_ms + _NEWEST_WEIGHT * task_ms
        self._done += tasks
        self._interval_done += tasks
        self._interval_busy_s += seconds

    def _detect_freeze(self, now_s: float) -> None:
        if now_s - self._interval_begin_s > _FROZEN_S:
            self._last_freeze_end_s = now_s

    def _mean_wait_s(self, oldest_arrival_s: float | None, now_s: float) -> float:
        """Return how long tasks wait: the mean of those begun in this interval, or the oldest queued one's if longer.

        The mean alone would hide a queue behind one long task.
        """
        waits_s = self._interval_waits_s
        mean_s = sum(waits_s) / len(waits_s) if waits_s else 0.0
        return mean_s if oldest_arrival_s is None else max(mean_s, now_s - oldest_arrival_s)

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


class DuplicateCheck:
    """Checks one worker against the others of its stage, through their presence records."""

    def __init__(self, transport: Transport, topics: StageTopics, presence: WorkerPresence) -> None:
        self._topics = topics
        self._presence = presence
        self._listener = PresenceListener(transport, self._on_event)
        self._malformed_records = 0  # on our own topic: by a worker of the same id and another version
        self._must_leave = asyncio.Event()
        self._conflict: UsageError | None = None

    async def check(self) -> None:
        """Raise `UsageError` "WorkerConflict" if a live worker conflicts with this one, which has not joined yet."""
        await self._listener.subscribe(self._topics.peer_presence_filter)
        await asyncio.sleep(_RETAINED_WAIT_S)
        await self._listener.wait_for(lambda registry: not self._is_uncertain(registry), _RENEWAL_TIMEOUT_S)
        own = self._presence.record
        for entry in find_conflicts(own, self._listener.registry):
            if entry.is_renewed:
                raise conflict_error(own, entry.record)
        if self._malformed_records > 1:
            raise conflict_error(own, None)

    def _is_uncertain(self, registry: WorkerRegistry) -> bool:
        """Whether there are conflicting records, and none has been renewed yet."""
        entries = find_conflicts(self._presence.record, registry)
        is_known = any(entry.is_renewed for entry in entries) or self._malformed_records > 1
        return bool(entries or self._malformed_records) and not is_known

    async def watch(self) -> None:
        """Watch for CONFLICT_WATCH_S after the worker has joined. Raises `UsageError` "WorkerConflict"."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CONFLICT_WATCH_S):
                await self._must_leave.wait()
        if self._conflict is not None:
            raise self._conflict
        with suppress(SparseError):
            await self._listener.unsubscribe()

    async def close(self) -> None:
        await self._listener.close()

    def _on_event(self, event: PresenceEvent) -> None:
        own = self._presence.record
        if event.kind == "rejected" and event.topic == own.topic:
            self._malformed_records += 1
        # Others judge by our published `up_s`: when it has passed CONFLICT_WATCH_S for them, this worker stays.
        up_s = self._presence.up_s
        other = event.worker
        if up_s is None or up_s >= CONFLICT_WATCH_S or other is None or self._conflict is not None:
            return
        if event.kind not in ("appeared", "updated", "gap") or event.retained or other.instance == own.instance:
            return
        if must_leave(own, other):
            self._conflict = conflict_error(own, other)
            self._presence.revoke(keep_record=other.worker == own.worker)
            self._must_leave.set()


def find_conflicts(own: WorkerRecord, registry: WorkerRegistry) -> list[PresenceEntry[WorkerRecord]]:
    """Return the entries with our id or another model, ours first."""
    entries = [entry for entry in registry.workers.values() if _is_conflict(own, entry.record)]
    return sorted(entries, key=lambda entry: (entry.record.worker != own.worker, entry.record.worker))


def must_leave(own: WorkerRecord, other: WorkerRecord) -> bool:
    """Whether the worker `own`, which still watches for conflicts, must leave because of another live worker."""
    if other.state == "stopped" or not _is_conflict(own, other):
        return False
    other_watches = other.up_s is not None and other.up_s < CONFLICT_WATCH_S
    return not other_watches or (own.worker, own.instance) > (other.worker, other.instance)


def _is_conflict(own: WorkerRecord, other: WorkerRecord) -> bool:
    return other.worker == own.worker or other.fingerprint != own.fingerprint


def conflict_error(own: WorkerRecord, other: WorkerRecord | None) -> UsageError:
    """Return the error for a worker that cannot join; `other` is None if its record is malformed."""
    if other is None or other.worker == own.worker:
        place = f" (process {other.pid} on {other.node!r})" if other else ""
        problem = f"another worker of this id{place} is up: stop it, or choose another id with --worker"
    else:
        problem = (
            f"worker {other.worker!r} serves stage {other.stage!r} with the model {other.fingerprint!r}, this one has "
            f"{own.fingerprint!r}: use the same weights and cuts for all workers, or another pipeline name"
        )
    return UsageError("WorkerConflict", f"worker {own.worker!r} cannot join: {problem}", worker=own.worker)
