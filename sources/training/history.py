"""The learning curves of a training run, computed from its events in bounded memory.

Later events may undo earlier ones: training that was rolled back to step 40 does step 41 again, and a source that was
killed and restarted continues from an earlier step without an event. So an event of a step undoes that step and all
later ones, and each step counts once, as it was done the last time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from brokers.protocol.stage_timing import STAGE_DURATIONS
from sources.stage_totals import BYTE_COUNTS, StageTotals

# A curve is thinned out when it has more than twice as many points: a plot has fewer columns.
MIN_CURVE_POINTS = 2048
# The newest rollbacks: a plot with more would be illegible.
_ROLLBACKS_LIMIT = 256
STAGE_TIMES = (*STAGE_DURATIONS, "forward_ms", "backward_ms")


class CurvePoint(NamedTuple):
    """A step, or the evaluation after it."""

    step: int
    loss: float
    accuracy: float | None


class Rollback(NamedTuple):
    """A return to an earlier version: `step` is the last step in it, `from_step` the last one that was undone."""

    step: int
    from_step: int
    reason: str


@dataclass(slots=True)
class Curve:
    """Points in the order of their steps. When there are too many, every second one is dropped, and so from then on."""

    points: list[CurvePoint] = field(default_factory=list)
    last: CurvePoint | None = None  # the newest, which `points` may lack
    _stride: int = 1
    _skipped: int = 0  # since the last point that was kept

    def add(self, point: CurvePoint) -> None:
        self.truncate_after(point.step - 1)
        self.last = point
        if self.points and self._skipped + 1 < self._stride:
            self._skipped += 1
            return
        self.points.append(point)
        self._skipped = 0
        if len(self.points) > 2 * MIN_CURVE_POINTS:
            self.points = self.points[::2]
            self._stride *= 2

    def truncate_after(self, step: int) -> None:
        """Remove the points of later steps."""
        if self.last is None or self.last.step <= step:
            return
        while self.points and self.points[-1].step > step:
            self.points.pop()
        self.last = self.points[-1] if self.points else None
        self._skipped = 0

    @property
    def plot_points(self) -> list[CurvePoint]:
        """The points, including the newest."""
        newest = [self.last] if self.last is not None and self.points[-1:] != [self.last] else []
        return [*self.points, *newest]


@dataclass(slots=True)
class TrainingHistory:
    """The curves of a run, and the time its stages took, including steps that were undone."""

    train_curve: Curve = field(default_factory=Curve)
    test_curve: Curve = field(default_factory=Curve)
    best_test: CurvePoint | None = None  # undone or not: training is deterministic
    rollbacks: deque[Rollback] = field(default_factory=lambda: deque(maxlen=_ROLLBACKS_LIMIT))
    total_steps: int = 0  # of the whole run
    total_epochs: int = 0
    stage_totals: StageTotals = field(default_factory=StageTotals)
    idle_ms: float = 0.0
    executed_steps: int = 0  # repeated steps count each time

    def add(self, event: Mapping[str, Any]) -> None:
        """Apply the next event; unknown kinds are ignored."""
        match event.get("event"):
            case "step":
                self._add_step(event)
            case "evaluation":
                self._add_evaluation(CurvePoint(event["step"], event["loss"], event.get("accuracy")))
            case "rolled_back":
                self._roll_back(Rollback(event["step"], event["from_step"], str(event.get("why", ""))))

    @property
    def max_step(self) -> int:
        """The last step that was ever done, undone or not."""
        last = self.train_curve.last
        return max([last.step if last else 0, *(rollback.from_step for rollback in self.rollbacks)])

    def _add_step(self, event: Mapping[str, Any]) -> None:
        step, last = event["step"], self.train_curve.last
        if last is not None and last.step >= step:
            self._roll_back(Rollback(step - 1, last.step, "restarted"))
        self.train_curve.add(CurvePoint(step, event["loss"], event.get("accuracy")))
        self.total_steps = event.get("steps", step)
        self.total_epochs = event.get("epochs", 0)
        self.executed_steps += 1
        time: Mapping[str, Any] = event.get("time") or {}
        self.idle_ms += float(time.get("idle_ms", 0.0))
        for stage in time.get("stages", ()):
            values = {key: stage.get(key, 0) for key in (*STAGE_TIMES, *BYTE_COUNTS)}
            self.stage_totals.add(stage["stage"], stage["worker"], event.get("micro_batches", 1), values)

    def _add_evaluation(self, point: CurvePoint) -> None:
        self.test_curve.add(point)
        if point.accuracy is not None and (self.best_test is None or point.accuracy > (self.best_test.accuracy or 0.0)):
            self.best_test = point

    def _roll_back(self, rollback: Rollback) -> None:
        self.rollbacks.append(rollback)
        self.train_curve.truncate_after(rollback.step)
        self.test_curve.truncate_after(rollback.step)
