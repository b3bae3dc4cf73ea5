"""The events that a training source publishes, as JSON objects. Any client may publish there, so all is validated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

_Count = Annotated[int, Field(ge=0, lt=1 << 53)]  # JSON readers agree on whole numbers up to this
_Measure = Annotated[float, Field(ge=0, le=1 << 53)]
_Value = Annotated[float, Field(ge=-1e100, le=1e100)]  # float32 ends at 1e38; sums of these stay finite
_Text = Annotated[str, Field(max_length=4096)]


class _TrainingEventBase(BaseModel):
    """Base class of the events; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    source: _Text


class StepEvent(_TrainingEventBase):
    """A step was committed on all stages. Steps count from 1, epochs from 0."""

    event: Literal["step"]
    step: _Count
    steps: _Count
    epoch: _Count
    epochs: _Count
    loss: _Value
    accuracy: _Value | None = None
    rows: _Count = 0
    step_ms: _Measure = 0.0


class EvaluationEvent(_TrainingEventBase):
    """The network was evaluated on the test set."""

    event: Literal["evaluation"]
    step: _Count
    epoch: _Count
    loss: _Value
    accuracy: _Value | None = None


class RollbackEvent(_TrainingEventBase):
    """Training was rolled back: it continues after `step`, and repeats the steps up to `from_step`."""

    event: Literal["rolled_back"]
    step: _Count
    from_step: _Count
    why: _Text = ""


class TrainingFailureEvent(_TrainingEventBase):
    """Training ended with an error."""

    event: Literal["failed"]
    error: _Text
    reason: _Text = ""
    stage: _Text | None = None
    worker: _Text | None = None


TrainingEvent = StepEvent | EvaluationEvent | RollbackEvent | TrainingFailureEvent
TRAINING_EVENT_ADAPTER: TypeAdapter[TrainingEvent] = TypeAdapter(Annotated[TrainingEvent, Field(discriminator="event")])
