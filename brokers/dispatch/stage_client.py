"""Sends tasks to the workers of one stage: waits for a worker with credit, and reports the tasks that may be lost."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.dispatcher import LEASE_S, Dispatcher, LostTask
from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.priority_waiters import PriorityWaiters
from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S, PresenceEvent, PresenceListener
from brokers.errors import Disconnected, NoWorker, TooLarge
from brokers.protocol.messages import PRIORITIES, Task
from brokers.protocol.topics import StageTopics

log = logging.getLogger(__name__)

_LOG_WAIT_AFTER_S = 3.0  # a wait for a worker that is longer than this is logged
_LEASE_CHECK_S = 1.0  # the end of a lease is not notified: a sender that waits looks for it this often
# A request that is sent for the third time may be what kills its workers. It gets a worker to itself, so that no other
# request is blamed when that worker is lost.
ISOLATE_FROM_ATTEMPT = 3


class StageClient:
    """Sends tasks to the workers of one stage.

    `on_lost` is called for each task that may be lost: its worker was lost, or our own connection broke. `on_gap` is
    called when messages to or from a worker may have been lost. `presence` is the listener that the client uses; more
    filters and callbacks may be added to it.
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
        self.presence = PresenceListener(channel.transport, self._on_presence, reset_on_reconnect=True)
        self._channel = channel
        self._on_lost = on_lost
        self._on_gap = on_gap
        self._dispatcher = Dispatcher(lease_s)
        self._waiters = PriorityWaiters()
        self._isolated_waiters = PriorityWaiters()  # these wait for an empty worker: one free credit is not enough
        self._is_wait_logged = False
        self._closed = False

    def __len__(self) -> int:
        return len(self._dispatcher)

    async def open(self) -> None:
        await self.presence.subscribe(self.topics.presence_filter)

    async def close(self) -> None:
        """Stop listening, and end all waiting for a worker; may be called twice."""
        self._closed = True
        self._notify_all()
        await self.presence.close()

    async def send(self, task: Task, *, timeout_s: float, avoid: frozenset[str] = frozenset()) -> str:
        """Send `task` to the worker that would finish it first, as soon as one has credit; return the worker's id.

        Raises `NoWorker` if none had credit for `timeout_s`, `TooLarge` for a task that the worker does not accept.
        """
        record = await self._wait_for_worker(task, timeout_s, avoid)
        worker = record.worker
        if task.content.nbytes > record.max_message_bytes:
            self.task_done(worker, task.request_id)  # the worker may be reserved for it
            what = f"request {task.request_id.hex()} to worker {worker!r}"
            raise TooLarge(what, record.max_message_bytes, task.content.nbytes)
        sent = LostTask(task.request_id, task.attempt, task.reply_to, self.topics.stage, worker)
        self._dispatcher.task_sent(sent, time.monotonic())
        try:
            await self._channel.send(self.topics.inbox(worker), task)
        except BaseException:
            self.task_done(worker, task.request_id)
            raise
        return worker

    def task_done(self, worker: str, request: bytes) -> None:
        self._dispatcher.task_done(worker, request)
        self._waiters.notify()
        self._isolated_waiters.notify_all()

    async def _wait_for_worker(self, task: Task, timeout_s: float, avoid: frozenset[str]) -> WorkerRecord:
        begin_s = time.monotonic()
        isolate = task.request_id if task.attempt >= ISOLATE_FROM_ATTEMPT else None
        waiters = self._waiters if isolate is None else self._isolated_waiters
        try:
            while not self._closed:
                now_s = time.monotonic()
                if record := self._dispatcher.pick(now_s, avoid, isolate):
                    return record
                if now_s - begin_s > _LOG_WAIT_AFTER_S and not len(self) and not self._is_wait_logged:
                    self._is_wait_logged = True
                    log.warning(
                        "stage %s of %s has no worker: waiting for one", self.topics.stage, self.topics.pipeline
                    )
                left_s = begin_s + timeout_s - now_s
                if left_s <= 0:
                    raise NoWorker(self.topics.pipeline, self.topics.stage, timeout_s)
                await waiters.wait(min(_LEASE_CHECK_S, left_s), PRIORITIES.index(task.priority))
        except BaseException:
            if isolate is not None:
                self._dispatcher.cancel_reservation(isolate)
                self._notify_all()
            raise
        raise Disconnected(self._channel.transport.address, f"the client of stage {self.topics.stage!r} was closed")

    def _notify_all(self) -> None:
        self._waiters.notify_all()
        self._isolated_waiters.notify_all()

    def _on_presence(self, event: PresenceEvent) -> None:
        record = event.worker
        if record is None or event.topic != self.topics.presence(event.name):
            return  # of another stage, or rejected
        if event.kind == "lost":
            if event.reason == "silent":
                log.warning("worker %s has sent no presence record for %g s: lost", record.worker, PRESENCE_TIMEOUT_S)
            for task in self._dispatcher.remove(record.worker):
                self._on_lost(replace(task, cause="disconnected") if event.reason == "disconnected" else task)
            return
        if event.kind == "gap":
            self._on_gap()
        self._dispatcher.update(record, time.monotonic(), gap=event.kind == "gap")
        self._is_wait_logged = False
        self._notify_all()  # the worker may have credit for all of them
