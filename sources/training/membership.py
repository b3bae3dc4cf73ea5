"""The members of a training pipeline, as a source sees them: from the presence record of the coordinator."""

import asyncio
import time
from collections.abc import Iterator

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.worker_registry import PresenceEvent, PresenceListener
from brokers.errors import SparseError
from brokers.protocol.training import TrainingStatus
from brokers.protocol.transport import Transport


class TermOver(SparseError):
    """The term of the current step has ended: the step must be repeated in the next term."""

    def __init__(self, reason: str) -> None:
        super().__init__("TermOver", reason)


class MembershipWatcher:
    """Follows the presence records of the first stage's workers. `changed` is set when the members may have changed."""

    def __init__(self, pipeline: Pipeline, transport: Transport) -> None:
        self.changed = asyncio.Event()
        self._pipeline = pipeline
        self._presence = PresenceListener(transport, self._on_presence, reset_on_reconnect=True)

    async def open(self) -> None:
        await self._presence.subscribe(self._pipeline.topics(self._pipeline.stage[0]).presence_filter)

    async def close(self) -> None:
        await self._presence.close()

    def _on_presence(self, event: PresenceEvent) -> None:
        self.changed.set()

    @property
    def term(self) -> TrainingStatus | None:
        """The newest term, with its members, as its coordinator reports it; None while there is no coordinator."""
        coordinators = [status for status in self._statuses() if status.members]
        return max(coordinators, key=lambda status: status.term, default=None)

    @property
    def problem(self) -> str:
        """Why the pipeline cannot be trained, as the first stage reports it; empty if it can."""
        return next((status.problem for status in self._statuses() if status.problem), "")

    def _statuses(self) -> Iterator[TrainingStatus]:
        now_s = time.monotonic()
        for entry in self._presence.registry.workers.values():
            if entry.record.training is not None and not entry.is_silent(now_s):
                yield entry.record.training

    def worker_inbox(self, term: TrainingStatus, stage: str) -> str:
        """The inbox topic of the worker of a stage."""
        return self._pipeline.topics(self._pipeline.find_stage(stage)).inbox(term.members[stage])

    def coordinator_inbox(self, term: TrainingStatus) -> str:
        """The inbox topic of the coordinator, which is the first stage's worker."""
        return self.worker_inbox(term, self._pipeline.stage[0].name)
