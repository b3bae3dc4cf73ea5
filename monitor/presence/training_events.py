"""What a source that trains publishes, one JSON object for each thing that happens. Anybody may publish there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

_Count = Annotated[int, Field(ge=0, lt=1 << 53)]  # JSON has no larger whole numbers that all readers agree on
_Measure = Annotated[float, Field(ge=0, le=1 << 53)]
_Value = Annotated[float, Field(ge=-1e100, le=1e100)]  # float32 ends at 1e38; sums of these are numbers still
_Text = Annotated[str, Field(max_length=4096)]


class _TrainingEventBase(BaseModel):
    """What all events share. More may come in each of them: it is read over."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    source: _Text


class StepEvent(_TrainingEventBase):
    """A step is committed on all stages. Steps count from 1, epochs from 0."""

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
    """The network as it stands has met what it is not trained on."""

    event: Literal["evaluation"]
    step: _Count
    epoch: _Count
    loss: _Value
    accuracy: _Value | None = None


class RollbackEvent(_TrainingEventBase):
    """Training goes on from `step`; those after it, up to `from_step`, are done again."""

    event: Literal["rolled_back"]
    step: _Count
    from_step: _Count
    why: _Text = ""


class TrainingFailureEvent(_TrainingEventBase):
    """Training has ended before its time."""

    event: Literal["failed"]
    error: _Text
    reason: _Text = ""
    stage: _Text | None = None
    worker: _Text | None = None


TrainingEvent = StepEvent | EvaluationEvent | RollbackEvent | TrainingFailureEvent
TRAINING_EVENT_ADAPTER: TypeAdapter[TrainingEvent] = TypeAdapter(Annotated[TrainingEvent, Field(discriminator="event")])
