"""What a pipeline could do at best: a schedule played through with messages that take no time. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.training.schedule import ScheduleName, operations

# Steps that are played through: by then each takes as long as the one before it.
_STEPS = 4


@dataclass(frozen=True, slots=True)
class StageTimes:
    """What one stage takes for one micro-batch, and, once a step, for its optimizer."""

    forward_s: float
    backward_s: float
    commit_s: float

    def step_s(self, micro_batches: int) -> float:
        """A whole step of this stage, if it never had to wait."""
        return micro_batches * (self.forward_s + self.backward_s) + self.commit_s

    def step_breakdown_ms(self, micro_batches: int) -> dict[str, float]:
        """The sums over a step, in the words of our stages."""
        return {
            "forward_ms": 1000 * micro_batches * self.forward_s,
            "backward_ms": 1000 * micro_batches * self.backward_s,
            "commit_ms": 1000 * self.commit_s,
        }


def ideal_step_s(stages: Sequence[StageTimes], schedule: ScheduleName, micro_batches: int) -> float:
    """How long a step takes when many follow one another, with the pipeline filled and drained in each.

    A stage begins a forward when it has done what its schedule has before it and the former stage has done that
    forward; a backward likewise, when the next stage has done it. It goes on to the next step when its own optimizer is
    done: no stage waits for another's commit.
    """
    free_s = [0.0] * len(stages)
    ends_s = []
    for _ in range(_STEPS):
        free_s = _one_step(stages, schedule, micro_batches, free_s)
        ends_s.append(max(free_s))
    return ends_s[-1] - ends_s[-2]


def _one_step(
    stages: Sequence[StageTimes], schedule: ScheduleName, micro_batches: int, free_s: list[float]
) -> list[float]:
    """When each stage has done a step, if it is free for it from `free_s` on."""
    free_s = list(free_s)
    left = [list(operations(schedule, index, len(stages), micro_batches)) for index in range(len(stages))]
    done_s: dict[tuple[str, int, int], float] = {}  # (kind, stage, micro-batch) -> when
    while any(left):
        for stage, ops in enumerate(left):
            while ops:
                kind, index = ops[0]
                needed = (kind, stage - 1 if kind == "forward" else stage + 1, index)
                is_first = needed[1] in (-1, len(stages))
                if not is_first and needed not in done_s:
                    break
                begin_s = free_s[stage] if is_first else max(free_s[stage], done_s[needed])
                took_s = stages[stage].forward_s if kind == "forward" else stages[stage].backward_s
                free_s[stage] = done_s[kind, stage, index] = begin_s + took_s
                ops.pop(0)
    return [at_s + times.commit_s for at_s, times in zip(free_s, stages, strict=True)]
