"""The place of one worker in its pipeline, shared by the objects that it consists of."""

from dataclasses import dataclass, field

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.protocol.messages import Failure
from brokers.protocol.topics import StageTopics
from brokers.telemetry.client import EventClient


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The worker with the id `worker` of `stage`: its torch device, number of compute threads, and event client."""

    pipeline: Pipeline
    stage: StageTable
    worker: str
    device: str = "cpu"
    threads: int = 1
    events: EventClient = field(default_factory=EventClient)

    @property
    def topics(self) -> StageTopics:
        return self.pipeline.topics(self.stage)

    @property
    def inbox(self) -> str:
        return self.topics.inbox(self.worker)

    @property
    def next_stage(self) -> StageTable | None:
        return self.pipeline.next_stage(self.stage)

    def failure(self, request: bytes, code: str, reason: str, *, attempt: int = 1, retry: bool = False) -> Failure:
        """Return the message that this worker could not do its part of a request."""
        return Failure(
            request_id=request,
            stage=self.stage.name,
            worker=self.worker,
            error=code,
            reason=reason,
            attempt=attempt,
            retry=retry,
        )
