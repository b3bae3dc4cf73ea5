"""What is known of a pipeline that trains, from what anybody may hear: presence records and published events. Pure."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from brokers.dispatch.presence import RECORD_LIMIT_BYTES
from monitor.presence.inference_stats import WINDOW_S, plain
from monitor.presence.presence_table import Roll
from monitor.presence.training_events import EVENT, Evaluation, Event, Failed, RolledBack, Step

# Sources that train one pipeline: more than anybody has, and an end to what a hostile client can make us hold.
COURSES_LIMIT = 16
_EVALUATIONS = 12
_NEWS = 32
# Loss and accuracy "now" are means of the last so many steps: those of one batch jump about.
_RECENT_STEPS = 16
# The time that is left is judged by the last so many steps, with what went on between them.
_PACE_STEPS = 512
_STRETCHES = 128


@dataclass(slots=True)
class Trend:
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
class Course:
    """How far one source has come, and how well its steps go."""

    done: int = 0
    latest: Step | None = None
    evaluations: deque[Evaluation] = field(default_factory=lambda: deque(maxlen=_EVALUATIONS))
    best: Evaluation | None = None
    rolled_back: int = 0
    again: int = 0  # steps that had to be done once more
    failed: Failed | None = None
    trend: Trend = field(default_factory=Trend)
    _recent: deque[tuple[float, Step]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _came_s: deque[float] = field(default_factory=lambda: deque(maxlen=_PACE_STEPS))

    def add(self, event: Event, now_s: float) -> None:
        match event:
            case Step():
                self.done, self.latest, self.failed = event.step, event, None
                self.trend.add(event.step, event.loss)
                self._recent.append((now_s, event))
                self._came_s.append(now_s)
            case Evaluation():
                self._forget_evaluations(event.step - 1)
                self.evaluations.append(event)
                if _accuracy(event) >= _accuracy(self.best):
                    self.best = event
            case RolledBack():
                self.done = event.step
                self.rolled_back += 1
                self.again += max(0, event.from_step - event.step)
                self._forget_evaluations(event.step)
            case Failed():
                self.failed = event

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
        recent = [step for came_s, step in self._recent if now_s - came_s <= WINDOW_S]
        recent = recent or [step for _, step in list(self._recent)[-1:]]
        took_ms = sum(step.step_ms for step in recent)
        return 1000 * sum(step.rows for step in recent) / took_ms if took_ms else 0.0

    def left_s(self, now_s: float) -> float | None:
        """How long the steps that are left will take; None while nobody can say."""
        if self.latest is None or len(self._came_s) < 2:
            return None
        left = max(0, self.latest.steps - self.done)
        return max(0.0, left * self._pace_s - (now_s - self._came_s[-1])) if left else 0.0

    def stalled_s(self, now_s: float) -> float:
        """How long the next step has been overdue; 0 while it is not."""
        if self.latest is None or self.done >= self.latest.steps:
            return 0.0
        waited_s = now_s - self._came_s[-1]
        return waited_s if waited_s > max(WINDOW_S, 5 * self._pace_s) else 0.0

    @property
    def _pace_s(self) -> float:
        came_s = self._came_s
        return (came_s[-1] - came_s[0]) / (len(came_s) - 1) if len(came_s) > 1 else 0.0


@dataclass(slots=True)
class TrainingBoard(Roll):
    """Who is here, and how training goes. Times are monotonic seconds of the listener."""

    courses: dict[str, Course] = field(default_factory=dict)  # by source, the first that was heard first
    _heard: int = 0
    _news: deque[str] = field(default_factory=lambda: deque(maxlen=_NEWS))

    def heard_result(self, payload: bytes, now_s: float) -> None:
        """An event was published; anybody may publish there, so what cannot be read is counted."""
        try:
            found = json.loads(payload) if len(payload) <= RECORD_LIMIT_BYTES else None
            if isinstance(found, dict) and found.get("pipeline", self.pipeline) != self.pipeline:
                return  # another pipeline's, whose results come here too
            event = EVENT.validate_python(found)
        except (ValueError, ValidationError, RecursionError):
            self.garbage += 1
            return
        course = self._course_of(event.source)
        if course is None:
            self.garbage += 1
            return
        self._heard += 1
        course.add(event, now_s)
        if isinstance(event, RolledBack):
            self._news.append(self._tell(event))

    @property
    def heard(self) -> int:
        return self._heard

    def news(self) -> list[str]:
        told = list(self._news)
        self._news.clear()
        return told

    def main(self, source: str) -> Course | None:
        """The course of `source`, or of whoever was heard first."""
        return self.courses.get(source) or next(iter(self.courses.values()), None)

    def _course_of(self, source: str) -> Course | None:
        if source not in self.courses and len(self.courses) < COURSES_LIMIT:
            self.courses[source] = Course()
        return self.courses.get(source)

    def _tell(self, event: RolledBack) -> str:
        """`worker body-1 is gone: back to step 40 (7 steps again)`."""
        again = max(0, event.from_step - event.step)
        steps = "1 step" if again == 1 else f"{again} steps"
        where = f"back to step {event.step} ({steps} again)" if again else f"goes on from step {event.step}"
        whose = f"{event.source}: " if len(self.courses) > 1 else ""
        return plain(f"{whose}{event.why or 'something was lost'}: {where}")


def _accuracy(event: Evaluation | None) -> float:
    return event.accuracy if event is not None and event.accuracy is not None else -1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
