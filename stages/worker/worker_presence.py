"""A worker's presence: that it may be here, that it is, how busy it is, and that it has gone."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import RECORD_EXPIRY_S, WorkerLoad, WorkerRecord
from brokers.errors import SparseError
from brokers.process.liveness_file import LivenessFile
from brokers.protocol.topics import StageTopics
from brokers.protocol.training import TrainingStatus
from brokers.protocol.transport import Delivery, Properties
from stages.errors import WorkerConflict
from stages.worker.duplicate_check import CONFLICT_WATCH_S, PeerWorkers

# The broker sends retained records right after it confirms the subscription; ample on one machine and on a fog link.
_RETAINED_WAIT_S = 0.1
# A worker that is alive renews its record every second; this is ample for two renewals on a busy machine.
_RENEWAL_WAIT_S = 2.5
# Weight of the newest task in the mean time of a task.
_NEWEST = 0.2
# A worker reports every second, whatever its compute thread does: it was frozen when it did not for so long.
_FROZEN_S = 5.0


class WorkerPresence:
    """Keeps and publishes the birth record of one worker."""

    def __init__(
        self, line: MessageChannel, topics: StageTopics, pipeline: Pipeline, stage: StageTable, worker: str, device: str
    ) -> None:
        self.state: Literal["up", "draining", "stopped", "standby"] = "up"
        self.training: TrainingStatus | None = None
        self.failed = 0
        self.malformed = 0
        self.rejected = 0
        self.expired = 0
        self._line, self._topics = line, topics
        self._reconnects = 0
        line.transport.on_reconnect(self._reconnected)
        self._pulse = LivenessFile()
        self._birth = WorkerRecord(
            worker=worker,
            stage=stage.name,
            pipeline=pipeline.name,
            site=stage.site,
            node=platform.node() or "node",
            pid=os.getpid(),
            instance=secrets.token_hex(8),
            device=device,
            fingerprint="",
            capacity=stage.max_batch + 2,
        )
        self._peers: PeerWorkers | None = None
        self._twin: WorkerConflict | None = None
        self._must_leave = asyncio.Event()
        self._joined_s: float | None = None
        self._done = 0
        self._task_ms = 0.0
        self._interval_begin_s = time.monotonic()
        self._interval_busy_s = 0.0
        self._interval_done = 0
        self._interval_waits_s: list[float] = []  # of the tasks begun in it: a second's worth of them
        self._woke_s = 0.0

    async def check_for_conflict(self, fingerprint: str, formats: tuple[str, ...] = ()) -> None:
        """Raise `WorkerConflict` if a worker of this id is up, or one of this stage with another model."""
        self._birth = self._birth.model_copy(update={"fingerprint": fingerprint, "formats": formats})
        self._peers = PeerWorkers(self._birth)
        await self._line.transport.subscribe(self._topics.peer_presence_filter, self._heard, qos=1)
        await asyncio.sleep(_RETAINED_WAIT_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(_RENEWAL_WAIT_S):
                while self._peers.is_uncertain:
                    self._peers.changed.clear()
                    await self._peers.changed.wait()
        if twin := self._peers.find_conflict():
            raise twin

    async def _reconnected(self) -> None:
        """Say so with the next record: what the broker held for us, or had from us, may be lost."""
        self._reconnects += 1

    async def watch_for_conflict(self) -> None:
        """Raise `WorkerConflict` when this worker, which has joined, must leave again; else wait until cancelled.

        Two that start together pass each other's `check`: neither has told of itself yet.
        """
        over = asyncio.create_task(asyncio.sleep(CONFLICT_WATCH_S), name="probation over")
        leave = asyncio.create_task(self._must_leave.wait(), name="must leave")
        try:
            await asyncio.wait({over, leave}, return_when=asyncio.FIRST_COMPLETED)
            if not leave.done():
                with suppress(SparseError):  # heard or not, nothing of it counts any more
                    await self._line.transport.unsubscribe(self._topics.peer_presence_filter)
            await leave
        finally:
            over.cancel()
            leave.cancel()
        assert self._twin is not None
        raise self._twin

    def _heard(self, delivery: Delivery) -> None:
        assert self._peers is not None
        other = self._peers.on_presence(delivery)
        # By the very figure that others read of us: who is past probation in their eyes does not leave for them.
        up_s = self._up_s
        if other is None or up_s is None or up_s >= CONFLICT_WATCH_S or self._twin:
            return
        if twin := self._peers.conflict_with(other):
            self._twin = twin
            if other.worker == self._birth.worker:
                self._joined_s = None  # the record is the other's from now on
            self._must_leave.set()

    @property
    def _up_s(self) -> float | None:
        """Seconds since the worker joined; None before, and after another has taken its place."""
        return None if self._joined_s is None else round(time.monotonic() - self._joined_s, 3)

    def record_queue_waits(self, waits_s: Sequence[float]) -> None:
        """Tasks leave the queue, after they have waited for so long."""
        self._interval_waits_s += waits_s

    def record_compute(self, tasks: int, seconds: float) -> None:
        """So many tasks kept the compute thread busy for so long."""
        task_ms = 1000 * seconds / tasks
        if not self._done:
            self._task_ms = task_ms
        elif not self._slept(seconds):
            self._task_ms = (1 - _NEWEST) * self._task_ms + _NEWEST * task_ms
        self._done += tasks
        self._interval_done += tasks
        self._interval_busy_s += seconds

    def _slept(self, seconds: float) -> bool:
        """Whether this process was frozen in these last seconds: they say nothing of how fast it is."""
        now_s = time.monotonic()
        if now_s - self._interval_begin_s > _FROZEN_S:
            self._woke_s = now_s
        return now_s - seconds < self._woke_s

    async def report(self, queue: int, oldest_s: float | None = None) -> None:
        """Publish the record with the load of the interval that ends now; the first time, join.

        `queue` tasks wait, of which the oldest came at `oldest_s`, by the monotonic clock.
        """
        if self._twin:
            return  # it has lost its place
        now_s = time.monotonic()
        interval_s = max(now_s - self._interval_begin_s, 1e-3)
        if interval_s > _FROZEN_S:
            self._woke_s = now_s
        load = WorkerLoad(
            queue=queue,
            queue_ms=round(1000 * self._waited_s(oldest_s, now_s), 3),
            done=self._done,
            failed=self.failed,
            malformed=self.malformed,
            rejected=self.rejected,
            expired=self.expired,
            busy=round(min(1.0, self._interval_busy_s / interval_s), 3),
            rate=round(self._interval_done / interval_s, 2),
            task_ms=round(self._task_ms, 3),
        )
        self._interval_begin_s, self._interval_busy_s, self._interval_done = now_s, 0.0, 0
        self._interval_waits_s = []
        if self._joined_s is None:
            self._joined_s = now_s
        change = {
            "load": load,
            "state": self.state,
            "up_s": self._up_s,
            "reconnects": self._reconnects,
            "training": self.training,
        }
        self._birth = self._birth.model_copy(update=change)
        await self._publish(self._birth.to_bytes())
        self._pulse.touch()

    def _waited_s(self, oldest_s: float | None, now_s: float) -> float:
        """How long tasks wait here: what those begun in this interval did, or more if one does that has not begun.

        A mean of what was begun says nothing while one long task keeps all others waiting.
        """
        waits_s = self._interval_waits_s
        mean_s = sum(waits_s) / len(waits_s) if waits_s else 0.0
        return mean_s if oldest_s is None else max(mean_s, now_s - oldest_s)

    async def deregister(self) -> None:
        """Say that the worker has stopped, and take its record away; the record of a twin stays."""
        if self._joined_s is None:
            return
        self.state = "stopped"
        await self._publish(self._birth.model_copy(update={"state": "stopped"}).to_bytes())
        await self._publish(b"")

    async def _publish(self, record: bytes) -> None:
        topic = self._topics.presence(self._birth.worker)
        expiring = Properties(expiry_s=RECORD_EXPIRY_S)
        await self._line.transport.publish(topic, record, expiring, qos=1, retain=True)
