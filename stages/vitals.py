"""A worker's presence: that it may be here, that it is, how busy it is, and that it has gone."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import time
from contextlib import suppress
from typing import Literal

from brokers.errors import WireError
from brokers.line import Line
from brokers.pipeline import Pipeline, StageTable
from brokers.presence import Birth, Load
from brokers.topics import StageTopics, last_level
from brokers.transport import Delivery
from stages.errors import WorkerTwin

# The broker sends retained records right after it confirms the subscription; ample on one machine and on a fog link.
_RETAINED_WAIT_S = 0.1
# A worker that is alive renews its record every second; this is ample for two renewals on a busy machine.
_RENEWAL_WAIT_S = 2.5
# Weight of the newest task in the mean time of a task.
_NEWEST = 0.2


class _Namesake:
    """Whether another process lives under an id. A retained record alone does not say so: it may have outlived it."""

    def __init__(self) -> None:
        self._records = 0
        self._told = asyncio.Event()  # set once another record, or the end of the first, says which it is

    def heard(self, delivery: Delivery) -> None:
        if not delivery.payload.nbytes:
            self._records = 0
            self._told.set()
        elif delivery.retain:
            self._records = max(self._records, 1)  # comes once more when the connection broke meanwhile
        else:
            self._records += 1
            if self._records > 1:
                self._told.set()

    async def lives(self) -> bool:
        """Whether it renews its record; waits for that only if there is one."""
        if self._records:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), _RENEWAL_WAIT_S)
        return self._records > 1


class Vitals:
    """Keeps and publishes the birth record of one worker."""

    def __init__(
        self, line: Line, topics: StageTopics, pipeline: Pipeline, stage: StageTable, worker: str, device: str
    ) -> None:
        self.state: Literal["up", "draining", "stopped"] = "up"
        self.failed = 0
        self.refused = 0
        self._line, self._topics = line, topics
        self._birth = Birth(
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
        self._joined = False
        self._done = 0
        self._task_ms = 0.0
        self._interval_begin_s = time.monotonic()
        self._interval_busy_s = 0.0
        self._interval_done = 0

    async def check(self, fingerprint: str) -> None:
        """Raise `WorkerTwin` if a worker of this id is up, or one of this stage with another model."""
        self._birth = self._birth.model_copy(update={"fingerprint": fingerprint})
        others: dict[str, Birth] = {}
        namesake = _Namesake()

        def heard(delivery: Delivery) -> None:
            worker = last_level(delivery.topic)
            if worker == self._birth.worker:
                namesake.heard(delivery)
            try:
                others[worker] = Birth.from_bytes(bytes(delivery.payload))
            except WireError:
                others.pop(worker, None)

        await self._line.transport.subscribe(self._topics.all_presence, heard, qos=1)
        await asyncio.sleep(_RETAINED_WAIT_S)
        twin = await namesake.lives()
        await self._line.transport.unsubscribe(self._topics.all_presence)
        if twin:
            other = others.get(self._birth.worker)
            place = f" (process {other.pid} on {other.node!r})" if other else ""
            raise WorkerTwin(
                self._birth.worker, f"another worker of this id{place} is up: stop it, or choose another with --worker"
            )
        for other in others.values():
            if other.worker != self._birth.worker and other.fingerprint != fingerprint:
                raise WorkerTwin(
                    self._birth.worker,
                    f"worker {other.worker!r} serves stage {other.stage!r} with the model {other.fingerprint!r}, "
                    f"this one has {fingerprint!r}: same weights and cuts for all, or another pipeline name",
                )

    def worked(self, tasks: int, seconds: float) -> None:
        """So many tasks kept the compute thread busy for so long."""
        task_ms = 1000 * seconds / tasks
        self._task_ms = task_ms if not self._done else (1 - _NEWEST) * self._task_ms + _NEWEST * task_ms
        self._done += tasks
        self._interval_done += tasks
        self._interval_busy_s += seconds

    async def report(self, queue: int) -> None:
        """Publish the record with the load of the interval that ends now."""
        now_s = time.monotonic()
        interval_s = max(now_s - self._interval_begin_s, 1e-3)
        load = Load(
            queue=queue,
            done=self._done,
            failed=self.failed,
            refused=self.refused,
            busy=round(min(1.0, self._interval_busy_s / interval_s), 3),
            rate=round(self._interval_done / interval_s, 2),
            task_ms=round(self._task_ms, 3),
        )
        self._interval_begin_s, self._interval_busy_s, self._interval_done = now_s, 0.0, 0
        self._birth = self._birth.model_copy(update={"load": load, "state": self.state})
        self._joined = True
        await self._publish(self._birth.to_bytes())

    async def farewell(self) -> None:
        """Say that the worker has stopped, and take its record away; the record of a twin stays."""
        if not self._joined:
            return
        self.state = "stopped"
        await self._publish(self._birth.model_copy(update={"state": "stopped"}).to_bytes())
        await self._publish(b"")

    async def _publish(self, record: bytes) -> None:
        topic = self._topics.presence(self._birth.worker)
        await self._line.transport.publish(topic, record, qos=1, retain=True)
