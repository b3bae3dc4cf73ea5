"""In which order a stage does the forwards and backwards of a step: by name, and always the same. Pure.

Backwards are in the order of the micro-batches in both, so that gradients add up in the order in which the uncut
network adds them up, to the last bit.

    gpipe   all forwards, then all backwards: a stage keeps as many forwards as a step has micro-batches
    1f1b    a stage that is n-th from the end keeps n forwards at most: it begins with these, then does a backward and a
            forward in turns (PipeDream-Flush, as in Megatron-LM)
"""

from __future__ import annotations

from typing import Literal

from brokers.protocol.training import StepMode

ScheduleName = Literal["1f1b", "gpipe"]
ScheduledOp = tuple[Literal["forward", "backward"], int]


def operations(
    name: ScheduleName, stage: int, stages: int, count: int, mode: StepMode = "train"
) -> tuple[ScheduledOp, ...]:
    """The operations of stage `stage` (from 0) of `stages` in a step of `count` micro-batches."""
    if mode == "evaluate":
        return tuple(("forward", index) for index in range(count))
    ahead = count if name == "gpipe" else min(count, stages - stage)
    ops: list[ScheduledOp] = [("forward", index) for index in range(ahead)]
    for index in range(count):
        ops.append(("backward", index))
        if ahead + index < count:
            ops.append(("forward", ahead + index))
    return tuple(ops)
