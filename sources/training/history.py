"""What a training run learned, and how: its curves, in bounded memory, from the events of its record. Pure.

An event says that something happened, and what came later may undo it. Training that went back to step 40 does step 41
again; a source that was killed and started again may go back without a word. So an event of a step undoes what is
known of that step and of all after it: each step counts once, as it was done the last time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sources.stage_totals import StageTotals

# Points that a curve has at the least, once it has more than twice as many: more than a picture has columns.
MIN_CURVE_POINTS = 2048
# Ways back that are kept, the latest: a plot with more of them could not be read.
_RETURNS = 256
STAGE_TIME_KEYS = ("queue_ms", "decode_ms", "compute_ms", "encode_ms", "forward_ms", "backward_ms")
STAGE_BYTE_KEYS = ("bytes_in", "bytes_out")


class CurvePoint(NamedTuple):
    """One step, or one evaluation after it."""

    step: int
    loss: float
    accuracy: float | None


class Rollback(NamedTuple):
    """Training went back: `step` is the last one that still counted, `from_step` the last one that had been done."""

    step: int
    from_step: int
    reason: str


@dataclass(slots=True)
class Curve:
    """Points in the order of their steps. When there are too many, every other one is left out, from then on too."""

    points: list[CurvePoint] = field(default_factory=list)
    last: CurvePoint | None = None  # which may be one that is left out
    _stride: int = 1
    _left_out: int = 0  # since the last one that was kept

    def add(self, point: CurvePoint) -> None:
        self.truncate_after(point.step - 1)
        self.last = point
        if self.points and self._left_out + 1 < self._stride:
            self._left_out += 1
            return
        self.points.append(point)
        self._left_out = 0
        if len(self.points) > 2 * MIN_CURVE_POINTS:
            self.points = self.points[::2]
            self._stride *= 2

    def truncate_after(self, step: int) -> None:
        """What came after the step is undone."""
        if self.last is None or self.last.step <= step:
            return
        while self.points and self.points[-1].step > step:
            self.points.pop()
        self.last = self.points[-1] if self.points else None
        self._left_out = 0

    @property
    def plot_points(self) -> list[CurvePoint]:
        """The points, the newest among them."""
        newest = [self.last] if self.last is not None and self.points[-1:] != [self.last] else []
        return [*self.points, *newest]


@dataclass(slots=True)
class TrainingHistory:
    """The curves of a run. `steps` and `epochs` are how many there will be; stage times are of all that was done."""

    train_curve: Curve = field(default_factory=Curve)
    test_curve: Curve = field(default_factory=Curve)
    best_test: CurvePoint | None = None  # undone or not: what is done again comes out the same
    rollbacks: deque[Rollback] = field(default_factory=lambda: deque(maxlen=_RETURNS))
    total_steps: int = 0
    total_epochs: int = 0
    stage_totals: StageTotals = field(default_factory=StageTotals)
    idle_ms: float = 0.0
    executed_steps: int = 0  # steps, each as often as it was done

    @classmethod
    def from_events(cls, events: Iterable[Mapping[str, Any]]) -> TrainingHistory:
        history = cls()
        for event in events:
            history.add(event)
        return history

    def add(self, event: Mapping[str, Any]) -> None:
        """Take the next event of the record into account; kinds that are not known are read over."""
        match event.get("event"):
            case "step":
                self._step(event)
            case "evaluation":
                self._test(CurvePoint(event["step"], event["loss"], event.get("accuracy")))
            case "rolled_back":
                self._back(Rollback(event["step"], event["from_step"], str(event.get("why", ""))))

    @property
    def max_step(self) -> int:
        """The last step that was ever done, undone or not."""
        last = self.train_curve.last
        return max([last.step if last else 0, *(found.from_step for found in self.rollbacks)])

    def _step(self, event: Mapping[str, Any]) -> None:
        step, last = event["step"], self.train_curve.last
        if last is not None and last.step >= step:
            self._back(Rollback(step - 1, last.step, "begun again"))
        self.train_curve.add(CurvePoint(step, event["loss"], event.get("accuracy")))
        self.total_steps, self.total_epochs = event.get("steps", step), event.get("epochs", 0)
        self.executed_steps += 1
        self.idle_ms += add_stage_times(self.stage_totals, event)

    def _test(self, point: CurvePoint) -> None:
        self.test_curve.add(point)
        if point.accuracy is not None and (self.best_test is None or point.accuracy > (self.best_test.accuracy or 0.0)):
            self.best_test = point

    def _back(self, found: Rollback) -> None:
        self.rollbacks.append(found)
        self.train_curve.truncate_after(found.step)
        self.test_curve.truncate_after(found.step)


def add_stage_times(sums: StageTotals, event: Mapping[str, Any]) -> float:
    """Add the times of a step to `sums`, a micro-batch being a task; return the network's, in milliseconds."""
    time: Mapping[str, Any] = event.get("time") or {}
    stages: Sequence[Mapping[str, Any]] = time.get("stages", ())
    for stage in stages:
        figures = {key: stage.get(key, 0) for key in (*STAGE_TIME_KEYS, *STAGE_BYTE_KEYS)}
        sums.add(stage["stage"], stage["worker"], event.get("micro_batches", 1), figures)
    return float(time.get("idle_ms", 0.0))
