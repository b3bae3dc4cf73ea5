"""Statistics and learning curves of a training run, computed from its events in bounded memory.

Later events may undo earlier ones: training that was rolled back to step 40 does step 41 again, and a source that was
killed and restarted continues from an earlier step without an event. So an event of a step undoes that step and all
later ones, and each step counts once, as it was done the last time.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from brokers.protocol.stage_timing import STAGE_DURATIONS
from brokers.telemetry.percentiles import percentiles
from sources.inference.run_stats import BYTE_COUNTS, StageTotals

# A curve is thinned out when it has more than twice as many points: a plot has fewer columns.
MIN_CURVE_POINTS = 2048
# The newest rollbacks: a plot with more would be illegible.
_ROLLBACKS_LIMIT = 256
# Means of an epoch and percentiles are those of its newest steps.
_RECENT_STEPS = 10_000
STAGE_TIMES = (*STAGE_DURATIONS, "forward_ms", "backward_ms")
_DIGITS = 6


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


class _StepRecord(NamedTuple):
    step: int
    epoch: int
    rows: int
    loss: float
    accuracy: float | None
    step_ms: float


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
class TrainingRunStats:
    """Statistics of a run. A repeated step counts once in losses, rows and steps, each time in requests and times."""

    pipeline: str
    train_curve: Curve = field(default_factory=Curve)
    test_curve: Curve = field(default_factory=Curve)
    best_test: CurvePoint | None = None  # undone or not: training is deterministic
    rollbacks: deque[Rollback] = field(default_factory=lambda: deque(maxlen=_ROLLBACKS_LIMIT))
    total_steps: int = 0  # of the whole run
    total_epochs: int = 0
    stage_totals: StageTotals = field(default_factory=StageTotals)
    idle_ms: float = 0.0
    executed_steps: int = 0  # repeated steps count each time
    max_step: int = 0  # the last step that was ever done, undone or not
    _steps: deque[_StepRecord] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _rows: int = 0
    _micro_batches: int = 0
    _repeated_micro_batches: int = 0
    _repeated_steps: int = 0
    _rollback_count: int = 0
    # Without the first step, which includes the warm-up of all stages.
    _warm_rows: int = 0
    _warm_ms: float = 0.0
    _failures: Counter[str] = field(default_factory=Counter)

    def add(self, event: Mapping[str, Any]) -> None:
        """Apply the next event; unknown kinds are ignored."""
        match event.get("event"):
            case "step":
                self._add_step(event)
            case "evaluation":
                self._add_evaluation(CurvePoint(event["step"], event["loss"], event.get("accuracy")))
            case "rolled_back":
                self._rollback_count += 1
                self._roll_back(Rollback(event["step"], event["from_step"], str(event.get("why", ""))))
            case "failed":
                self._failures[event["error"]] += 1

    def _add_step(self, event: Mapping[str, Any]) -> None:
        step = _StepRecord._make(event.get(name) for name in _StepRecord._fields)
        last = self.train_curve.last
        if last is not None and last.step >= step.step:
            self._roll_back(Rollback(step.step - 1, last.step, "restarted"))
        self.train_curve.add(CurvePoint(step.step, step.loss, step.accuracy))
        self._steps.append(step)
        self.total_steps = event.get("steps", step.step)
        self.total_epochs = event.get("epochs", 0)
        self.executed_steps += 1
        micro_batches = event.get("micro_batches", 1)
        self._micro_batches += micro_batches
        if step.step <= self.max_step:
            self._repeated_steps += 1
            self._repeated_micro_batches += micro_batches
        else:
            self._rows += step.rows
        if self.max_step:
            self._warm_rows += step.rows
            self._warm_ms += step.step_ms
        self.max_step = max(self.max_step, step.step)
        time: Mapping[str, Any] = event.get("time") or {}
        self.idle_ms += float(time.get("idle_ms", 0.0))
        for stage in time.get("stages", ()):
            values = {key: stage.get(key, 0) for key in (*STAGE_TIMES, *BYTE_COUNTS)}
            self.stage_totals.add(stage["stage"], stage["worker"], micro_batches, values)

    def _add_evaluation(self, point: CurvePoint) -> None:
        self.test_curve.add(point)
        if point.accuracy is not None and (self.best_test is None or point.accuracy > (self.best_test.accuracy or 0.0)):
            self.best_test = point

    def _roll_back(self, rollback: Rollback) -> None:
        self.rollbacks.append(rollback)
        self.train_curve.truncate_after(rollback.step)
        self.test_curve.truncate_after(rollback.step)
        while self._steps and self._steps[-1].step > rollback.step:
            self._steps.pop()

    def summary(self, order: Sequence[str] = (), elapsed_s: float = 0.0) -> dict[str, Any]:
        """The summary that docs/operations.md describes, with stages in `order`."""
        last = self._steps[-1] if self._steps else None
        epoch = [step for step in self._steps if last and step.epoch == last.epoch]
        test = self.test_curve.last
        return {
            "pipeline": self.pipeline,
            "requests": self._micro_batches,
            "results": self._micro_batches,
            "failed": self._failures.total(),
            "failures": dict(self._failures),
            "lost": 0,
            "dropped": 0,
            "retries": self._repeated_micro_batches,
            "elapsed_s": round(elapsed_s, 3),
            "throughput_per_s": self._rows_per_s(),
            "rows": self._rows,
            "steps": last.step if last else 0,
            "epochs": last.epoch + 1 if last else 0,
            "loss": _weighted_mean((step.loss, step.rows) for step in epoch),
            "accuracy": _weighted_mean((step.accuracy, step.rows) for step in epoch),
            "test_loss": test.loss if test else None,
            "test_accuracy": test.accuracy if test else None,
            "best_test_accuracy": self.best_test.accuracy if self.best_test else None,
            "rollbacks": self._rollback_count,
            "repeated_steps": self._repeated_steps,
            "step_ms": percentiles([step.step_ms for step in self._steps]) if self._steps else {},
            "idle_ms": round(self.idle_ms / self.executed_steps, 3) if self.executed_steps else 0.0,
            "stages": self.stage_totals.summary(order, STAGE_TIMES),
        }

    def _rows_per_s(self) -> float:
        """Rows a second without the first step, unless there is no other."""
        if self._warm_ms:
            return round(1000 * self._warm_rows / self._warm_ms, 2)
        first = self._steps[0] if self._steps else None
        return round(1000 * first.rows / first.step_ms, 2) if first and first.step_ms else 0.0


def _weighted_mean(values: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean of the values that are not None; None without any."""
    known = [(value, weight) for value, weight in values if value is not None]
    total = sum(weight for _, weight in known)
    return round(sum(value * weight for value, weight in known) / total, _DIGITS) if total else None
