"""Statistics of a training run, computed from its events."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from brokers.telemetry.percentiles import percentiles
from sources.training.history import STAGE_TIMES, TrainingHistory

# Means of an epoch and percentiles are those of its newest steps, so that memory stays bounded.
_RECENT_STEPS = 10_000
_DIGITS = 6


class _StepRecord(NamedTuple):
    step: int
    epoch: int
    rows: int
    loss: float
    accuracy: float | None
    step_ms: float


class TrainingRunStats:
    """Statistics of a run. A repeated step counts once in losses, rows and steps, each time in requests and times."""

    def __init__(self, pipeline: str) -> None:
        self.history = TrainingHistory()
        self._pipeline = pipeline
        self._steps: deque[_StepRecord] = deque(maxlen=_RECENT_STEPS)
        self._max_step = 0
        self._rows = 0
        self._micro_batches = 0
        self._repeated_micro_batches = 0
        self._repeated_steps = 0
        self._rollbacks = 0
        # Without the first step, which includes the warm-up of all stages.
        self._warm_rows = 0
        self._warm_ms = 0.0
        self._last_evaluation: Mapping[str, Any] = {}
        self._failures: Counter[str] = Counter()

    def add(self, event: Mapping[str, Any]) -> None:
        """Apply the next event; unknown kinds are ignored."""
        self.history.add(event)
        match event.get("event"):
            case "step":
                self._add_step(event)
            case "evaluation":
                self._last_evaluation = event
            case "rolled_back":
                self._rollbacks += 1
                self._truncate_after(event["step"])
            case "failed":
                self._failures[event["error"]] += 1

    def _add_step(self, event: Mapping[str, Any]) -> None:
        step = _StepRecord(
            event["step"], event["epoch"], event["rows"], event["loss"], event.get("accuracy"), event["step_ms"]
        )
        micro_batches = event.get("micro_batches", 1)
        self._micro_batches += micro_batches
        if step.step <= self._max_step:
            self._repeated_steps += 1
            self._repeated_micro_batches += micro_batches
        else:
            self._rows += step.rows
        if self._max_step:
            self._warm_rows += step.rows
            self._warm_ms += step.step_ms
        self._max_step = max(self._max_step, step.step)
        self._truncate_after(step.step - 1)
        self._steps.append(step)

    def _truncate_after(self, step: int) -> None:
        while self._steps and self._steps[-1].step > step:
            self._steps.pop()

    def summary(self, order: Sequence[str] = (), elapsed_s: float = 0.0) -> dict[str, Any]:
        """The summary that docs/operations.md describes, with stages in `order`."""
        last = self._steps[-1] if self._steps else None
        epoch = [step for step in self._steps if last and step.epoch == last.epoch]
        executed, best_test = self.history.executed_steps, self.history.best_test
        return {
            "pipeline": self._pipeline,
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
            "test_loss": self._last_evaluation.get("loss"),
            "test_accuracy": self._last_evaluation.get("accuracy"),
            "best_test_accuracy": best_test.accuracy if best_test else None,
            "rollbacks": self._rollbacks,
            "repeated_steps": self._repeated_steps,
            "step_ms": percentiles([step.step_ms for step in self._steps]) if self._steps else {},
            "idle_ms": round(self.history.idle_ms / executed, 3) if executed else 0.0,
            "stages": self.history.stage_totals.summary(order, STAGE_TIMES),
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
