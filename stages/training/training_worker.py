"""The worker of a training pipeline: runs the steps of one stage, and takes part in the terms of its coordinator.

The step queue decides which operation is next, the step executor runs it. In the first stage each worker also has a
coordinator, which decides which workers train, and from which version; workers of later stages follow the leader's
coordinator.
"""

import logging
import secrets
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from brokers.dispatch.worker_registry import PresenceEvent, PresenceListener
from brokers.errors import SparseError, WireError, error_code
from brokers.protocol.codec import make_failure_reply
from brokers.protocol.messages import REQUEST_ID_BYTES, Gradient, Message, StepMessage, Task
from brokers.protocol.topics import source_presence_topic
from brokers.protocol.training import MICRO_BATCH_KEY, MicroBatch, TrainingStatus
from brokers.protocol.transport import Properties, Transport
from stages.training.coordinator import Coordinator, CoordinatorCommand
from stages.training.part_trainer import PartTrainer
from stages.training.step_executor import SendQueue, StepExecutor
from stages.training.step_queue import Commit, StepOperation, StepQueue
from stages.worker.stage_worker import StageWorker
from stages.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

# How long a worker that drains waits for the commit of its current step.
_DRAIN_TIMEOUT_S = 10.0
# In presence records and their own messages, texts from other processes are cut to this.
_PROBLEM_MAX_CHARS = 300


