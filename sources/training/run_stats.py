"""The figures of a training run, from the events that its source publishes. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sources.stage_totals import StageTotals, percentiles
from sources.training.history import STAGE_BYTE_KEYS, STAGE_TIME_KEYS, add_stage_times

# Means of an epoch and percentiles are of its last so many steps: memory stays flat however long it trains.
_STEPS = 10_000
_DIGITS = 6


class _StepRecord(NamedTuple):
    step: int
    epoch: int
    rows: int
    loss: float
    accuracy: float | None
    step_ms: float


class TrainingRunStats:
    """What a run came to. A step that was done again counts once in what was learned, each time in what was asked."""

    def __init__(self, pipeline: str) -> None:
        self._pipeline = pipeline
        self._stages = StageTotals()
        self._steps: deque[_StepRecord] = deque(maxlen=_STEPS)
        self._furthest = 0  # step that was ever done
        self._micro_batches = self._micro_batches_again = self._rows = self._steps_again = self._rolled_back = 0
        self._warm_rows, self._warm_ms = 0, 0.0
        self._idle_ms, self._done = 0.0, 0
        self._tested: Mapping[str, Any] = {}
        self._best_accuracy: float | None = None
        self._failures: Counter[str] = Counter()

    def add(self, event: Mapping[str, Any]) -> None:
        """Take the next event into account; kinds that are not known are read over."""
        match event.get("event"):
            case "step":
                self._step(event)
            case "evaluation":
                self._tested = event
                if (accuracy := event.get("accuracy")) is not None:
                    self._best_accuracy = max(accuracy, self._best_accuracy or 0.0)
            case "rolled_back":
                self._rolled_back += 1
                self._forget_after(event["step"])
            case "failed":
                self._failures[event["error"]] += 1

    def _step(self, event: Mapping[str, Any]) -> None:
        found = _StepRecord(
            event["step"], event["epoch"], event["rows"], event["loss"], event.get("accuracy"), event["step_ms"]
        )
        micro_batches = event.get("micro_batches", 1)
        if again := found.step <= self._furthest:
            self._steps_again += 1
            self._micro_batches_again += micro_batches
        if self._furthest:  # the first step warms up what all others find warm
            self._warm_rows += found.rows
            self._warm_ms += found.step_ms
        self._furthest = max(self._furthest, found.step)
        self._micro_batches += micro_batches
        self._rows += 0 if again else found.rows
        self._forget_after(found.step - 1)
        self._steps.append(found)
        self._idle_ms += add_stage_times(self._stages, event)
        self._done += 1

    def _forget_after(self, step: int) -> None:
        while self._steps and self._steps[-1].step > step:
            self._steps.pop()

    def summary(self, order: Sequence[str] = (), elapsed_s: float = 0.0) -> dict[str, Any]:
        """The figures as docs/operations.md describes them; stages in `order`, those that are not in it last.

        `rows` and `steps` are those that count; the throughput is of all steps that were done but the first.
        """
        last = self._steps[-1] if self._steps else None
        epoch = [step for step in self._steps if last and step.epoch == last.epoch]
        return {
            "pipeline": self._pipeline,
            "requests": self._micro_batches,
            "results": self._micro_batches,
            "failed": self._failures.total(),
            "failures": dict(self._failures),
            "lost": 0,
            "dropped": 0,
            "retries": self._micro_batches_again,
            "elapsed_s": round(elapsed_s, 3),
            "throughput_per_s": self._throughput(),
            "rows": self._rows,
            "steps": last.step if last else 0,
            "epochs": last.epoch + 1 if last else 0,
            "loss": _mean((step.loss, step.rows) for step in epoch),
            "accuracy": _mean((step.accuracy, step.rows) for step in epoch),
            "test_loss": self._tested.get("loss"),
            "test_accuracy": self._tested.get("accuracy"),
            "best_test_accuracy": self._best_accuracy,
            "rollbacks": self._rolled_back,
            "repeated_steps": self._steps_again,
            "step_ms": percentiles([step.step_ms for step in self._steps]),
            "idle_ms": round(self._idle_ms / self._done, 3) if self._done else 0.0,
            "stages": self._stages.summary(order, STAGE_TIME_KEYS, STAGE_BYTE_KEYS),
        }

    def _throughput(self) -> float:
        """Rows a second; of the first step only where there is no other."""
        if self._warm_ms:
            return round(1000 * self._warm_rows / self._warm_ms, 2)
        first = self._steps[0] if self._steps else None
        return round(1000 * first.rows / first.step_ms, 2) if first and first.step_ms else 0.0


def _mean(values: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean by weight of what there is; None where nothing is."""
    found = [(value, weight) for value, weight in values if value is not None]
    weights = sum(weight for _, weight in found)
    return round(sum(value * weight for value, weight in found) / weights, _DIGITS) if weights else None
