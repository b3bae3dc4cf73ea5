"""The language of training: which micro-batch of which step a message is about, and how far a pipeline has come. Pure.

A *step* is one batch of one source, cut into micro-batches; it becomes a *version* of the weights on all stages or on
none. A *term* is a stretch of time in which the same workers train: whenever one of them is lost, or a step is given
up, the first stage's worker begins another, in which all have the same version again. What belongs to a former term is
of no use to anybody, and everything says to which term it belongs.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator

from brokers.errors import property_error
from brokers.protocol.messages import JSON_INTEGER_LIMIT, REQUEST_ID_BYTES
from brokers.protocol.topics import NAME_PATTERN

# The key under which a micro-batch says what it is, in the metadata of a body.
MICRO_BATCH_KEY = "sparse.micro"
# Tensors that travel with an activation beside what crosses the cut.
LABELS_TENSOR = "sparse.labels"
RNG_STATE_TENSOR = "sparse.random"

StepMode = Literal["train", "evaluate"]
# As many micro-batches a step may have, and so many rows: far more than anybody's memory holds.
MICRO_BATCH_LIMIT = 1024
ROWS_LIMIT = 1 << 31
SEED_LIMIT = 1 << 63
_LIMITS = (
    ("term", 0, JSON_INTEGER_LIMIT),
    ("count", 1, MICRO_BATCH_LIMIT + 1),
    ("rows", 1, ROWS_LIMIT),
    ("number", 0, JSON_INTEGER_LIMIT),
    ("seed", 0, SEED_LIMIT),
)
# In lower case, as everything that is compared with it is written.
_STEP = re.compile(f"[0-9a-f]{{{2 * REQUEST_ID_BYTES}}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One micro-batch: the `index`th of `count` of a step, which has `rows` rows in all.

    `number` is the source's own count of its steps, from 0. `seed` is what random layers begin with.
    """

    step: str
    term: int
    index: int
    count: int
    rows: int
    number: int
    seed: int
    mode: StepMode = "train"

    def __post_init__(self) -> None:
        for name, least, limit in _LIMITS:
            self._check_number(name, least, limit)
        self._check_number("index", 0, self.count)
        if not isinstance(self.step, str) or not _STEP.fullmatch(self.step):
            raise property_error(
                MICRO_BATCH_KEY, f"step must be {2 * REQUEST_ID_BYTES} hexadecimal digits, is {self.step!r}"
            )
        if self.mode not in ("train", "evaluate"):
            raise property_error(MICRO_BATCH_KEY, f"mode must be train or evaluate, is {self.mode!r}")

    def _check_number(self, name: str, least: int, limit: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not least <= value < limit:
            raise property_error(
                MICRO_BATCH_KEY, f"{name} must be a whole number from {least} to {limit - 1}, is {value!r}"
            )

    def to_json(self) -> str:
        """The form in which it travels."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | None) -> MicroBatch:
        """The inverse; fields that a later version may add are read over."""
        try:
            found = json.loads(text or "null")
        except (ValueError, RecursionError):
            found = None
        names = cls.__dataclass_fields__
        if not isinstance(found, dict) or names.keys() - {"mode"} - found.keys():
            raise property_error(
                MICRO_BATCH_KEY, "must be a JSON object as docs/protocol.md describes it: this stage trains"
            )
        return cls(**cast(Any, {name: found[name] for name in names if name in found}))


def micro_batch_seed(seed: int, number: int, index: int) -> int:
    """What `torch.manual_seed` is given before micro-batch `index` of step `number` of a source with this `seed`."""
    digest = hashlib.sha256(f"{seed} {number} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % SEED_LIMIT


_Name = Annotated[str, Field(pattern=NAME_PATTERN)]
_Count = Annotated[int, Field(ge=0, lt=JSON_INTEGER_LIMIT)]
# How many sources may train one pipeline, and how many stages it may have: a record must stay small.
SOURCES_LIMIT = 64
# Settings of one source, as JSON: those of all of them are within a record's 64 KiB.
SETTINGS_LIMIT_CHARACTERS = 640


class SourceProgress(BaseModel):
    """How many steps of one source a version has, and with which settings they were made."""

    model_config = ConfigDict(frozen=True)

    steps: _Count
    settings: dict[str, str | int | float | bool | None] = Field(default={}, max_length=32)

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if (characters := len(json.dumps(settings))) > SETTINGS_LIMIT_CHARACTERS:
            raise ValueError(f"they may have {SETTINGS_LIMIT_CHARACTERS} characters as JSON, these have {characters}")
        return settings


class TrainingStatus(BaseModel):
    """How far a worker that trains has come, in its presence record."""

    model_config = ConfigDict(frozen=True)

    term: _Count = Field(default=0, description="the newest that it knows; 0: none yet")
    version: _Count | None = Field(default=None, description="of the weights in its memory; None: they are no version")
    restored_term: _Count = Field(default=0, description="the term in which that memory was last told to be a version")
    checkpoints: tuple[_Count, ...] = Field(default=(), max_length=8, description="versions that it has checkpoints of")
    disconnects: _Count = Field(default=0, description="how often its connection broke: messages to it may be lost")
    members: dict[_Name, _Name] = Field(
        default={}, max_length=SOURCES_LIMIT, description="of the first stage: which worker trains each stage"
    )
    progress: dict[_Name, SourceProgress] = Field(default={}, max_length=SOURCES_LIMIT)
    problem: str = Field(default="", max_length=400, description="of the first stage: why nothing can be trained")
    term_reason: str = Field(default="", max_length=400, description="of the first stage: why the term began")
    pending_forwards: _Count = Field(default=0, description="forwards that wait for their gradient")
