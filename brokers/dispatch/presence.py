"""Presence records: retained JSON messages with the state and load of a worker or source.

They are read in one place only: brokers/dispatch/worker_registry.py.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from brokers.errors import BadPayload, first_mistake
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES
from brokers.protocol.codec import PROTOCOL_VERSION, check_version
from brokers.protocol.messages import JSON
from brokers.protocol.topics import NAME_PATTERN, StageTopics, source_presence_topic
from brokers.protocol.training import TrainingStatus

# A record has some hundred bytes. Readers keep the newest record of each topic, from any client that may publish.
RECORD_LIMIT_BYTES = 65536
# Message Expiry Interval of a record, which is renewed each second. A record that its last will could not clear at
# every site, because a bridge was down, expires by itself.
RECORD_EXPIRY_S = 60
# Reasons in one object of counts: about ten are in use; a hostile client may not fill a screen with invented ones.
REASON_LIMIT = 32
OTHER_REASON = "other"
FORMAT_LIMIT = 32
# Capacity = batch size + this: tasks in transit to or from the worker.
PREFETCH_TASKS = 2

# One level of a topic: a record from the network must not direct a sender to a topic of the attacker's choice.
_Name = Annotated[str, Field(pattern=NAME_PATTERN)]
_Format = Annotated[str, Field(max_length=128)]
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]  # JSON readers agree on whole numbers up to this
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_State = Literal["up", "standby", "draining", "stopped"]


def normalize_reason_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by reason as a record may hold them: reasons become names, the rarest are summed up as "other".

    Reasons come from other processes (a failure's error code), so they may be any text, and any number of them.
    """
    result: dict[str, int] = {}
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        if not count:
            continue
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", reason)[:64] or OTHER_REASON
        if name not in result and len(result) >= REASON_LIMIT - 1:
            name = OTHER_REASON
        result[name] = result.get(name, 0) + count
    return result


def _normalize_own_counts(counts: Any, info: ValidationInfo) -> Any:
    """Normalize the counts of this process; those from the network must be valid as they are."""
    return normalize_reason_counts(counts) if info.mode == "python" else counts


def _validate_version(version: Any) -> Any:
    check_version(version)  # pydantic lets an error that is no `ValueError` through
    return version


_Version = Annotated[str, BeforeValidator(_validate_version)]
_Counts = Annotated[dict[_Name, _Count], Field(max_length=REASON_LIMIT), BeforeValidator(_normalize_own_counts)]


class _PresenceRecord(BaseModel):
    """JSON object with a protocol version, of bounded size, about one process."""

    model_config = ConfigDict(frozen=True)

    version: _Version = PROTOCOL_VERSION  # the first field: a later version may have others
    pipeline: _Name
    site: _Name
    node: str
    pid: _Count
    # In containers every process has the same process id: `instance` distinguishes a restarted process from the former.
    instance: str = Field(default="", max_length=64, description="random text, new in each process; optional")
    up_s: _Seconds | None = Field(default=None, description="seconds since it joined; None: not stated")
    state: _State = "up"

    def to_bytes(self) -> bytes:
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Self:
        """Parse a record; raise `BadPayload`, or `WireError` ("VersionMismatch") for another protocol version."""
        if len(payload) > RECORD_LIMIT_BYTES:
            raise BadPayload(JSON, f"not a presence record: {len(payload)} bytes, at most {RECORD_LIMIT_BYTES}")
        try:
            return cls.model_validate_json(payload)
        except ValidationError as error:
            raise BadPayload(JSON, f"not a presence record: {first_mistake(error)}") from None


class WorkerLoad(BaseModel):
    """The load of a worker as of its last report. Counts are since the worker started."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    queue: _Count = Field(default=0, description="tasks in the queue")
    queue_ms: float = Field(
        default=0.0,
        ge=0,
        description="mean queueing time of the tasks begun in the last interval; the oldest task's if that is more",
    )
    done: _Count = Field(default=0, description="tasks finished")
    failed: _Count = Field(default=0, description="tasks answered with a failure")
    malformed: _Count = Field(default=0, description="messages that broke the protocol")
    rejected: _Count = Field(default=0, description="tasks rejected because the worker was full or draining")
    expired: _Count = Field(default=0, description="tasks dropped because their deadline had passed")
    busy: float = Field(default=0.0, ge=0, le=1, description="share of the last interval spent computing")
    rate: float = Field(default=0.0, ge=0, description="tasks per second in the last interval")
    task_ms: float = Field(default=0.0, ge=0, description="moving average of the computing time of a task")


class WorkerRecord(_PresenceRecord):
    """The presence record of a worker: the stage it serves, its capacity and its load."""

    worker: _Name
    stage: _Name
    device: str
    fingerprint: str = Field(description="of the model's part: all workers of a stage must agree")
    capacity: int = Field(ge=1, description="tasks that one sender may have at this worker at a time")
    max_message_bytes: int = Field(default=MESSAGE_LIMIT_BYTES, ge=1)
    formats: tuple[_Format, ...] = Field(
        default=(), max_length=FORMAT_LIMIT, description="Content Types that it accepts; empty: not stated"
    )
    reconnects: _Count = Field(default=0, description="how often it lost and regained the connection to its broker")
    load: WorkerLoad = WorkerLoad()
    training: TrainingStatus | None = Field(default=None, description="progress of a worker that trains")

    @property
    def topic(self) -> str:
        return StageTopics(self.site, self.pipeline, self.stage).presence(self.worker)

    @property
    def batch_size(self) -> int:
        """How many tasks the worker computes at once."""
        return max(1, self.capacity - PREFETCH_TASKS)


class LatencyPercentiles(BaseModel):
    """Round trips of the newest results, in milliseconds; 0 before the first."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    p50: float = Field(default=0.0, ge=0)
    p99: float = Field(default=0.0, ge=0)


class SourceLoad(BaseModel):
    """The requests of a source, as of its last report. Counts are since the source started."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    requests: _Count = Field(default=0, description="requests made")
    results: _Count = Field(default=0, description="results received")
    in_flight: _Count = Field(default=0, description="requests sent, or about to be, without a result")
    waiting: _Count = Field(default=0, description="requests that wait for a slot in the in-flight window")
    window: _Count = Field(default=0, description="slots of the in-flight window")
    rate: float = Field(default=0.0, ge=0, description="recent results per second")
    latency_ms: LatencyPercentiles = LatencyPercentiles()
    dropped: _Counts = Field(default={}, description="samples that never became a request, by reason")
    retries: _Counts = Field(default={}, description="attempts after the first, by the previous attempt's error")
    failed: _Counts = Field(default={}, description="requests that ended without a result, by error")
    duplicates: _Count = Field(default=0, description="second results of one request, dropped")


class SourceRecord(_PresenceRecord):
    """The presence record of a source: counts and latencies of its requests."""

    source: _Name
    load: SourceLoad = SourceLoad()

    @property
    def topic(self) -> str:
        return source_presence_topic(self.site, self.pipeline, self.source)
