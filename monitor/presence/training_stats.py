"""What is known of a pipeline that trains, from what anybody may hear: presence records and published events. Pure."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from brokers.dispatch.presence import RECORD_LIMIT_BYTES
from monitor.presence.inference_stats import RATE_WINDOW_S, sanitize_text
from monitor.presence.presence_table import PresenceTable
from monitor.presence.training_events import (
    TRAINING_EVENT_ADAPTER,
    EvaluationEvent,
    RollbackEvent,
    StepEvent,
    TrainingEvent,
    TrainingFailureEvent,
)

# Sources that train one pipeline: more than anybody has, and an end to what a hostile client can make us hold.
SOURCES_LIMIT = 16
_EVALUATIONS = 12
_NEWS = 32
# Loss and accuracy "now" are means of the last so many steps: those of one batch jump about.
_RECENT_STEPS = 16
# The time that is left is judged by the last so many steps, with what went on between them.
_PACE_STEPS = 512
_STRETCHES = 128


@dataclass(slots=True)
class DownsampledSeries:
    """The course of a value over all steps so far, as means of stretches of equal length, at most 128 of them."""

    _length: int = 1  # of a stretch, in steps
    _stretches: dict[int, tuple[float, int]] = field(default_factory=dict)  # by place: sum, count

    def add(self, step: int, value: float) -> None:
        """Take the value of a step into account; what is known of later ones is undone."""
        while step // self._length >= _STRETCHES:
            self._double()
        place = step // self._length
        for later in [other for other in self._stretches if other > place]:
            del self._stretches[later]
        total, count = self._stretches.get(place, (0.0, 0))
        self._stretches[place] = (total + value, count + 1)

    def values(self, width: int) -> list[float]:
        """At most `width` means, from the first step to the last."""
        means = [total / count for _, (total, count) in sorted(self._stretches.items())]
        each = -(-len(means) // width)
        return [_mean(means[begin : begin + each]) for begin in range(0, len(means), each)] if means else []

    def _double(self) -> None:
        self._length *= 2
        halves, self._stretches = self._stretches, {}
        for place, (total, count) in halves.items():
            before, counted = self._stretches.get(place // 2, (0.0, 0))
            self._stretches[place // 2] = (before + total, counted + count)


@dataclass(slots=True)
class TrainingProgress:
    """How far one source has come, and how well its steps go."""

    completed_steps: int = 0
    latest_step: StepEvent | None = None
    evaluations: deque[EvaluationEvent] = field(default_factory=lambda: deque(maxlen=_EVALUATIONS))
    best_evaluation: EvaluationEvent | None = None
    rollbacks: int = 0
    repeated_steps: int = 0  # steps that had to be done once more
    failure: TrainingFailureEvent | None = None
    loss_history: DownsampledSeries = field(default_factory=DownsampledSeries)
    _recent: deque[tuple[float, StepEvent]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _came_s: deque[float] = field(default_factory=lambda: deque(maxlen=_PACE_STEPS))

    def add(self, event: TrainingEvent, now_s: float) -> None:
        match event:
            case StepEvent():
                self.completed_steps, self.latest_step, self.failure = event.step, event, None
                self.loss_history.add(event.step, event.loss)
                self._recent.append((now_s, event))
                self._came_s.append(now_s)
            case EvaluationEvent():
                self._forget_evaluations(event.step - 1)
                self.evaluations.append(event)
                if _accuracy(event) >= _accuracy(self.best_evaluation):
                    self.best_evaluation = event
            case RollbackEvent():
                self.completed_steps = event.step
                self.rollbacks += 1
                self.repeated_steps += max(0, event.from_step - event.step)
                self._forget_evaluations(event.step)
            case TrainingFailureEvent():
                self.failure = event

    def _forget_evaluations(self, step: int) -> None:
        while self.evaluations and self.evaluations[-1].step > step:
            self.evaluations.pop()

    @property
    def loss(self) -> float | None:
        return _mean([step.loss for _, step in self._recent]) if self._recent else None

    @property
    def accuracy(self) -> float | None:
        found = [step.accuracy for _, step in self._recent if step.accuracy is not None]
        return _mean(found) if found else None

    @property
    def step_ms(self) -> float:
        return _mean([step.step_ms for _, step in self._recent]) if self._recent else 0.0

    def rows_per_s(self, now_s: float) -> float:
        """Of the steps of the last seconds, or of the last one: evaluations and recoveries are no part of it."""
        recent = [step for came_s, step in self._recent if now_s - came_s <= RATE_WINDOW_S]
        recent = recent or [step for _, step in list(self._recent)[-1:]]
        took_ms = sum(step.step_ms for step in recent)
        return 1000 * sum(step.rows for step in recent) / took_ms if took_ms else 0.0

    def remaining_s(self, now_s: float) -> float | None:
        """How long the steps that are left will take; None while nobody can say."""
        if self.latest_step is None or len(self._came_s) < 2:
            return None
        left = max(0, self.latest_step.steps - self.completed_steps)
        return max(0.0, left * self._pace_s - (now_s - self._came_s[-1])) if left else 0.0

    def stalled_s(self, now_s: float) -> float:
        """How long the next step has been overdue; 0 while it is not."""
        if self.latest_step is None or self.completed_steps >= self.latest_step.steps:
            return 0.0
        waited_s = now_s - self._came_s[-1]
        return waited_s if waited_s > max(RATE_WINDOW_S, 5 * self._pace_s) else 0.0

    @property
    def _pace_s(self) -> float:
        came_s = self._came_s
        return (came_s[-1] - came_s[0]) / (len(came_s) - 1) if len(came_s) > 1 else 0.0


@dataclass(slots=True)
class TrainingStats(PresenceTable):
    """Who is here, and how training goes. Times are monotonic seconds of the listener."""

    progress_by_source: dict[str, TrainingProgress] = field(
        default_factory=dict
    )  # by source, the first that was heard first
    _heard: int = 0
    _news: deque[str] = field(default_factory=lambda: deque(maxlen=_NEWS))

    def on_result(self, payload: bytes, now_s: float) -> None:
        """An event was published; anybody may publish there, so what cannot be read is counted."""
        try:
            found = json.loads(payload) if len(payload) <= RECORD_LIMIT_BYTES else None
            if isinstance(found, dict) and found.get("pipeline", self.pipeline) != self.pipeline:
                return  # another pipeline's, whose results come here too
            event = TRAINING_EVENT_ADAPTER.validate_python(found)
        except (ValueError, ValidationError, RecursionError):
            self.rejected += 1
            return
        course = self._course_of(event.source)
        if course is None:
            self.rejected += 1
            return
        self._heard += 1
        course.add(event, now_s)
        if isinstance(event, RollbackEvent):
            self._news.append(self._tell(event))

    @property
    def results_received(self) -> int:
        return self._heard

    def pop_notices(self) -> list[str]:
        told = list(self._news)
        self._news.clear()
        return told

    def progress_of(self, source: str) -> TrainingProgress | None:
        """The course of `source`, or of whoever was heard first."""
        return self.progress_by_source.get(source) or next(iter(self.progress_by_source.values()), None)

    def _course_of(self, source: str) -> TrainingProgress | None:
        if source not in self.progress_by_source and len(self.progress_by_source) < SOURCES_LIMIT:
            self.progress_by_source[source] = TrainingProgress()
        return self.progress_by_source.get(source)

    def _tell(self, event: RollbackEvent) -> str:
        """`worker body-1 is gone: back to step 40 (7 steps again)`."""
        again = max(0, event.from_step - event.step)
        steps = "1 step" if again == 1 else f"{again} steps"
        where = f"back to step {event.step} ({steps} again)" if again else f"goes on from step {event.step}"
        whose = f"{event.source}: " if len(self.progress_by_source) > 1 else ""
        return sanitize_text(f"{whose}{event.why or 'something was lost'}: {where}")


def _accuracy(event: EvaluationEvent | None) -> float:
    return event.accuracy if event is not None and event.accuracy is not None else -1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
