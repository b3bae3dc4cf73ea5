"""A chain of three numeric stages and the sources of its numbers; each result can be computed from its index."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from brokers.protocol.messages import SAFETENSORS
from sources import Sample, Source
from stages.executor import TaskContext, TaskExecutor

Tensors = dict[str, Any]

# name -> (factor, offset): another order, a missing stage and a repeated stage all give another number.
STAGE_COEFFICIENTS = {"first": (2.0, 1.0), "second": (3.0, -7.0), "third": (5.0, 11.0)}
# Every tenth request has a second tensor, which needs several chunks.
HEAVY_EVERY = 10
HEAVY_VALUES = 160_000  # of 8 bytes: three chunks of 512 KiB
# A worker whose gate is never opened ends by itself: the limit of one test.
GATE_TIMEOUT_S = 300.0


class AffineExecutor(TaskExecutor):
    """Sleeps, then multiplies and adds: work that needs no processor time of this machine."""

    def __init__(self, factor: float, offset: float, seconds: float) -> None:
        self._factor = factor
        self._offset = offset
        self._seconds = seconds

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        time.sleep(self._seconds)
        return {name: self._factor * values + self._offset for name, values in tensors.items()}


class MinMaxExecutor(AffineExecutor):
    """The last stage: returns the minimum and maximum of each tensor."""

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        outputs = super().execute(tensors, task)
        return {name: np.array([values.min(), values.max()]) for name, values in outputs.items()}


class NumberSource(Source):
    """Counts up from 0, one number every `every_s` seconds, until the file `stop_file` exists.

    A `live` source drops numbers for which there is no slot. The count is written to `stop_file` at the end.
    """

    def __init__(self, name: str, stop_file: str, every_s: float, live: bool = False) -> None:
        self.name = name
        self.live = live
        self._stop_file = Path(stop_file)
        self._every_s = every_s
        self._closed = threading.Event()

    def samples(self) -> Iterator[Sample]:
        for index in itertools.count():
            if self._stop_file.exists():
                self._stop_file.write_text(str(index))
                return
            if self._closed.wait(self._every_s):
                return
            payload = {"values": np.array(float(index))}
            if index % HEAVY_EVERY == 0:
                payload["heavy"] = np.full(HEAVY_VALUES, float(index))
            yield Sample(self.name, index, payload, SAFETENSORS)

    def close(self) -> None:
        self._closed.set()


def expected_result(index: int) -> Tensors:
    """The published result of the request with this index."""
    value = float(index)
    for factor, offset in STAGE_COEFFICIENTS.values():
        value = factor * value + offset
    return {name: [value, value] for name in (("heavy", "values") if index % HEAVY_EVERY == 0 else ("values",))}


class GatedExecutor(TaskExecutor):
    """Writes the request id of each task to `log_file` and finishes no task before the file `gate_file` exists."""

    def __init__(self, gate_file: str, log_file: str) -> None:
        self._gate_file = Path(gate_file)
        self._log_file = Path(log_file)

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        with self._log_file.open("a", encoding="utf-8") as log:
            log.write(f"{task.request_id.hex()}\n")
        end_s = time.monotonic() + GATE_TIMEOUT_S
        while not self._gate_file.exists() and time.monotonic() < end_s:
            time.sleep(0.02)
        return tensors
