"""The way to the workers of one stage: waits for one with room, sends to its inbox, says what was lost with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.priority_waiters import PriorityWaiters
from brokers.dispatch.worker_pool import LEASE_S, Dispatcher
from brokers.errors import Disconnected, NoWorker, TooLarge, WireError
from brokers.protocol.messages import PRIORITIES, ReplyTo, Task
from brokers.protocol.topics import StageTopics, last_level
from brokers.protocol.transport import Delivery

log = logging.getLogger(__name__)

_WATCH_EVERY_S = 1.0
_PATIENT_S = 3.0  # of waiting for a worker in silence
# A request that is sent for the third time may be what its workers die of: it has the next one to itself, so that none
# is blamed for another's fault.
ISOLATE_FROM_ATTEMPT = 3


@dataclass(frozen=True, slots=True)
class LostTask:
    """A request that was in the hands of a worker, and may be no more; its owner should know."""

    request: bytes
    attempt: int
    reply: ReplyTo
    stage: str
    worker: str
    cause: Literal["died", "disconnected"] = "died"


class StageClient:
    """Sends tasks to the workers of one stage. `on_lost` is called for each request that may be in nobody's hands.

    That is so when its worker dies or falls silent, and when our own connection breaks and comes back. `on_gap` is
    called when records of a worker were lost on their way: anything else that crossed there may have been, too.
    """

    def __init__(
        self,
        channel: MessageChannel,
        topics: StageTopics,
        on_lost: Callable[[LostTask], None],
        *,
        lease_s: float = LEASE_S,
        on_gap: Callable[[], None] = lambda: None,
    ) -> None:
        self.topics = topics
        self._line = channel
        self._on_lost = on_lost
        self._on_gap = on_gap
        self._dispatcher = Dispatcher(lease_s)
        self._turns = PriorityWaiters()
        self._alone = PriorityWaiters()  # those who wait for a worker to be empty: room for one more is nothing to them
        self._owners: dict[bytes, LostTask] = {}
        self._watching: asyncio.Task[None] | None = None
        # At first a record that the broker has kept is welcome: work begins at once. Once the connection has broken it
        # proves nothing: its worker may have lost the broker too, and not be back to hear what is sent to it.
        self._only_fresh = False
        self._complained = self._closed = False

    def __len__(self) -> int:
        """How many workers are up."""
        return len(self._dispatcher)

    @property
    def total_batch_size(self) -> int:
        """How many tasks those workers compute at once."""
        return self._dispatcher.total_batch_size

    async def open(self) -> None:
        await self._line.transport.subscribe(self.topics.presence_filter, self._heard, qos=1)
        self._line.transport.on_reconnect(self._reconnected)
        self._watching = asyncio.create_task(self._watch(), name=f"outbox-{self.topics.stage}")

    async def close(self) -> None:
        """End what watches for silence, and all waiting for a worker; may be called twice."""
        self._closed = True
        self._call_all()
        if self._watching:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None

    async def send(self, task: Task, *, timeout_s: float, avoid: frozenset[str] = frozenset()) -> str:
        """Send `task` to the worker that is done with it first, once one has room; the worker's id.

        Raises `NoWorker` when none had room for `wait_s`, `TooLarge` for what cannot go.
        """
        worker = await self._pick(task, timeout_s, avoid)
        limit_bytes = self._dispatcher.max_message_bytes(worker)
        if limit_bytes is not None and task.content.nbytes > limit_bytes:
            raise TooLarge(f"request {task.request_id.hex()} to worker {worker!r}", limit_bytes, task.content.nbytes)
        self._dispatcher.task_sent(worker, task.request_id, time.monotonic())
        self._owners[task.request_id] = LostTask(
            task.request_id, task.attempt, task.reply_to, self.topics.stage, worker
        )
        try:
            await self._line.send(self.topics.inbox(worker), task)
        except BaseException:
            self.task_done(worker, task.request_id)
            raise
        return worker

    def task_done(self, worker: str, request: bytes) -> None:
        """A worker has room again."""
        self._dispatcher.task_done(worker, request)
        owner = self._owners.get(request)
        if owner is not None and owner.worker == worker:  # a late word of an earlier attempt says nothing of this one
            del self._owners[request]
        self._turns.notify()
        self._alone.notify_all()

    async def _pick(self, task: Task, wait_s: float, avoid: frozenset[str]) -> str:
        begin_s = time.monotonic()
        deadline_s = begin_s + wait_s
        alone = task.request_id if task.attempt >= ISOLATE_FROM_ATTEMPT else None
        try:
            while not self._closed:
                now_s = time.monotonic()
                if worker := self._dispatcher.pick(now_s, avoid, alone):
                    return worker
                if now_s - begin_s > _PATIENT_S:
                    self._complain()
                if now_s >= deadline_s:
                    raise NoWorker(self.topics.pipeline, self.topics.stage, wait_s)
                # A lease may run out meanwhile without anybody saying so: look again each second.
                turns = self._alone if alone else self._turns
                await turns.wait(min(1.0, deadline_s - now_s), PRIORITIES.index(task.priority))
        except BaseException:
            if alone:
                self._dispatcher.cancel_reservation(alone)
                self._call_all()
            raise
        raise Disconnected(self._line.transport.address, "nobody waits for its workers any more")

    def _call_all(self) -> None:
        self._turns.notify_all()
        self._alone.notify_all()

    def _complain(self) -> None:
        """Say that nobody is up: once, until somebody comes."""
        if not len(self) and not self._complained:
            self._complained = True
            log.warning("waiting for a worker of stage %s of %s: none is up", self.topics.stage, self.topics.pipeline)

    def _heard(self, delivery: Delivery) -> None:
        worker = last_level(delivery.topic)
        if not delivery.payload:
            self._tell_lost(worker, self._dispatcher.remove(worker))
            return
        if delivery.retain and self._only_fresh:
            return
        try:
            birth = WorkerRecord.from_bytes(bytes(delivery.payload))
        except WireError as error:
            log.warning("presence of worker %s: %s", worker, error)
            return
        if birth.worker != worker:
            log.warning("presence of worker %s: its record says %s", worker, birth.worker)
            return
        now_s = time.monotonic()
        if self._dispatcher.has_gap(birth, now_s):
            self._on_gap()
        self._tell_lost(worker, self._dispatcher.update(birth, now_s))
        self._complained = False
        self._call_all()  # it may have room for them all

    def _tell_lost(self, worker: str, requests: set[bytes]) -> None:
        for request in requests:
            owner = self._owners.get(request)
            if owner is not None and owner.worker == worker:  # else a later attempt is in other hands by now
                self._on_lost(self._owners.pop(request))

    async def _watch(self) -> None:
        """Give up the workers that have fallen silent, and what is in nobody's hands since its lease has run out."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            for request, owner in list(self._owners.items()):
                if not self._dispatcher.is_assigned(owner.worker, request):
                    del self._owners[request]
            for worker in self._dispatcher.timed_out(time.monotonic()):
                log.warning("worker %s of stage %s has fallen silent", worker, self.topics.stage)
                self._tell_lost(worker, self._dispatcher.remove(worker))

    async def _reconnected(self) -> None:
        """What was on its way when the connection broke may be lost, the word that it is done as well."""
        self._only_fresh = True
        for request in self._dispatcher.reset():
            if lost := self._owners.pop(request, None):
                self._on_lost(replace(lost, cause="disconnected"))
