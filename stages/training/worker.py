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
from brokers.dispatch.channel import Line
from brokers.errors import SparseError, WireError
from brokers.protocol.codec import refusal
from brokers.protocol.messages import REQUEST_ID_BYTES, Failure, Gradient, Message, Step, Task, Verb
from brokers.protocol.training import MICRO, MicroBatch
from brokers.protocol.transport import Properties, Transport, Will
from brokers.telemetry.client import EventClient
from stages.training.checkpoints import Checkpoints
from stages.training.part_trainer import Learner
from stages.training.role import Role
from stages.training.send_queue import Post
from stages.training.step_executor import Execution
from stages.training.step_queue import Commit, Steps, Work
from stages.worker.worker_presence import Vitals

log = logging.getLogger(__name__)

REPORT_EVERY_S = 1.0
_FAREWELL_S = 2.0
# How long a worker that is told to leave waits for the step in hand to become a version.
_DRAIN_S = 10.0


class Trainer:
    """Trains one stage of a pipeline through one broker."""

    def __init__(
        self,
        transport: Transport,
        pipeline: Pipeline,
        stage: StageTable,
        learner: Learner,
        worker: str,
        device: str,
        checkpoints: Callable[[str], Checkpoints],
        events: EventClient | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.pipeline, self.stage, self.worker = pipeline.name, stage.name, worker
        self._topics = pipeline.topics(stage)
        self.inbox = self._topics.inbox(worker)
        self.line = Line(transport)
        self.post = Post(self.line)
        index, stages = pipeline.stage.index(stage), len(pipeline.stage)
        stays = pipeline.training.labels == "stay" and 0 < index == stages - 1
        self.steps = Steps(pipeline.training.schedule, index, stages, awaits_labels=stays)
        self._execution = Execution(pipeline, stage, worker, learner, self.post, checkpoints, events)
        self._vitals = Vitals(self.line, self._topics, pipeline, stage, worker, device)
        self._vitals.state = "standby"
        self._orders: list[Step] = []
        self._changed = asyncio.Event()
        self._draining = False
        self._breaks = 0
        self.moved_s = time.monotonic()  # when something of a step happened last
        self.role: Role = Role()
        self._errands: set[asyncio.Task[None]] = set()

    # Life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Build the part, see what checkpoints there are, connect, and stand by."""
        fingerprint = await self._execution.start()
        self.steps.stand_by(self._execution.term)
        await self.line.open(will=Will(self._topics.presence(self.worker), b"", retain=True))
        await self._vitals.check(fingerprint)
        self.post.open()
        await self.line.listen(self.inbox, self._heard, self._garbage)
        self.line.transport.on_reconnect(self._reconnected)
        await self.report()
        await self.role.open()

    async def objection(self) -> None:
        """Raise `WorkerTwin` should the world object only after `start`; else wait until cancelled."""
        await self._vitals.probation()

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
                    if not (self.steps.begun or self._orders) or time.monotonic() >= leave_s:
                        break
                if self._orders:
                    await self._obey_if_sound(self._orders.pop(0))
                elif (work := self.steps.next()) is not None:
                    await self._do(work)
                else:
                    await self._wait(leave_s)
            await self._execution.leave_version()
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
        await self.post.close()
        if self.line.is_open:
            try:
                async with asyncio.timeout(_FAREWELL_S):
                    await self._vitals.farewell()
            except (TimeoutError, SparseError) as error:
                log.warning("worker %s could not say that it leaves: %s", self.worker, error or "no broker")
            await self.line.close()
        self._execution.stop()

    # In -----------------------------------------------------------------------------------------------------------

    def _heard(self, topic: str, message: Message) -> None:
        try:
            match message:
                case Task():
                    self._accept(message)
                case Gradient():
                    self.steps.take_gradient(message)
                case Step(verb="commit"):
                    self.steps.take_commit(message)
                case Step(verb="halt" | "restore" | "collect"):
                    self._orders.append(message)
                case Step():
                    self.role.heard(message)
                case _:
                    self.counters["unexpected"] += 1
        except WireError as error:
            self.counters["refused"] += 1
            log.info("refused a %s: %s", type(message).__name__.lower(), error)
            self._refuse(message, error)
        self._changed.set()

    def _accept(self, task: Task) -> None:
        micro = MicroBatch.from_text(getattr(task.content, "metadata", {}).get(MICRO))
        if why := self.steps.take_task(task, micro):
            self._vitals.turned_away += 1
            self._fail(task.reply.topic, task.request, "Busy", why, retry=True)

    def _refuse(self, message: Message, error: WireError) -> None:
        """Tell whoever sent what cannot be used, if it says where."""
        if topic := message.reply.topic if isinstance(message, Task) else getattr(message, "sender", ""):
            self._fail(topic, message.request, type(error).__name__, str(error), retry=error.retry)

    def _garbage(self, error: WireError, properties: Properties) -> None:
        self.counters["refused"] += 1
        if found := refusal(error, properties, self.stage, self.worker):
            reply, failure = found
            self.post.send(reply.topic, failure)

    def _fail(self, topic: str, request: bytes, error: str, reason: str, *, retry: bool = False) -> None:
        failure = Failure(
            request=request, stage=self.stage, worker=self.worker, error=error, reason=reason, retry=retry
        )
        self.post.send(topic, failure)

    # Work ---------------------------------------------------------------------------------------------------------

    async def _do(self, work: Work) -> None:
        """One operation of the step in hand; whatever it raises, the step's source is told."""
        term, begin_s = self.steps.term, time.monotonic()
        reply = work.word.sender if isinstance(work, Commit) else work.task.reply.topic
        request = work.word.request if isinstance(work, Commit) else work.task.request
        try:
            await self._execution.do(work)
        except Exception as error:
            if not isinstance(error, SparseError):
                log.error("stage %s failed in a step", self.stage, exc_info=error)
            self._vitals.failed += 1
            self.steps.fail(work)
            retry = isinstance(error, WireError) and error.retry
            self._fail(reply, request, type(error).__name__, str(error) or type(error).__name__, retry=retry)
            return
        finally:
            self.moved_s = time.monotonic()
            self._vitals.worked(1, self.moved_s - begin_s)
        if self.steps.done(work) and not isinstance(work, Commit):
            self._execution.prepared(work, term)

    # Terms ----------------------------------------------------------------------------------------------------------

    async def _obey_if_sound(self, word: Step) -> None:
        try:
            await self._obey(word)
        except (KeyError, ValueError, TypeError, AttributeError) as problem:
            self.counters["refused"] += 1
            log.warning("refused to %s: its details are not those of docs/protocol.md: %s", word.verb, problem)

    async def _obey(self, word: Step) -> None:
        """What the conductor, or a source that wants the weights, asks for."""
        if word.verb == "collect":
            if word.term == self.steps.term:
                await self._execution.send_weights(word)
            return
        if objection := self.steps.objection(word):
            self._refuse(word, objection)
            return
        told: dict[str, Any] = {"stage": self.stage, "worker": self.worker}
        if word.verb == "abandon":  # to ourselves
            self.steps.stand_by(word.term)
            self._vitals.state = "draining" if self._draining else "standby"
            await self._execution.abandon()
            self._execution.forget_version()
            await self.report()
            return
        if word.verb == "halt":
            self._execution.crew = {str(stage): str(worker) for stage, worker in word.details.get("crew", {}).items()}
            self.steps.begin_term(word.term)
            await self._execution.abandon()
            told["standing"] = self._execution.standing(self.steps.term, self._breaks).model_dump()
        else:
            told["problem"] = await self._restore(word)
            if not self._draining:
                self._vitals.state = "up"
        verb: Verb = "halted" if word.verb == "halt" else "restored"
        self.post.send(word.sender, Step(request=word.request, verb=verb, term=word.term, details=told))
        await self.report()

    async def _restore(self, word: Step) -> str:
        """Be at the version that is asked for; if that cannot be, why."""
        version, since = int(word.details["version"]), int(word.details["since"])
        try:
            await self._execution.restore(version, word.term, since)
        except (SparseError, OSError, RuntimeError, ValueError) as error:
            log.warning("cannot go back to version %d: %s", version, error)
            return str(error)
        return ""

    def stand_by(self, term: int) -> None:
        """Another worker of this stage trains in this term: let go of what is in hand, as soon as that can be."""
        if term >= self.steps.term and not self.steps.stands_by:
            self._vitals.state = "draining" if self._draining else "standby"
            later = [order for order in self._orders if order.term > term]
            self._orders = [Step(request=bytes(REQUEST_ID_BYTES), verb="abandon", term=term), *later]
            self._changed.set()

    # Presence -------------------------------------------------------------------------------------------------------

    async def report(self) -> None:
        self._vitals.training = self.role.announce(self._execution.standing(self.steps.term, self._breaks))
        self._vitals.refused = self.counters["refused"]
        await self._vitals.report(len(self.steps))

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
            self.role.look()
            await self._try_to_report()
