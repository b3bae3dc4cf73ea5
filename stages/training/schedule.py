"""Pipeline schedules: the fixed order in which a stage runs the forwards and backwards of a step.

Backwards run in the order of the micro-batches in both schedules, so that gradients accumulate in the order of the
unsplit network, to the last bit.

* gpipe (Huang et al., 2019): all forwards, then all backwards; a stage saves one forward per micro-batch of the step.
* 1f1b (PipeDream-Flush, as in Megatron-LM): the n-th stage from the end begins with n forwards, then alternates one
  backward and one forward; it saves at most n forwards.
"""

from typing import Literal

from brokers.protocol.training import StepMode

ScheduleName = Literal["1f1b", "gpipe"]
ScheduledOp = tuple[Literal["forward", "backward"], int]  # the operation and the index of its micro-batch


def operations(
    name: ScheduleName, stage: int, stages: int, count: int, mode: StepMode = "train"
) -> tuple[ScheduledOp, ...]:
    """Return the operations of stage number `stage` (from 0) of `stages`, in a step of `count` micro-batches."""
    if mode == "evaluate":
        return tuple(("forward", index) for index in range(count))
    warmup = count if name == "gpipe" else min(count, stages - stage)
    ops: list[ScheduledOp] = [("forward", index) for index in range(warmup)]
    for index in range(count):
        ops.append(("backward", index))
        if warmup + index < count:
            ops.append(("forward", warmup + index))
    return tuple(ops)
