"""What a trainer does for the whole pipeline: the first stage's conducts, the others follow.

The one that conducts hears who is up, asks its conductor, and tells the crew what that decides.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from brokers.errors import SparseError, WireError
from brokers.protocol.messages import REQUEST_ID_BYTES, StepMessage
from brokers.protocol.topics import last_level, source_presence_topic
from brokers.protocol.training import TrainingStatus
from brokers.protocol.transport import Delivery, Transport
from brokers.telemetry.client import EventClient
from stages.training.checkpoints import CheckpointStore
from stages.training.coordinator import Coordinator, CoordinatorCommand
from stages.training.part_trainer import PartTrainer
from stages.training.role import TrainingRole
from stages.training.worker import TrainingWorker

log = logging.getLogger(__name__)

# Workers renew their record each second: who has not been heard by then is not there.
_LISTEN_S = 1.3
# It looks around each second: when it did not for so long it was frozen, and soon others take its place.
_FROZEN_S = PRESENCE_TIMEOUT_S / 2


class CoordinatorRole(TrainingRole):
    """Conducts the pipeline as long as its trainer is the one of the first stage that leads; else stands by."""

    def __init__(self, trainer: TrainingWorker, pipeline: Pipeline) -> None:
        self._trainer, self._pipeline = trainer, pipeline
        stages = tuple(stage.name for stage in pipeline.stage)
        self._conductor = Coordinator(trainer.worker, stages, pipeline.pipeline.lease_s)
        self._leading = False
        self._begun_s = self._looked_s = time.monotonic()
        self._sources_s: dict[str, float] = {}  # who feeds, and when it was heard last

    async def open(self) -> None:
        """Listen; the trainer must have started."""
        self._begun_s = self._looked_s = time.monotonic()
        transport = self._trainer.channel.transport
        for stage in self._pipeline.stage:
            topics = self._pipeline.topics(stage)
            await transport.subscribe(topics.presence_filter, partial(self._heard_worker, stage.name), qos=1)
        await transport.subscribe(source_presence_topic("+", self._pipeline.name, "+"), self._heard_source, qos=1)
        transport.on_reconnect(self._reconnected)

    # Heard --------------------------------------------------------------------------------------------------------

    def _heard_worker(self, stage: str, delivery: Delivery) -> None:
        worker, birth = last_level(delivery.topic), None
        if delivery.payload:
            try:
                birth = WorkerRecord.from_bytes(bytes(delivery.payload))
            except WireError:
                return  # nobody who could be in a crew
            if (birth.worker, birth.stage) != (worker, stage):
                return
        self._conductor.on_presence(stage, worker, birth, time.monotonic(), retained=delivery.retain)
        self.tick()

    def _heard_source(self, delivery: Delivery) -> None:
        source = last_level(delivery.topic)
        if delivery.payload:
            self._sources_s[source] = time.monotonic()
        elif self._sources_s.pop(source, None) is not None and source in self._trainer.step_queue.sources:
            self._conductor.end_term(f"source {source} has gone in the middle of a step")
            self.tick()

    def on_step_message(self, word: StepMessage) -> None:
        stage, worker = str(word.details.get("stage")), str(word.details.get("worker"))
        if word.verb == "quiesced":
            try:
                standing = TrainingStatus.model_validate(word.details.get("status"))
            except ValidationError:
                return
            self._conductor.on_quiesced(stage, worker, word.term, standing)
        elif word.verb == "restored":
            problem = str(word.details.get("problem", ""))[:300]
            self._conductor.on_restored(stage, worker, word.term, time.monotonic(), problem)
        elif word.verb == "abort" and word.term == self._conductor.term:
            self._conductor.end_term(str(word.details.get("reason", "a source gave up its step"))[:200])
        self.tick()

    async def _reconnected(self) -> None:
        self._conductor.end_term("the connection of the first stage broke")

    # Decide -------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s > _FROZEN_S:
            # Whatever it was about to decide may be settled by now: it listens first, as one that begins does.
            self._begun_s = now_s
        self._looked_s = now_s
        if now_s - self._begun_s < _LISTEN_S:
            return
        leads = self._conductor.is_leader(now_s, was_leader=self._leading)
        if leads != self._leading:
            self._leading = leads
            log.info("worker %s %s", self._trainer.worker, "leads" if leads else "stands by")
            self._conductor.end_term("another worker of the first stage leads now")
            if not leads:
                self._trainer.stand_by(self._trainer.step_queue.term)
        if not leads:
            return
        self._look_for_silence(now_s)
        phase = self._conductor.phase
        while order := self._conductor.next_command(now_s, int(1000 * time.time())):
            self._tell(order)
        if phase != "open" and self._conductor.phase == "open":
            log.info("term %d begins: %s", self._conductor.term, self._conductor.term_reason)
            self._trainer.report_soon()

    def _look_for_silence(self, now_s: float) -> None:
        steps = self._trainer.step_queue
        if self._conductor.phase != "open" or not steps.sources:
            self._trainer.last_progress_s = now_s
            return
        silent = [name for name in steps.sources if now_s - self._sources_s.get(name, now_s) > PRESENCE_TIMEOUT_S]
        lease_s = self._pipeline.pipeline.lease_s
        if silent:
            self._conductor.end_term(f"source {silent[0]} has fallen silent in the middle of a step")
        elif now_s - self._trainer.last_progress_s > lease_s:
            self._conductor.end_term(f"nothing was heard of the step of {steps.current_source} for {lease_s:g} s")

    def _tell(self, order: CoordinatorCommand) -> None:
        details: Mapping[str, Any] = {"version": order.version, "restored_term": order.restored_term}
        if order.verb == "quiesce":
            details = {"members": order.members}
        word = StepMessage(
            request_id=secrets.token_bytes(REQUEST_ID_BYTES),
            verb=order.verb,
            term=order.term,
            sender_inbox=self._trainer.inbox,
            details=details,
        )
        for stage in self._pipeline.stage:
            self._trainer.send_queue.send(self._pipeline.topics(stage).inbox(order.members[stage.name]), word)
        self._trainer.report_soon()

    def extend_status(self, standing: TrainingStatus) -> TrainingStatus:
        """The record of the one who leads says who the crew is; sources train while it does."""
        if not self._leading:
            return standing
        conductor = self._conductor
        crew = conductor.members if conductor.phase == "open" else {}
        change = {
            "term": conductor.term,
            "members": crew,
            "problem": conductor.problem,
            "term_reason": conductor.term_reason[:400],
        }
        return standing.model_copy(update=change)


class FollowerRole(TrainingRole):
    """A worker of a later stage: it stands by as soon as a term has begun in which another one trains its stage."""

    def __init__(self, trainer: TrainingWorker, pipeline: Pipeline) -> None:
        self._trainer, self._pipeline = trainer, pipeline

    async def open(self) -> None:
        """Listen to whoever conducts; the trainer must have started."""
        topics = self._pipeline.topics(self._pipeline.stage[0])
        await self._trainer.channel.transport.subscribe(topics.presence_filter, self._heard, qos=1)

    def _heard(self, delivery: Delivery) -> None:
        try:
            birth = WorkerRecord.from_bytes(bytes(delivery.payload))
        except SparseError:
            return
        found = birth.training
        if found is not None and found.members.get(self._trainer.stage, self._trainer.worker) != self._trainer.worker:
            self._trainer.stand_by(found.term)


def make_training_worker(
    transport: Transport,
    pipeline: Pipeline,
    stage: StageTable,
    learner: PartTrainer,
    worker: str,
    device: str,
    checkpoints: Path,
    events: EventClient | None = None,
) -> TrainingWorker:
    """A worker that trains `stage`, with the role that its stage has, and its checkpoints in that folder."""
    trainer = TrainingWorker(
        transport, pipeline, stage, learner, worker, device, partial(CheckpointStore, checkpoints), events
    )
    trainer.role = (CoordinatorRole if stage == pipeline.stage[0] else FollowerRole)(trainer, pipeline)
    return trainer
