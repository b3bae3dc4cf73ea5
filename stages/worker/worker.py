"""One worker of one stage: inbox, bounded queue, compute thread, and the way on. Four verbs: start, run, drain, stop.

The asyncio loop owns the network and the queue; the executor runs in a thread of its own, so the network is never
blocked by compute. Whatever happens to a task, its sender hears of it: a result, a failure, or, if this process dies,
the last will.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.dispatch.channel import MessageChannel
from brokers.errors import SparseError, WireError
from brokers.protocol.messages import Message, Task, TaskDone, TensorContent
from brokers.protocol.safetensors_codec import from_array
from brokers.protocol.transport import Properties, Transport, Will
from brokers.telemetry.client import EventClient
from stages.executor import TaskContext, TaskExecutor
from stages.worker.batch_runner import BatchRunner, Failed, QueuedTask, TaskOutcome
from stages.worker.result_sender import CREDIT_TIMEOUT_S, ResultSender, Route
from stages.worker.task_queue import TaskQueue
from stages.worker.telemetry import InferenceTelemetry
from stages.worker.worker_presence import WorkerPresence

log = logging.getLogger(__name__)

# Outcomes that wait for a way out while the next batch is computed; more would be a backlog behind a slow successor.
_UNSENT_LIMIT = 2
_REPORT_EVERY_S = 1.0
# How long a worker tries to say that it drains, or leaves, to a broker that may be gone for good.
_FAREWELL_S = 2.0


class InferenceWorker:
    """Serves one stage of a pipeline through one broker, and tells `events`. Implements `stages.executor.Node`."""

    def __init__(
        self,
        transport: Transport,
        pipeline: Pipeline,
        stage: StageTable,
        executor: TaskExecutor,
        worker: str,
        device: str,
        events: EventClient | None = None,
    ) -> None:
        self.pipeline, self.stage, self.worker, self.device = pipeline.name, stage.name, worker, device
        self.counters: Counter[str] = Counter()
        self._file, self._table, self._executor = pipeline, stage, executor
        self._topics = pipeline.topics(stage)
        self._inbox = self._topics.inbox(worker)
        self._channel = MessageChannel(transport)
        self._compute = BatchRunner(executor, stage.name, worker)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"compute-{stage.name}")
        self._queue = TaskQueue()
        self._arrived = asyncio.Event()
        self._draining = asyncio.Event()
        self._unsent = asyncio.Semaphore(_UNSENT_LIMIT)
        self._account = InferenceTelemetry(events)
        self._outlet = ResultSender(self._channel, pipeline, stage, worker, self._account)
        self._detours: dict[bytes, Route] = {}
        self._loaded = False
        self._vitals = WorkerPresence(self._channel, self._topics, pipeline, stage, worker, device)

    # Life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load what the executor needs, connect, and tell the world; raises `WorkerTwin` if the world objects."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._executor.start, self)
        self._loaded = True
        presence = self._topics.presence(self.worker)
        await self._channel.open(will=Will(presence, b"", retain=True))
        await self._vitals.check_for_conflict(self._executor.fingerprint, self._executor.formats)
        await self._channel.subscribe(self._inbox, self._heard, self._garbage)
        await self._channel.subscribe(self._topics.shared_task_filter, self._heard, self._garbage, qos=1)
        await self._outlet.open()
        self._channel.transport.on_reconnect(self._report)
        await self._report()

    async def wait_for_conflict(self) -> None:
        """Raise `WorkerTwin` should the world object only after `start`; else wait until cancelled."""
        await self._vitals.watch_for_conflict()

    async def run(self) -> None:
        """Work until `drain` is called, then finish what is in hand."""
        reporting = asyncio.create_task(self._keep_reporting(), name="report")
        draining = asyncio.create_task(self._draining.wait(), name="draining")
        try:
            while not (self._draining.is_set() and not self._queue):
                if not self._queue:
                    arrived = asyncio.create_task(self._arrived.wait(), name="arrived")
                    await asyncio.wait({arrived, draining}, return_when=asyncio.FIRST_COMPLETED)
                    arrived.cancel()
                    continue
                if not await self._may_work():
                    break
                await self._work(await self._collect())
            await self._outlet.flush()
        finally:
            reporting.cancel()
            draining.cancel()
            await asyncio.gather(reporting, draining, return_exceptions=True)

    async def _may_work(self) -> bool:
        """Wait until so little is unsent that more may be computed; False when nothing moves while we are leaving."""
        while True:
            try:
                async with asyncio.timeout(CREDIT_TIMEOUT_S + 1):
                    await self._unsent.acquire()
                return True
            except TimeoutError:
                if self._draining.is_set():
                    log.warning("%d tasks are left undone: nothing can be sent", len(self._queue))
                    return False

    async def drain(self) -> None:
        """Take no new tasks; `run` returns when those in hand are done."""
        if self._draining.is_set():
            return
        self._vitals.state = "draining"
        await self._briefly("it drains", self._close_door())
        self._draining.set()

    async def _close_door(self) -> None:
        await self._report()
        await self._channel.transport.unsubscribe(self._topics.shared_task_filter)

    async def stop(self) -> None:
        """Tell the world, leave, and end the executor. `run` must have returned."""
        await self._outlet.close()
        if self._channel.is_open:
            await self._briefly("it leaves", self._vitals.deregister())
            await self._channel.close()
        if self._loaded:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._executor.stop)
        self._thread.shutdown()

    async def _briefly(self, what: str, telling: Coroutine[Any, Any, None]) -> None:
        """Tell the world something that it may miss: it is not waited for long, nor does its refusal stop a worker."""
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await telling
        except TimeoutError:
            log.warning("worker %s could not say that %s: no broker for %g s", self.worker, what, _FAREWELL_S)
        except SparseError as error:
            log.warning("worker %s could not say that %s: %s", self.worker, what, error)

    # In -----------------------------------------------------------------------------------------------------------

    def _heard(self, topic: str, message: Message) -> None:
        match message:
            case Task():
                self._accept(message)
            case TaskDone():
                self._outlet.credit_released(message)
            case _:
                self.counters["unexpected"] += 1

    def _accept(self, task: Task) -> None:
        if not task.reply_to.topic:
            # A foreign client without a Response Topic: nobody could ever see the answer.
            self.counters["no_reply_address"] += 1
            log.warning("dropped a task without a Response Topic")
        elif self._draining.is_set():
            self._outlet.send_in_background(self._outlet.reject(task, "Draining", "the worker is leaving"))
        else:
            context = TaskContext(task.request_id, task.source, task.attempt)
            job = QueuedTask(task, time.monotonic(), context)
            if twin := self._queue.replace_duplicate(job):
                self._outlet.send_in_background(self._outlet.release_credit(twin.task))
            elif why := self._queue.add(job):
                self._outlet.send_in_background(self._outlet.reject(task, "Busy", why))
            self._arrived.set()

    def _garbage(self, error: WireError, properties: Properties) -> None:
        self.counters["malformed"] += 1
        self._outlet.send_in_background(self._outlet.reject_malformed(error, properties))

    # Work ---------------------------------------------------------------------------------------------------------

    async def _collect(self) -> list[QueuedTask]:
        """The next tasks: as many as wait, up to `max_batch`, after at most `max_wait_ms` for more."""
        size = self._table.max_batch if self._executor.batchable else 1
        first = self._queue.first
        if first is None:  # it was late before there was leave to work
            return []
        deadline_s = first.arrived_s + self._table.max_wait_ms / 1000
        while len(self._queue) < size and not self._draining.is_set() and (left_s := deadline_s - time.monotonic()) > 0:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left_s)
            except TimeoutError:
                break
        self._drop_expired()
        jobs = self._queue.take(size)
        self._arrived.clear()
        return jobs

    def _drop_expired(self) -> None:
        """Give up the tasks that nobody waits for any more, whoever asked for them may be gone."""
        for job in self._queue.pop_expired(time.monotonic()):
            self._vitals.expired += 1
            self._outlet.send_in_background(self._outlet.deliver(Failed(job, job.deadline_error(self.stage)), None))

    async def _work(self, jobs: list[QueuedTask]) -> None:
        if not jobs:  # all that waited were late
            self._unsent.release()
            return
        begin_s = time.monotonic()
        self._vitals.record_queue_waits([begin_s - job.arrived_s for job in jobs])
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(self._thread, self._compute.run, jobs)
        detours, self._detours = self._detours, {}
        self._vitals.record_compute(len(jobs), time.monotonic() - begin_s)
        for batch in self._compute.batches:
            self._account.record_batch(batch)
        self._outlet.send_in_background(self._deliver(outcomes, detours))

    async def _deliver(self, outcomes: list[TaskOutcome], detours: dict[bytes, Route]) -> None:
        deliveries = (
            self._outlet.deliver(outcome, detours.get(outcome.queued.task.request_id)) for outcome in outcomes
        )
        try:
            # All at once: one whose way is blocked holds up no other.
            for problem in await asyncio.gather(*deliveries, return_exceptions=True):
                if problem:
                    log.warning("could not send: %s", problem)
        finally:
            self._unsent.release()

    def dispatch(self, tensors: Mapping[str, Any], task: TaskContext, stage: str) -> None:
        """Pass the request on to `stage` (see `stages.executor.Node`)."""
        self._file.find_stage(stage)
        body = TensorContent({name: from_array(value) for name, value in tensors.items()}, task.metadata)
        self._detours[task.request_id] = Route(stage, body)

    async def _report(self) -> None:
        self._vitals.malformed = self.counters["malformed"]
        self._vitals.failed = self._outlet.failed
        self._vitals.rejected = self._outlet.rejected
        await self._vitals.report(len(self._queue), self._queue.oldest_arrival_s)

    async def _keep_reporting(self) -> None:
        """Report until cancelled: a worker that the broker lets say nothing of itself still does its work."""
        told = False
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            self._drop_expired()
            try:
                await self._report()
            except SparseError as error:
                if not told:
                    log.warning("worker %s could not report: %s", self.worker, error)
                told = True
            else:
                told = False
