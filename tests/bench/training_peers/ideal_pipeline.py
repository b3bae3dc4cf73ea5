"""The ideal pipeline: a simulation of a schedule in which messages take no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.training.step_queue import ScheduleName, operations

# Simulated steps: by then each takes as long as the one before it.
_STEPS = 4


@dataclass(frozen=True, slots=True)
class StageTimes:
    """The seconds of one stage: for one micro-batch, and once a step for its optimizer."""

    forward_s: float
    backward_s: float
    commit_s: float

    def step_s(self, micro_batches: int) -> float:
        """A step of this stage if it never waits."""
        return micro_batches * (self.forward_s + self.backward_s) + self.commit_s

    def step_breakdown_ms(self, micro_batches: int) -> dict[str, float]:
        """The sums over a step, with the keys of our telemetry."""
        return {
            "forward_ms": 1000 * micro_batches * self.forward_s,
            "backward_ms": 1000 * micro_batches * self.backward_s,
            "commit_ms": 1000 * self.commit_s,
        }


def ideal_step_s(stages: Sequence[StageTimes], schedule: ScheduleName, micro_batches: int) -> float:
    """The seconds of one of many consecutive steps; the pipeline is filled and drained in each.

    A stage begins a forward when it has finished the operations before it in its schedule and the previous stage has
    finished that forward; a backward likewise, with the next stage. It begins the next step after its own optimizer:
    no stage waits for the commit of another.
    """
    free_s = [0.0] * len(stages)
    ends_s = []
    for _ in range(_STEPS):
        free_s = _simulate_step(stages, schedule, micro_batches, free_s)
        ends_s.append(max(free_s))
    return ends_s[-1] - ends_s[-2]


def _simulate_step(
    stages: Sequence[StageTimes], schedule: ScheduleName, micro_batches: int, free_s: Sequence[float]
) -> list[float]:
    """When each stage has finished a step that it can begin at its time in `free_s`."""
    free_s = list(free_s)
    remaining = [list(operations(schedule, index, len(stages), micro_batches)) for index in range(len(stages))]
    done_s: dict[tuple[str, int, int], float] = {}  # (operation, stage, micro-batch) -> its end
    while any(remaining):
        for stage, ops in enumerate(remaining):
            while ops:
                operation, index = ops[0]
                source = stage - 1 if operation == "forward" else stage + 1
                has_source = 0 <= source < len(stages)
                if has_source and (operation, source, index) not in done_s:
                    break
                begin_s = max(free_s[stage], done_s[operation, source, index]) if has_source else free_s[stage]
                times = stages[stage]
                duration_s = times.forward_s if operation == "forward" else times.backward_s
                free_s[stage] = done_s[operation, stage, index] = begin_s + duration_s
                ops.pop(0)
    return [end_s + times.commit_s for end_s, times in zip(free_s, stages, strict=True)]
