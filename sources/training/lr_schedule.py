"""Learning rate schedules of a pipeline file."""

from __future__ import annotations

import math

from brokers.config.schema import TrainingTable


def learning_rate(table: TrainingTable, step: int, steps_per_epoch: int) -> float:
    """The learning rate of `step`, counted from 0: linear during the warm-up, then by `table.lr_schedule`.

    `cosine` decays from `lr` to 0 over all epochs; `step` multiplies by `lr_factor` every `lr_every` epochs.
    """
    if step < table.lr_warmup:
        return table.lr * (step + 1) / table.lr_warmup
    if table.lr_schedule == "cosine":
        total = max(1, table.epochs * steps_per_epoch - table.lr_warmup)
        return table.lr * 0.5 * (1 + math.cos(math.pi * (step - table.lr_warmup) / total))
    if table.lr_schedule == "step":
        return table.lr * table.lr_factor ** (step // steps_per_epoch // table.lr_every)
    return table.lr
