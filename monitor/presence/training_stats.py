"""Progress of a training pipeline from its published events, beside the presence of its workers and sources.

Any client may publish events, so all fields are validated.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from brokers.telemetry.recent_results import RATE_WINDOW_S
from monitor.presence.inference_stats import sanitize_text
from monitor.presence.presence_table import PresenceTable

# Sources that train one pipeline: more than any deployment has, and a bound on memory.
SOURCES_LIMIT = 16
_EVALUATIONS_KEPT = 12
# Current loss and accuracy are means over the last so many steps: those of one batch are noisy.
_RECENT_STEPS = 16
# The remaining time is estimated from the last so many steps, with all pauses between them.
_PACE_STEPS = 512
SERIES_LIMIT = 512  # values

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
_ADAPTER: TypeAdapter[TrainingEvent] = TypeAdapter(Annotated[TrainingEvent, Field(discriminator="event")])


@dataclass(slots=True)
class DownsampledSeries:
    """A value over all steps so far; of a long run, every 2nd, 4th, ... of the older steps."""

    _values: dict[int, float] = field(default_factory=dict)  # by step

    def add(self, step: int, value: float) -> None:
        """Add the value of a step, and drop those of later steps, which were rolled back."""
        self._values = {earlier: kept for earlier, kept in self._values.items() if earlier < step} | {step: value}
        if len(self._values) > SERIES_LIMIT:
            self._values = dict(list(self._values.items())[::2])

    def values(self, width: int) -> list[float]:
        """At most `width` means over equal numbers of steps, from the first step to the last."""
        columns: dict[int, list[float]] = defaultdict(list)
        for step, value in self._values.items():
            columns[step * width // (max(self._values) + 1)].append(value)
        return [fmean(column) for column in columns.values()]


@dataclass(slots=True)
class TrainingProgress:
    """The progress of one source: its steps, evaluations and rollbacks."""

    completed_steps: int = 0
    latest_step: StepEvent | None = None
    evaluations: deque[EvaluationEvent] = field(default_factory=lambda: deque(maxlen=_EVALUATIONS_KEPT))
    best_evaluation: EvaluationEvent | None = None
    rollbacks: int = 0
    repeated_steps: int = 0
    failure: TrainingFailureEvent | None = None
    loss_history: DownsampledSeries = field(default_factory=DownsampledSeries)
    _recent: deque[tuple[float, StepEvent]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _step_times_s: deque[float] = field(default_factory=lambda: deque(maxlen=_PACE_STEPS))

    def add(self, event: TrainingEvent, now_s: float) -> None:
        match event:
            case StepEvent():
                self.completed_steps = event.step
                self.latest_step = event
                self.failure = None
                self.loss_history.add(event.step, event.loss)
                self._recent.append((now_s, event))
                self._step_times_s.append(now_s)
            case EvaluationEvent():
                self._drop_evaluations_after(event.step - 1)
                self.evaluations.append(event)
                if _accuracy(event) >= _accuracy(self.best_evaluation):
                    self.best_evaluation = event
            case RollbackEvent():
                self.completed_steps = event.step
                self.rollbacks += 1
                self.repeated_steps += max(0, event.from_step - event.step)
                self._drop_evaluations_after(event.step)
            case TrainingFailureEvent():
                self.failure = event

    def _drop_evaluations_after(self, step: int) -> None:
        while self.evaluations and self.evaluations[-1].step > step:
            self.evaluations.pop()

    @property
    def loss(self) -> float | None:
        """Mean loss of the recent steps."""
        return fmean([step.loss for _, step in self._recent]) if self._recent else None

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy of the recent steps that report one."""
        accuracies = [step.accuracy for _, step in self._recent if step.accuracy is not None]
        return fmean(accuracies) if accuracies else None

    @property
    def step_ms(self) -> float:
        """Mean duration of the recent steps."""
        return fmean([step.step_ms for _, step in self._recent]) if self._recent else 0.0

    def rows_per_s(self, now_s: float) -> float:
        """Rows per second of the steps in the last RATE_WINDOW_S, or of the last step; without pauses between steps."""
        recent = [step for time_s, step in self._recent if now_s - time_s <= RATE_WINDOW_S]
        recent = recent or [step for _, step in list(self._recent)[-1:]]
        total_ms = sum(step.step_ms for step in recent)
        return 1000 * sum(step.rows for step in recent) / total_ms if total_ms else 0.0

    def remaining_s(self, now_s: float) -> float | None:
        """Estimate of the time that the remaining steps will take; None before there are two steps."""
        if self.latest_step is None or len(self._step_times_s) < 2:
            return None
        remaining = max(0, self.latest_step.steps - self.completed_steps)
        return max(0.0, remaining * self._pace_s - (now_s - self._step_times_s[-1])) if remaining else 0.0

    def stalled_s(self, now_s: float) -> float:
        """How long ago the last step ended, if the next one is overdue; else 0."""
        if self.latest_step is None or self.completed_steps >= self.latest_step.steps:
            return 0.0
        waited_s = now_s - self._step_times_s[-1]
        return waited_s if waited_s > max(RATE_WINDOW_S, 5 * self._pace_s) else 0.0

    @property
    def _pace_s(self) -> float:
        times_s = self._step_times_s
        return (times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else 0.0


@dataclass(slots=True)
class TrainingStats(PresenceTable):
    """The progress of each source that trains the pipeline, the first to report first."""

    progress_by_source: dict[str, TrainingProgress] = field(default_factory=dict)

    def add_result(self, result: dict[str, Any], now_s: float) -> None:
        event = _ADAPTER.validate_python(result)
        if event.source not in self.progress_by_source and len(self.progress_by_source) >= SOURCES_LIMIT:
            raise ValueError("too many sources")
        self.progress_by_source.setdefault(event.source, TrainingProgress()).add(event, now_s)
        if isinstance(event, RollbackEvent):
            self.notices.append(self._describe(event))

    def progress_of(self, source: str) -> TrainingProgress | None:
        """The progress of `source`, or of the first source that reported."""
        return self.progress_by_source.get(source) or next(iter(self.progress_by_source.values()), None)

    def _describe(self, event: RollbackEvent) -> str:
        """`worker body-1 is lost: rolled back to step 40, repeating 7 steps`."""
        repeated = max(0, event.from_step - event.step)
        steps = f", repeating {repeated} step{'s' if repeated > 1 else ''}" if repeated else ""
        source = f"{event.source}: " if len(self.progress_by_source) > 1 else ""
        return sanitize_text(f"{source}{event.why or 'unknown reason'}: rolled back to step {event.step}{steps}")


def _accuracy(event: EvaluationEvent | None) -> float:
    return event.accuracy if event is not None and event.accuracy is not None else -1.0
