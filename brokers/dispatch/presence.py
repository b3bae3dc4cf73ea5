"""Who is up: the retained records that workers and sources keep on their presence topics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from brokers.errors import BadPayload
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES
from brokers.protocol.codec import PROTOCOL_VERSION, check_version
from brokers.protocol.messages import JSON
from brokers.protocol.topics import NAME_PATTERN
from brokers.protocol.training import TrainingStatus

# A record has some hundred bytes. Whoever watches presence keeps the newest of each topic, of anybody who may publish.
RECORD_LIMIT_BYTES = 65536
# Records are renewed each second. One that its worker's will could not clear at every site, since a bridge was down
# when it died, ends by itself: the Message Expiry Interval of the publication.
RECORD_EXPIRY_S = 60
# Counts by reason in one record: ours know about ten, and whoever makes up more shall not fill a screen with them.
REASON_LIMIT = 32
OTHER_REASON = "other"
FORMAT_LIMIT = 32

# One level of a topic: a record that came from the network must not lead a sender to a topic of its own making.
_Name = Annotated[str, Field(pattern=NAME_PATTERN)]
_Format = Annotated[str, Field(max_length=128)]
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]  # JSON has no larger whole numbers that all readers agree on
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_State = Literal["up", "standby", "draining", "stopped"]


def normalize_reason_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """`counts` as a record may hold them: reasons made names, the rarest summed up as `other` where they are many.

    Reasons come from other processes (a failure's error), so they may be any text, and any number of them.
    """
    found: dict[str, int] = {}
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        if not count:
            continue
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", reason)[:64] or OTHER_REASON
        if name not in found and len(found) >= REASON_LIMIT - 1:
            name = OTHER_REASON
        found[name] = found.get(name, 0) + count
    return found


def _fitting(counts: Any, info: ValidationInfo) -> Any:
    """What this process counts is made to fit a record; what comes from the network fits, or is refused."""
    return normalize_reason_counts(counts) if info.mode == "python" else counts


_Counts = Annotated[dict[_Name, _Count], Field(max_length=REASON_LIMIT), BeforeValidator(_fitting)]


class _PresenceRecord(BaseModel):
    """What all records share: JSON of a version, bounded."""

    model_config = ConfigDict(frozen=True)

    version: str = PROTOCOL_VERSION

    def to_bytes(self) -> bytes:
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Self:
        """Read a record; raise `BadPayload`, or `WireError` ("VersionMismatch") for one of another version."""
        if len(payload) > RECORD_LIMIT_BYTES:
            raise BadPayload(JSON, f"not a presence record: {len(payload)} bytes, at most {RECORD_LIMIT_BYTES}")
        try:
            found = cls.model_validate_json(payload)
        except ValidationError as error:
            mistake = error.errors(include_url=False)[0]
            place = "".join(f"{level}: " for level in mistake["loc"])
            raise BadPayload(JSON, f"not a presence record: {place}{mistake['msg']}") from None
        check_version(found.version)
        return found


class WorkerLoad(BaseModel):
    """What a worker has to do, as of its last report."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    queue: _Count = Field(default=0, description="tasks that wait")
    queue_ms: float = Field(
        default=0.0,
        ge=0,
        description="mean wait of the tasks begun in the last interval, or how long the oldest waits, if that is more",
    )
    done: _Count = Field(default=0, description="tasks finished since the worker began")
    failed: _Count = Field(default=0, description="tasks answered with a failure since the worker began")
    malformed: _Count = Field(default=0, description="messages that broke the protocol, since the worker began")
    rejected: _Count = Field(default=0, description="tasks given back, because it was full or leaving")
    expired: _Count = Field(default=0, description="tasks that were past their deadline, and were dropped")
    busy: float = Field(default=0.0, ge=0, le=1, description="share of the last interval spent computing, 0 to 1")
    rate: float = Field(default=0.0, ge=0, description="tasks a second in the last interval")
    task_ms: float = Field(default=0.0, ge=0, description="mean time that a task keeps the worker busy, lately")


class WorkerRecord(_PresenceRecord):
    """A worker says that it is here, what it serves, and how much it takes."""

    worker: _Name
    stage: _Name
    pipeline: _Name
    site: _Name
    node: str
    pid: int
    # A process id alone does not tell two lives apart: in containers each one is 1.
    instance: str = Field(
        default="", max_length=64, description="random, another in each process; foreign workers may leave it out"
    )
    device: str
    fingerprint: str = Field(description="of the model's part: two workers of one stage must agree")
    capacity: int = Field(ge=1, description="tasks that one sender may have with this worker at a time")
    max_message_bytes: int = MESSAGE_LIMIT_BYTES
    formats: tuple[_Format, ...] = Field(
        default=(), max_length=FORMAT_LIMIT, description="Content Types that it takes; empty: it does not say"
    )
    up_s: _Seconds | None = Field(default=None, description="since it joined, by its own clock; None: it does not say")
    reconnects: _Count = Field(default=0, description="how often its connection to its broker broke, and came back")
    state: _State = "up"
    load: WorkerLoad = WorkerLoad()
    training: TrainingStatus | None = Field(default=None, description="of a worker that trains: how far it has come")


class LatencyPercentiles(BaseModel):
    """Round trips of the newest results, in milliseconds; 0 before there are any."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    p50: float = Field(default=0.0, ge=0)
    p99: float = Field(default=0.0, ge=0)


class SourceLoad(BaseModel):
    """What has become of the requests of a source, as of its last report. Counts are since the source began."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    requests: _Count = Field(default=0, description="asked for")
    results: _Count = Field(default=0, description="answered")
    in_flight: _Count = Field(default=0, description="sent or about to be, and not answered yet")
    waiting: _Count = Field(default=0, description="that wait for room in the window")
    window: _Count = Field(default=0, description="how many may be in flight")
    rate: float = Field(default=0.0, ge=0, description="results a second, lately")
    latency_ms: LatencyPercentiles = LatencyPercentiles()
    dropped: _Counts = Field(default={}, description="what never became a request, by reason")
    retries: _Counts = Field(default={}, description="attempts after the first, by what befell the one before")
    failed: _Counts = Field(default={}, description="requests that ended without a result, by error")
    duplicates: _Count = Field(default=0, description="second answers to one request, dropped")


class SourceRecord(_PresenceRecord):
    """A source says that it is here, and how its requests fare: only their owner knows."""

    source: _Name
    pipeline: _Name
    site: _Name
    node: str
    pid: int
    instance: str = Field(default="", max_length=64, description="random, another in each process")
    up_s: _Seconds | None = Field(default=None, description="since it began, by its own clock; None: it does not say")
    state: _State = "up"
    load: SourceLoad = SourceLoad()