class TrainingWorker(StageWorker):
    """Trains the part of one stage; its checkpoints are in `checkpoint_folder`."""

    def __init__(
        self, transport: Transport, context: WorkerContext, part_trainer: PartTrainer, checkpoint_folder: Path
    ) -> None:
        super().__init__(transport, context)
        pipeline = context.pipeline
        stage_names = tuple(stage.name for stage in pipeline.stage)
        index = stage_names.index(self.stage)
        awaits_labels = pipeline.training.labels == "stay" and 0 < index == len(stage_names) - 1
        self.step_queue = StepQueue(pipeline.training.schedule, index, len(stage_names), awaits_labels=awaits_labels)
        self.send_queue = SendQueue(self.channel)
        self.executor = StepExecutor(context, part_trainer, self.send_queue, self.run_in_thread, checkpoint_folder)
        self.coordinator: Coordinator | None = None
        if index == 0:
            self.coordinator = Coordinator(self.worker, stage_names, pipeline.pipeline.lease_s)
        self._listener = PresenceListener(transport, self._on_presence)
        self._commands: list[StepMessage] = []  # of the coordinator, and of sources that fetch weights
        self._disconnects = 0
        self.set_state("standby")

    async def _load(self) -> tuple[str, tuple[str, ...]]:
        fingerprint = await self.executor.start()
        self.step_queue.stand_by(self.executor.checkpoints.term)  # the checkpoints prove that this term has begun
        return fingerprint, ()

    async def _subscribe(self) -> None:
        self.send_queue.open()
        await self.channel.subscribe(self.context.inbox, self._on_message, self._on_malformed)
        pipeline = self.context.pipeline
        stages = pipeline.stage if self.coordinator else pipeline.stage[:1]
        filters = [pipeline.topics(stage).presence_filter for stage in stages]
        if self.coordinator:
            filters.append(source_presence_topic("+", self.pipeline, "+"))
        await self._listener.subscribe(*filters)

    async def _work(self) -> None:
        drain_deadline_s: float | None = None
        while True:
            if self._is_draining:
                now_s = time.monotonic()
                drain_deadline_s = drain_deadline_s or now_s + _DRAIN_TIMEOUT_S
                has_work = self.step_queue.has_uncommitted_work or self._commands
                if not has_work or now_s >= drain_deadline_s:
                    break
            if self._commands:
                await self._handle_command(self._commands.pop(0))
            elif (operation := self.step_queue.next_operation()) is not None:
                await self._run_operation(operation)
            else:
                await self._wait_for_wake(drain_deadline_s and max(0.0, drain_deadline_s - time.monotonic()))
        await self.executor.try_save_checkpoint()

    async def _close(self) -> None:
        await self._listener.close()
        await self.send_queue.close()

    async def report(self) -> None:
        status = self.executor.training_status(self.step_queue.term, self._disconnects)
        self.presence.training = self.coordinator.extend_status(status) if self.coordinator else status
        await self.presence.report(len(self.step_queue), counters=self.counters)

    async def _on_reconnect(self) -> None:
        self._disconnects += 1
        if self.coordinator:
            self.coordinator.end_term("the first stage was disconnected")
        await self.report()

    def _on_message(self, topic: str, message: Message) -> None:
        try:
            match message:
                case Task():
                    metadata = getattr(message.content, "metadata", {})
                    self.step_queue.add_task(message, MicroBatch.from_json(metadata.get(MICRO_BATCH_KEY)))
                case Gradient():
                    self.step_queue.add_gradient(message)
                case StepMessage(verb="commit"):
                    self.step_queue.add_commit(message)
                case StepMessage(verb="quiesce" | "restore" | "fetch_weights"):
                    self._commands.append(message)
                case StepMessage():
                    self._on_coordinator_message(message)
                case _:
                    self.counters["unexpected"] += 1
        except WireError as error:
            self.counters["rejected" if error.code == "Busy" else "malformed"] += 1
            log.info("refused a %s: %s", type(message).__name__, error)
            self._send_failure(message, error)
        self._wake.set()

    def _on_malformed(self, error: WireError, properties: Properties) -> None:
        self.counters["malformed"] += 1
        if answer := make_failure_reply(error, properties, self.stage, self.worker):
            reply, failure = answer
            self.send_queue.send(reply.topic, failure)

    def _send_failure(self, message: Message, error: Exception) -> None:
        """Report an error to the sender of a message, if it has an address."""
        topic = message.reply_to.topic if isinstance(message, Task) else getattr(message, "sender_inbox", "")
        if topic:
            code = error_code(error)
            retry = isinstance(error, WireError) and error.retry
            failure = self.context.failure(message.request_id, code, str(error) or code, retry=retry)
            self.send_queue.send(topic, failure)

    async def _run_operation(self, operation: StepOperation) -> None:
        """Run one operation; its error fails the step, and is reported to the source."""
        term = self.step_queue.term
        begin_s = time.monotonic()
        try:
            await self.executor.execute(operation)
        except Exception as error:  # the network, the loss and the optimizer may be the user's code
            if not isinstance(error, SparseError):
                log.error("stage %s failed in a step", self.stage, exc_info=error)
            self.counters["failed"] += 1
            self.step_queue.mark_failed(operation)
            self._send_failure(operation.message if isinstance(operation, Commit) else operation.task, error)
        else:
            if self.step_queue.mark_done(operation) and not isinstance(operation, Commit):
                self.executor.send_prepared(operation, term)
        finally:
            now_s = time.monotonic()
            self.presence.record_compute(1, now_s - begin_s)
            if self.coordinator:
                self.coordinator.on_progress(now_s)

    async def _handle_command(self, command: StepMessage) -> None:
        try:
            await self._execute_command(command)
        except WireError as error:
            self._send_failure(command, error)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            self.counters["malformed"] += 1
            log.warning("ignored a %s message with malformed details: %s", command.verb, error)

    async def _execute_command(self, command: StepMessage) -> None:
        if command.verb == "fetch_weights":
            if command.term == self.step_queue.term:
                await self.executor.send_weights(command)
            return
        self.step_queue.check_command(command)
        if command.verb == "abort":  # from `stand_by`
            self.step_queue.stand_by(command.term)
            self.set_state("standby")
            await self.executor.abort()
            self.executor.discard_version()
        elif command.verb == "quiesce":
            members = command.details.get("members", {})
            self.executor.members = {str(stage): str(worker) for stage, worker in members.items()}
            self.step_queue.begin_term(command.term)
            await self.executor.abort()
            status = self.executor.training_status(command.term, self._disconnects)
            self._answer(command, status=status.model_dump())
        else:
            problem = await self._restore(command)
            self.set_state("up")
            self._answer(command, problem=problem)
        await self.report()

    async def _restore(self, command: StepMessage) -> str:
        """Restore the version of a command; return the problem if that failed."""
        version = int(command.details["version"])
        restored_term = int(command.details["restored_term"])
        try:
            await self.executor.restore(version, command.term, restored_term)
        except (SparseError, OSError, RuntimeError, ValueError) as error:
            log.warning("could not restore version %d: %s", version, error)
            return str(error)
        return ""

    def _answer(self, command: StepMessage, **details: Any) -> None:
        answer = StepMessage(
            request_id=command.request_id,
            verb="quiesced" if command.verb == "quiesce" else "restored",
            term=command.term,
            details={"stage": self.stage, "worker": self.worker, **details},
        )
        self.send_queue.send(command.sender_inbox, answer)

    def stand_by(self, term: int) -> None:
        """Stop training after the current operation: another worker of this stage trains in `term`."""
        if term >= self.step_queue.term and not self.step_queue.is_standby:
            self.set_state("standby")
            later = [command for command in self._commands if command.term > term]
            self._commands = [StepMessage(request_id=bytes(REQUEST_ID_BYTES), verb="abort", term=term), *later]
            self._wake.set()

    def _on_presence(self, event: PresenceEvent) -> None:
        if self.coordinator is None:
            # Members are in the record of the leader: if it names another worker of our stage, that one trains.
            training = event.worker.training if event.worker and event.kind != "lost" else None
            if training and training.members.get(self.stage, self.worker) != self.worker:
                self.stand_by(training.term)
            return
        if event.source and event.kind == "lost" and event.name in self.step_queue.sources:
            self.coordinator.end_term(f"source {event.name} was lost in the middle of a step")
        if event.worker and event.kind != "lost":
            is_live = self._listener.registry.workers[event.topic].is_live
            self.coordinator.on_worker(event.worker, is_live=is_live)
        elif event.worker and self._is_loss(event):
            self.coordinator.on_worker_lost(event.worker.stage, event.worker.worker)
        self._tick()

    def _is_loss(self, event: PresenceEvent) -> bool:
        """Whether a worker is gone: not if its new process has just appeared, nor if we were frozen ourselves."""
        is_own = event.topic == self.presence.record.topic
        return event.reason != "restarted" and not (is_own and event.reason == "silent")

    def _on_coordinator_message(self, message: StepMessage) -> None:
        if self.coordinator is None:
            return
        details = message.details
        stage = str(details.get("stage"))
        worker = str(details.get("worker"))
        match message.verb:
            case "quiesced":
                try:
                    status = TrainingStatus.model_validate(details.get("status"))
                except ValidationError:
                    return
                self.coordinator.on_quiesced(stage, worker, message.term, status)
            case "restored":
                problem = str(details.get("problem", ""))[:_PROBLEM_MAX_CHARS]
                self.coordinator.on_restored(stage, worker, message.term, time.monotonic(), problem)
            case "abort" if message.term == self.coordinator.term:
                reason = str(details.get("reason", "a source aborted its step"))[:_PROBLEM_MAX_CHARS]
                self.coordinator.end_term(reason)
        self._tick()

    def _tick(self) -> None:
        if self.coordinator is None:
            return
        was_leader = self.coordinator.is_leader
        phase = self.coordinator.phase
        silent = [entry.record.source for entry in self._listener.registry.sources.values() if entry.is_lost]
        now_s = time.monotonic()
        for command in self.coordinator.tick(now_s, int(1000 * time.time()), self.step_queue.sources, silent):
            self._send_command(command)
        if was_leader and not self.coordinator.is_leader:
            self.stand_by(self.step_queue.term)
        if self.coordinator.phase == "training" and phase != "training":
            self.presence.report_soon()  # sources wait for the members in our record

    def _send_command(self, command: CoordinatorCommand) -> None:
        details: dict[str, Any] = {"members": command.members}
        if command.verb == "restore":
            details = {"version": command.version, "restored_term": command.restored_term}
        message = StepMessage(
            request_id=secrets.token_bytes(REQUEST_ID_BYTES),
            verb=command.verb,
            term=command.term,
            sender_inbox=self.context.inbox,
            details=details,
        )
        pipeline = self.context.pipeline
        for stage in pipeline.stage:
            self.send_queue.send(pipeline.topics(stage).inbox(command.members[stage.name]), message)
        self.presence.report_soon()
