"""Training extensions of the protocol: the description of a micro-batch, and the training status in presence records.

A *step* is one batch of one source, cut into micro-batches; two-phase commit makes it a new *version* of the weights on
all stages or on none. A *term* (as in Raft) is a period with fixed members, one worker a stage: when a member is lost
or a step is aborted, the coordinator starts the next term, in which all stages restore the same version. Messages of an
earlier term are refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from brokers.errors import first_mistake, property_error
from brokers.protocol.messages import JSON_INTEGER_LIMIT, REQUEST_ID_BYTES
from brokers.protocol.topics import NAME_PATTERN

MICRO_BATCH_KEY = "sparse.micro"  # the metadata key of the micro-batch that an activation belongs to
# Tensors that travel with an activation in addition to the ones that cross the cut.
LABELS_TENSOR = "sparse.labels"
RNG_STATE_TENSOR = "sparse.random"

StepMode = Literal["train", "evaluate"]
# Far more than any memory holds.
MICRO_BATCH_LIMIT = 1024
ROWS_LIMIT = 1 << 31
SEED_LIMIT = 1 << 63
_Name = Annotated[str, Field(pattern=NAME_PATTERN)]
_Count = Annotated[int, Field(ge=0, lt=JSON_INTEGER_LIMIT)]
# A request id, in lower case as everywhere else, so that equal ids are equal texts.
_StepId = Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * REQUEST_ID_BYTES}}}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Micro-batch `index` of the `count` of a step, whose batch has `rows` rows in all.

    `step` is the step's id in hexadecimal, `number` counts the steps of the source from 0, and `seed` is the random
    seed of layers such as dropout.
    """

    step: _StepId
    term: _Count
    index: _Count
    count: Annotated[int, Field(ge=1, le=MICRO_BATCH_LIMIT)]
    rows: Annotated[int, Field(ge=1, lt=ROWS_LIMIT)]
    number: _Count
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
    mode: StepMode = "train"

    def __post_init__(self) -> None:
        if self.index >= self.count:
            raise ValueError(f"index must be less than count, which is {self.count}, is {self.index}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | None) -> MicroBatch:
        """Parse the metadata value, ignoring fields of later versions. Raises `WireError` ("BadProperty")."""
        try:
            return _MICRO_BATCH.validate_json(text or "null", strict=True)
        except UnicodeEncodeError:
            problem = "not UTF-8"
        except ValidationError as error:
            problem = first_mistake(error)
        problem = f"of a training task must be a JSON object as docs/protocol.md describes it: {problem}"
        raise property_error(MICRO_BATCH_KEY, problem)


_MICRO_BATCH = TypeAdapter(MicroBatch)


def micro_batch_seed(seed: int, number: int, index: int) -> int:
    """Return the random seed of micro-batch `index` of step `number` of a source with this seed."""
    digest = hashlib.sha256(f"{seed} {number} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % SEED_LIMIT


# Sources of one pipeline, and its stages: a presence record must stay below 64 KiB.
SOURCES_LIMIT = 64
# The settings of one source as JSON, for the same reason.
SETTINGS_LIMIT_CHARACTERS = 640


class SourceProgress(BaseModel):
    """The number of steps of one source in a version, and the settings of that source."""

    model_config = ConfigDict(frozen=True)

    steps: _Count
    settings: dict[str, str | int | float | bool | None] = Field(default={}, max_length=32)

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if (characters := len(json.dumps(settings))) > SETTINGS_LIMIT_CHARACTERS:
            raise ValueError(f"at most {SETTINGS_LIMIT_CHARACTERS} characters as JSON, these have {characters}")
        return settings


class TrainingStatus(BaseModel):
    """The state of a training worker, in its presence record; some fields are only set by the coordinator."""

    model_config = ConfigDict(frozen=True)

    term: _Count = Field(default=0, description="the newest that it knows; 0: none yet")
    version: _Count | None = Field(default=None, description="of the weights in memory; null if they are no version")
    restored_term: _Count = Field(default=0, description="the term in which those weights were last confirmed")
    checkpoints: tuple[_Count, ...] = Field(default=(), max_length=8, description="versions it has checkpoints of")
    disconnects: _Count = Field(default=0, description="lost connections: messages to it may have been lost")
    members: dict[_Name, _Name] = Field(
        default={}, max_length=SOURCES_LIMIT, description="coordinator: the worker that trains each stage"
    )
    progress: dict[_Name, SourceProgress] = Field(default={}, max_length=SOURCES_LIMIT)
    problem: str = Field(default="", max_length=400, description="coordinator: why training is not possible")
    term_reason: str = Field(default="", max_length=400, description="coordinator: why the term began")
    pending_forwards: _Count = Field(default=0, description="saved forwards that wait for their gradient")
    min_rows: Annotated[int, Field(ge=1, lt=ROWS_LIMIT)] = Field(
        default=1, description="rows of a micro-batch that the network needs in training"
    )
