"""Who is up: the retained record that each worker keeps on its presence topic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from brokers.chunks import MESSAGE_LIMIT_BYTES
from brokers.errors import BadPayload, VersionMismatch
from brokers.messages import JSON
from brokers.topics import NAME_PATTERN
from brokers.wire import VERSION

# One level of a topic: a record that came from the network must not lead a sender to a topic of its own making.
_Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Load(BaseModel):
    """What a worker has to do, as of its last report."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    queue: int = Field(default=0, ge=0, description="tasks that wait")
    done: int = Field(default=0, ge=0, description="tasks finished since the worker began")
    failed: int = Field(default=0, ge=0, description="tasks answered with a failure since the worker began")
    refused: int = Field(default=0, ge=0, description="messages that broke the protocol, since the worker began")
    busy: float = Field(default=0.0, ge=0, le=1, description="share of the last interval spent computing, 0 to 1")
    rate: float = Field(default=0.0, ge=0, description="tasks a second in the last interval")
    task_ms: float = Field(default=0.0, ge=0, description="mean time that a task keeps the worker busy, lately")


class Birth(BaseModel):
    """A worker says that it is here, what it serves, and how much it takes."""

    model_config = ConfigDict(frozen=True)

    version: str = VERSION
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
    state: Literal["up", "draining", "stopped"] = "up"
    load: Load = Load()

    def to_bytes(self) -> bytes:
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Birth:
        """Read a record; raise `BadPayload`, or `VersionMismatch` for a worker that speaks another version."""
        try:
            found = cls.model_validate_json(payload)
        except ValidationError as error:
            mistake = error.errors(include_url=False)[0]
            place = "".join(f"{level}: " for level in mistake["loc"])
            raise BadPayload(JSON, f"not a presence record: {place}{mistake['msg']}") from None
        if found.version != VERSION:
            raise VersionMismatch(VERSION, found.version)
        return found
