"""One worker of one stage that is trained: its inbox, its compute thread, and the way to its neighbours.

The loop owns the network; the learner runs in a thread of its own. What is to be done next is decided by `steps`, who
trains and from which version by the `conductor` of the first stage's worker. Four verbs: start, run, drain, stop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.dispatch.channel import MessageChannel
from brokers.errors import SparseError, WireError, error_code
from brokers.protocol.codec import make_failure_reply
from brokers.protocol.messages import REQUEST_ID_BYTES, Failure, Gradient, Message, StepMessage, StepVerb, Task
from brokers.protocol.training import MICRO_BATCH_KEY, MicroBatch
from brokers.protocol.transport import Properties, Transport, Will
from brokers.telemetry.client import EventClient
from stages.training.checkpoints import CheckpointStore
from stages.training.part_trainer import PartTrainer
from stages.training.role import TrainingRole
from stages.training.send_queue import SendQueue
from stages.training.step_executor import StepExecutor
from stages.training.step_queue import Commit, StepOperation, StepQueue
from stages.worker.worker_presence import WorkerPresence

log = logging.getLogger(__name__)

REPORT_EVERY_S = 1.0
_FAREWELL_S = 2.0
# How long a worker that is told to leave waits for the step in hand to become a version.
_DRAIN_S = 10.0


class TrainingWorker:
    """Trains one stage of a pipeline through one broker."""

    def __init__(
        self,
        transport: Transport,
        pipeline: Pipeline,
        stage: StageTable,
        learner: PartTrainer,
        worker: str,
        device: str,
        checkpoints: Callable[[str], CheckpointStore],
        events: EventClient | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.pipeline, self.stage, self.worker = pipeline.name, stage.name, worker
        self._topics = pipeline.topics(stage)
        self.inbox = self._topics.inbox(worker)
        self.channel = MessageChannel(transport)
        self.send_queue = SendQueue(self.channel)
        index, stages = pipeline.stage.index(stage), len(pipeline.stage)
        stays = pipeline.training.labels == "stay" and 0 < index == stages - 1
        self.step_queue = StepQueue(pipeline.training.schedule, index, stages, awaits_labels=stays)
        self._executor = StepExecutor(pipeline, stage, worker, learner, self.send_queue, checkpoints, events)
        self._vitals = WorkerPresence(self.channel, self._topics, pipeline, stage, worker, device)
        self._vitals.state = "standby"
        self._orders: list[StepMessage] = []
        self._changed = asyncio.Event()
        self._draining = False
        self._breaks = 0
        self.last_progress_s = time.monotonic()  # when something of a step happened last
        self.role: TrainingRole = TrainingRole()
        self._errands: set[asyncio.Task[None]] = set()

    # Life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Build the part, see what checkpoints there are, connect, and stand by."""
        fingerprint = await self._executor.start()
        self.step_queue.stand_by(self._executor.checkpoint_term)
        await self.channel.open(will=Will(self._topics.presence(self.worker), b"", retain=True))
        await self._vitals.check_for_conflict(fingerprint)
        self.send_queue.open()
        await self.channel.subscribe(self.inbox, self._heard, self._garbage)
        self.channel.transport.on_reconnect(self._reconnected)
        await self.report()
        await self.role.open()

    async def wait_for_conflict(self) -> None:
        """Raise `WorkerTwin` should the world object only after `start`; else wait until cancelled."""
        await self._vitals.watch_for_conflict()

    async def run(self) -> None:
        """Work until `drain` is called and what is in hand is done, as far as it can be in a while."""
        reporting = asyncio.create_task(self._keep_reporting(), name="report")
        reporting.add_done_callback(lambda _: self._changed.set())
        leave_s = float("inf")
        try:
            while True:
                if reporting.done():  # to others this worker is gone, and nobody would start another
                    reporting.result()
                if self._draining:
                    leave_s = min(leave_s, time.monotonic() + _DRAIN_S)
                    if not (self.step_queue.has_uncommitted_work or self._orders) or time.monotonic() >= leave_s:
                        break
                if self._orders:
                    await self._obey_if_sound(self._orders.pop(0))
                elif (work := self.step_queue.next_operation()) is not None:
                    await self._do(work)
                else:
                    await self._wait(leave_s)
            await self._executor.try_save_checkpoint()
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)

    async def _wait(self, until_s: float) -> None:
        self._changed.clear()
        left_s = None if until_s == float("inf") else max(0.0, until_s - time.monotonic())
        with suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await self._changed.wait()

    async def drain(self) -> None:
        """Begin no further step; `run` returns when the one in hand is a version."""
        self._draining = True
        self._vitals.state = "draining"
        self._changed.set()

    async def stop(self) -> None:
        """Tell the world, leave, and end the thread. `run` must have returned."""
        for errand in self._errands:
            errand.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        await self.send_queue.close()
        if self.channel.is_open:
            try:
                async with asyncio.timeout(_FAREWELL_S):
                    await self._vitals.deregister()
            except (TimeoutError, SparseError) as error:
                log.warning("worker %s could not say that it leaves: %s", self.worker, error or "no broker")
            await self.channel.close()
        self._executor.stop()

    # In -----------------------------------------------------------------------------------------------------------

    def _heard(self, topic: str, message: Message) -> None:
        try:
            match message:
                case Task():
                    self._accept(message)
                case Gradient():
                    self.step_queue.add_gradient(message)
                case StepMessage(verb="commit"):
                    self.step_queue.add_commit(message)
                case StepMessage(verb="quiesce" | "restore" | "fetch_weights"):
                    self._orders.append(message)
                case StepMessage():
                    self.role.on_step_message(message)
                case _:
                    self.counters["unexpected"] += 1
        except WireError as error:
            self.counters["malformed"] += 1
            log.info("refused a %s: %s", type(message).__name__.lower(), error)
            self._refuse(message, error)
        self._changed.set()

    def _accept(self, task: Task) -> None:
        micro = MicroBatch.from_json(getattr(task.content, "metadata", {}).get(MICRO_BATCH_KEY))
        if why := self.step_queue.add_task(task, micro):
            self._vitals.rejected += 1
            self._fail(task.reply_to.topic, task.request_id, "Busy", why, retry=True)

    def _refuse(self, message: Message, error: WireError) -> None:
        """Tell whoever sent what cannot be used, if it says where."""
        if topic := message.reply_to.topic if isinstance(message, Task) else getattr(message, "sender_inbox", ""):
            self._fail(topic, message.request_id, error.code, str(error), retry=error.retry)

    def _garbage(self, error: WireError, properties: Properties) -> None:
        self.counters["malformed"] += 1
        if found := make_failure_reply(error, properties, self.stage, self.worker):
            reply, failure = found
            self.send_queue.send(reply.topic, failure)

    def _fail(self, topic: str, request: bytes, error: str, reason: str, *, retry: bool = False) -> None:
        failure = Failure(
            request_id=request, stage=self.stage, worker=self.worker, error=error, reason=reason, retry=retry
        )
        self.send_queue.send(topic, failure)

    # Work ---------------------------------------------------------------------------------------------------------

    async def _do(self, work: StepOperation) -> None:
        """One operation of the step in hand; whatever it raises, the step's source is told."""
        term, begin_s = self.step_queue.term, time.monotonic()
        reply = work.message.sender_inbox if isinstance(work, Commit) else work.task.reply_to.topic
        request = work.message.request_id if isinstance(work, Commit) else work.task.request_id
        try:
            await self._executor.execute(work)
        except Exception as error:
            if not isinstance(error, SparseError):
                log.error("stage %s failed in a step", self.stage, exc_info=error)
            self._vitals.failed += 1
            self.step_queue.mark_failed(work)
            retry = isinstance(error, WireError) and error.retry
            self._fail(reply, request, error_code(error), str(error) or error_code(error), retry=retry)
            return
        finally:
            self.last_progress_s = time.monotonic()
            self._vitals.record_compute(1, self.last_progress_s - begin_s)
        if self.step_queue.mark_done(work) and not isinstance(work, Commit):
            self._executor.send_prepared(work, term)

    # Terms ----------------------------------------------------------------------------------------------------------

    async def _obey_if_sound(self, word: StepMessage) -> None:
        try:
            await self._obey(word)
        except (KeyError, ValueError, TypeError, AttributeError) as problem:
            self.counters["malformed"] += 1
            log.warning("refused to %s: its details are not those of docs/protocol.md: %s", word.verb, problem)

    async def _obey(self, word: StepMessage) -> None:
        """What the conductor, or a source that wants the weights, asks for."""
        if word.verb == "fetch_weights":
            if word.term == self.step_queue.term:
                await self._executor.send_weights(word)
            return
        if objection := self.step_queue.rejection(word):
            self._refuse(word, objection)
            return
        told: dict[str, Any] = {"stage": self.stage, "worker": self.worker}
        if word.verb == "abort":  # to ourselves
            self.step_queue.stand_by(word.term)
            self._vitals.state = "draining" if self._draining else "standby"
            await self._executor.abort()
            self._executor.discard_version()
            await self.report()
            return
        if word.verb == "quiesce":
            self._executor.members = {
                str(stage): str(worker) for stage, worker in word.details.get("members", {}).items()
            }
            self.step_queue.begin_term(word.term)
            await self._executor.abort()
            told["status"] = self._executor.training_status(self.step_queue.term, self._breaks).model_dump()
        else:
            told["problem"] = await self._restore(word)
            if not self._draining:
                self._vitals.state = "up"
        verb: StepVerb = "quiesced" if word.verb == "quiesce" else "restored"
        self.send_queue.send(
            word.sender_inbox, StepMessage(request_id=word.request_id, verb=verb, term=word.term, details=told)
        )
        await self.report()

    async def _restore(self, word: StepMessage) -> str:
        """Be at the version that is asked for; if that cannot be, why."""
        version, since = int(word.details["version"]), int(word.details["restored_term"])
        try:
            await self._executor.restore(version, word.term, since)
        except (SparseError, OSError, RuntimeError, ValueError) as error:
            log.warning("cannot go back to version %d: %s", version, error)
            return str(error)
        return ""

    def stand_by(self, term: int) -> None:
        """Another worker of this stage trains in this term: let go of what is in hand, as soon as that can be."""
        if term >= self.step_queue.term and not self.step_queue.is_standby:
            self._vitals.state = "draining" if self._draining else "standby"
            later = [order for order in self._orders if order.term > term]
            self._orders = [StepMessage(request_id=bytes(REQUEST_ID_BYTES), verb="abort", term=term), *later]
            self._changed.set()

    # Presence -------------------------------------------------------------------------------------------------------

    async def report(self) -> None:
        self._vitals.training = self.role.extend_status(
            self._executor.training_status(self.step_queue.term, self._breaks)
        )
        self._vitals.malformed = self.counters["malformed"]
        await self._vitals.report(len(self.step_queue))

    def report_soon(self) -> None:
        """Something has changed that others wait for: not only at the next second."""
        task = asyncio.create_task(self._try_to_report(), name="report-soon")
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _try_to_report(self) -> None:
        try:
            await self.report()
        except SparseError as error:
            log.warning("worker %s could not report: %s", self.worker, error)

    async def _reconnected(self) -> None:
        self._breaks += 1
        await self.report()

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            self.role.tick()
            await self._try_to_report()
