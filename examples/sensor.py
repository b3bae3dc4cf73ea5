"""A sensor filter: two stages that have nothing to do with deep learning, one a class, one a function.

`sensor.toml` names them. The class remembers the readings of each source, so its stage has one worker.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages import Node, TaskContext, TaskExecutor

Readings = NDArray[np.float64]

# Fewer readings than this do not show the normal range.
ENOUGH = 5
# A sensor that always says the same has a spread of 0: this much it may move all the same, in its own unit.
LEAST_SPREAD = 0.05


class Calm(TaskExecutor):
    """Drops outliers and smooths the other values, separately for each reading of each source.

    A reading is an outlier when it is further from the median of the last `window` than `reach` times their spread.
    """

    def __init__(self, window: int = 16, reach: float = 5.0, weight: float = 0.5) -> None:
        self.window = window
        self.reach = reach
        self.weight = weight  # of the newest reading in the smooth one

    def start(self, node: Node) -> None:
        self.past: dict[tuple[str, str], deque[float]] = {}
        self.smooth: dict[tuple[str, str], float] = {}

    def execute(self, tensors: dict[str, Any], task: TaskContext) -> dict[str, Any]:
        """Numbers or lists of them in, () or (N,); the smooth ones out, and how many were outliers."""
        calm: dict[str, Any] = {}
        outliers = 0
        for name, values in tensors.items():
            kept = [self.add((task.source, name), float(value)) for value in np.ravel(values)]
            outliers += kept.count(False)
            calm[name] = np.float64(self.smooth[task.source, name])
        return {**calm, "outliers": np.int64(outliers)}

    def add(self, sensor: tuple[str, str], value: float) -> bool:
        """Take one reading; False when it is an outlier, which changes nothing but what counts as normal."""
        past = self.past.setdefault(sensor, deque(maxlen=self.window))
        normal = len(past) < ENOUGH or abs(value - float(np.median(past))) <= self.reach * spread(past)
        past.append(value)
        if normal:
            before = self.smooth.get(sensor, value)
            self.smooth[sensor] = before + self.weight * (value - before)
        return normal


def spread(values: deque[float]) -> float:
    """The median distance from the median: one wild reading does not move it."""
    return max(LEAST_SPREAD, float(np.median(np.abs(np.asarray(values) - np.median(values)))))


def alarm(celsius: Readings, outliers: Readings) -> dict[str, Any]:
    """Whether it is too warm. A function's parameters are the names of the arrays that it takes."""
    return {"celsius": celsius.round(2), "outliers": outliers, "alarm": celsius > 30.0}
