"""A sensor filter: two stages without a network, a class and a function; `sensor.toml` is the pipeline.

The class stores the readings of each source, so its stage has one worker.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages import Node, TaskContext, TaskExecutor

Readings = NDArray[np.float64]

# With fewer readings nothing is an outlier.
MIN_READINGS = 5
# Lower limit of the spread, in the unit of the sensor: a sensor with constant readings has a spread of 0.
MIN_SPREAD = 0.05


class Calm(TaskExecutor):
    """Removes outliers and smooths the other readings, separately for each source and each of its sensors.

    A reading is an outlier if its distance from the median of the last `window` readings is more than `reach` times
    their spread. `weight`: share of the newest reading in the exponential moving average.
    """

    def __init__(self, window: int = 16, reach: float = 5.0, weight: float = 0.5) -> None:
        self.window = window
        self.reach = reach
        self.weight = weight

    def start(self, node: Node) -> None:
        self.past: dict[tuple[str, str], deque[float]] = {}
        self.smooth: dict[tuple[str, str], float] = {}

    def execute(self, tensors: dict[str, Any], task: TaskContext) -> dict[str, Any]:
        """Smooth readings of shape () or (N,); the outputs have shape (), with the number of `outliers`."""
        smoothed: dict[str, Any] = {}
        outliers = 0
        for name, values in tensors.items():
            accepted = [self.add((task.source, name), float(value)) for value in np.ravel(values)]
            outliers += accepted.count(False)
            smoothed[name] = np.float64(self.smooth[task.source, name])
        return {**smoothed, "outliers": np.int64(outliers)}

    def add(self, sensor: tuple[str, str], value: float) -> bool:
        """Add one reading; False for an outlier, which changes the median but not the average."""
        past = self.past.setdefault(sensor, deque(maxlen=self.window))
        normal = len(past) < MIN_READINGS or abs(value - float(np.median(past))) <= self.reach * spread(past)
        past.append(value)
        if normal:
            average = self.smooth.get(sensor, value)
            self.smooth[sensor] = average + self.weight * (value - average)
        return normal


def spread(values: deque[float]) -> float:
    """Median absolute deviation, which a single outlier does not change."""
    return max(MIN_SPREAD, float(np.median(np.abs(np.asarray(values) - np.median(values)))))


def alarm(celsius: Readings, outliers: Readings) -> dict[str, Any]:
    """Report temperatures above 30 degrees. The parameters are the names of the input arrays."""
    return {"celsius": celsius.round(2), "outliers": outliers, "alarm": celsius > 30.0}
