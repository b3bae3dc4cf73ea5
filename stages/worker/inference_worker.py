"""The worker of an inference pipeline: queues tasks, computes them in batches, and sends the results on.

Every task ends with a message to its requester: a result, a failure, or, if this process dies, the last will, after
which the requester sends the task again.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from brokers.errors import WireError
from brokers.protocol.messages import Message, Task, TaskDone, TensorContent
from brokers.protocol.safetensors_codec import from_array
from brokers.protocol.transport import Properties, Transport
from stages.executor import TaskContext, TaskExecutor
from stages.worker.batch_runner import BatchRunner, QueuedTask
from stages.worker.result_sender import CREDIT_TIMEOUT_S, ResultSender
from stages.worker.stage_worker import StageWorker
from stages.worker.task_queue import TaskQueue
from stages.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

# Batches whose outputs wait to be sent while the next one is computed; more would be a queue behind a slow successor.
_UNSENT_LIMIT = 2


class InferenceWorker(StageWorker):
    """Serves one stage with a `TaskExecutor`. Implements `stages.executor.Node`."""

    def __init__(self, transport: Transport, context: WorkerContext, executor: TaskExecutor) -> None:
        super().__init__(transport, context)
        self._executor = executor
        self._runner = BatchRunner(executor, self.stage, self.worker)
        self._queue = TaskQueue()
        self._sender = ResultSender(self.channel, context, self.counters)
        self._unsent_slots = asyncio.Semaphore(_UNSENT_LIMIT)
        self._dispatched: dict[bytes, tuple[str, TensorContent]] = {}  # by request id, in the current batch
        self._is_loaded = False

    async def _load(self) -> tuple[str, tuple[str, ...]]:
        await self.run_in_thread(self._executor.start, self)
        self._is_loaded = True
        return self._executor.fingerprint, self._executor.formats

    async def _subscribe(self) -> None:
        await self.channel.subscribe(self.context.inbox, self._on_message, self._on_malformed)
        shared_filter = self.context.topics.shared_task_filter
        await self.channel.subscribe(shared_filter, self._on_message, self._on_malformed, qos=1)
        await self._sender.open()

    async def _work(self) -> None:
        while self._queue or not self._is_draining:
            if not self._queue:
                await self._wait_for_wake()
            elif not await self._acquire_unsent_slot():
                break
            elif tasks := await self._collect_batch():
                await self._run_batch(tasks)
            else:  # all queued tasks had expired
                self._unsent_slots.release()
        await self._sender.flush()

    async def _announce_drain(self) -> None:
        await self.report()
        await self.channel.transport.unsubscribe(self.context.topics.shared_task_filter)

    async def _close(self) -> None:
        await self._sender.close()
        if self._is_loaded:
            await self.run_in_thread(self._executor.stop)

    async def report(self) -> None:
        await self.presence.report(len(self._queue), self._queue.oldest_arrival_s, self.counters)

    def _on_message(self, topic: str, message: Message) -> None:
        match message:
            case Task():
                self._accept(message)
            case TaskDone():
                self._sender.on_task_done(message)
            case _:
                self.counters["unexpected"] += 1

    def _accept(self, task: Task) -> None:
        if not task.reply_to.topic:  # of a foreign client; no answer could be delivered
            self.counters["no_reply_address"] += 1
            log.warning("dropped a task without a Response Topic")
            return
        if self._is_draining:
            self._sender.send_in_background(self._sender.reject(task, "Draining", "the worker is draining"))
            return
        queued = QueuedTask(task, time.monotonic(), TaskContext(task.request_id, task.source, task.attempt))
        if duplicate := self._queue.replace_duplicate(queued):
            self._sender.send_in_background(self._sender.release_credit(duplicate.task))
        elif reason := self._queue.add(queued):
            self._sender.send_in_background(self._sender.reject(task, "Busy", reason))
        self._wake.set()

    def _on_malformed(self, error: WireError, properties: Properties) -> None:
        self.counters["malformed"] += 1
        self._sender.send_in_background(self._sender.reject_malformed(error, properties))

    async def _acquire_unsent_slot(self) -> bool:
        """Wait until the outputs of an earlier batch are sent; return False if that fails while this worker drains."""
        while True:
            try:
                async with asyncio.timeout(CREDIT_TIMEOUT_S + 1):
                    await self._unsent_slots.acquire()
                return True
            except TimeoutError:
                if self._is_draining:
                    log.warning("%d tasks are abandoned: nothing can be sent", len(self._queue))
                    return False

    async def _collect_batch(self) -> list[QueuedTask]:
        """Take the next tasks: up to `max_batch`, after waiting at most `max_wait_ms` for more."""
        size = self.context.stage.max_batch if self._executor.batchable else 1
        first = self._queue.first
        if first is None:
            return []
        deadline_s = first.arrived_s + self.context.stage.max_wait_ms / 1000
        while len(self._queue) < size and not self._is_draining and (left_s := deadline_s - time.monotonic()) > 0:
            await self._wait_for_wake(left_s)
        self._tick()
        return self._queue.take(size)

    def _tick(self) -> None:
        """Fail the tasks whose deadline has passed, without computing them."""
        for queued in self._queue.pop_expired(time.monotonic()):
            self.counters["expired"] += 1
            queued.error = queued.deadline_error(self.stage)
            self._sender.send_in_background(self._sender.deliver(queued))

    async def _run_batch(self, tasks: list[QueuedTask]) -> None:
        begin_s = time.monotonic()
        self.presence.record_queue_waits([begin_s - queued.arrived_s for queued in tasks])
        batches = await self.run_in_thread(self._runner.run, tasks)
        self.presence.record_compute(len(tasks), time.monotonic() - begin_s)
        for queued in tasks:
            if queued.task.request_id in self._dispatched and queued.outputs is None:
                queued.next_stage, queued.outputs = self._dispatched[queued.task.request_id]
        self._dispatched.clear()
        for count, busy_ms in batches:
            self.context.events.emit("batch_processed", tasks=count, busy_ms=round(busy_ms, 3))
        self._sender.send_in_background(self._deliver(tasks))

    async def _deliver(self, tasks: list[QueuedTask]) -> None:
        try:
            # Concurrently: a task that waits for credit does not hold up the others.
            deliveries = (self._sender.deliver(queued) for queued in tasks)
            for problem in await asyncio.gather(*deliveries, return_exceptions=True):
                if problem:
                    log.warning("could not send a result: %s", problem)
        finally:
            self._unsent_slots.release()

    def dispatch(self, tensors: Mapping[str, Any], task: TaskContext, stage: str) -> None:
        """Send the request of `task` to `stage` instead of the next one (see `stages.executor.Node`)."""
        self.context.pipeline.find_stage(stage)
        content = TensorContent({name: from_array(value) for name, value in tensors.items()}, task.metadata)
        self._dispatched[task.request_id] = (stage, content)
