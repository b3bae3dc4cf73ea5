"""Who trains a pipeline now, as a source hears of it: from the record of the first stage's worker that conducts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from brokers.errors import WireError
from brokers.protocol.topics import last_level
from brokers.protocol.training import SourceProgress
from brokers.protocol.transport import Delivery


@dataclass(frozen=True, slots=True)
class TermMembers:
    """The workers of one term, the version that it began with or has come to, and what of it is whose."""

    term: int
    workers: Mapping[str, str]  # stage -> worker
    version: int
    progress: Mapping[str, SourceProgress]
    reason: str  # the term began


@dataclass(slots=True)
class _ReceivedRecord:
    birth: WorkerRecord
    heard_s: float


@dataclass(slots=True, eq=False)
class MembershipWatcher:
    """Listens to the workers of the first stage. `changed` is called when the crew may be another."""

    pipeline: Pipeline
    problem: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _records: dict[str, _ReceivedRecord] = field(default_factory=dict)

    async def subscribe(self, line: MessageChannel) -> None:
        topics = self.pipeline.topics(self.pipeline.stage[0])
        await line.transport.subscribe(topics.presence_filter, self._heard, qos=1)

    def reset(self) -> None:
        """Our connection broke: only what is heard from now on counts."""
        self._records.clear()
        self.changed.set()

    @property
    def members(self) -> TermMembers | None:
        """The crew of the newest term; None while nobody trains."""
        now_s = time.monotonic()
        found: TermMembers | None = None
        for record in self._records.values():
            training = record.birth.training
            if training is None or not training.members or now_s - record.heard_s > PRESENCE_TIMEOUT_S:
                continue
            if found is None or training.term > found.term:
                version = training.version or 0
                found = TermMembers(training.term, training.members, version, training.progress, training.term_reason)
        return found

    def worker_inbox(self, crew: TermMembers, stage: str) -> str:
        """Where the worker of a stage reads."""
        return self.pipeline.topics(self.pipeline.find_stage(stage)).inbox(crew.workers[stage])

    def coordinator_inbox(self, crew: TermMembers) -> str:
        """Where whoever conducts reads."""
        return self.worker_inbox(crew, self.pipeline.stage[0].name)

    def _heard(self, delivery: Delivery) -> None:
        worker = last_level(delivery.topic)
        if not delivery.payload:
            self._records.pop(worker, None)
        else:
            try:
                birth = WorkerRecord.from_bytes(bytes(delivery.payload))
            except WireError:
                return
            if birth.worker != worker or birth.training is None:
                return
            self._records[worker] = _ReceivedRecord(birth, time.monotonic())
        told = [record.birth.training.problem for record in self._records.values() if record.birth.training]
        self.problem = next((problem for problem in told if problem), "")
        self.changed.set()
