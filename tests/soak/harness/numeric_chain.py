"""A chain of three numeric stages and the source of its numbers: what comes out says whether everything went right."""

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

# name -> (factor, offset): no two orders, no stage left out and none done twice give the same number.
STAGE_COEFFICIENTS = {"first": (2.0, 1.0), "second": (3.0, -7.0), "third": (5.0, 11.0)}
# Every tenth request carries so much beside its number that it travels in several chunks.
HEAVY_EVERY = 10
HEAVY_VALUES = 160_000  # of 8 bytes: three chunks of 512 KiB
# However a test ends, its workers do not wait for longer.
GATE_TIMEOUT_S = 120.0


class AffineExecutor(TaskExecutor):
    """Sleeps, as work that needs no core of this machine, then multiplies and adds."""

    def __init__(self, factor: float, offset: float, seconds: float) -> None:
        self._factor, self._offset, self._seconds = factor, offset, seconds

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        time.sleep(self._seconds)
        return {name: self._factor * values + self._offset for name, values in tensors.items()}


class MinMaxExecutor(AffineExecutor):
    """The last of the chain: of what is heavy, only its least and its greatest number come out."""

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        found = super().execute(tensors, task)
        return {name: np.array([values.min(), values.max()]) for name, values in found.items()}


class NumberSource(Source):
    """Counts, one number every `every_s` seconds if there is room for it, until there is a file at `until`."""

    def __init__(self, name: str, stop_file: str, every_s: float) -> None:
        self.name, self._until, self._every_s = name, Path(stop_file), every_s
        self._closed = threading.Event()

    def samples(self) -> Iterator[Sample]:
        for index in itertools.count():
            if self._closed.wait(self._every_s) or self._until.exists():
                return
            payload = {"values": np.array(float(index))}
            if index % HEAVY_EVERY == 0:
                payload["heavy"] = np.full(HEAVY_VALUES, float(index))
            yield Sample(self.name, index, payload, SAFETENSORS)

    def close(self) -> None:
        self._closed.set()


def expected_result(index: int) -> Tensors:
    """What is published for the request of this index."""
    value = float(index)
    for factor, offset in STAGE_COEFFICIENTS.values():
        value = factor * value + offset
    return {name: [value, value] for name in (("heavy", "values") if index % HEAVY_EVERY == 0 else ("values",))}


class GatedExecutor(TaskExecutor):
    """Writes a line for each task that it begins, and ends none before there is a file at `gate`."""

    def __init__(self, gate_file: str, log_file: str) -> None:
        self._gate, self._diary = Path(gate_file), Path(log_file)

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        with self._diary.open("a", encoding="utf-8") as diary:
            diary.write(f"{task.request_id.hex()}\n")
        end_s = time.monotonic() + GATE_TIMEOUT_S
        while not self._gate.exists() and time.monotonic() < end_s:
            time.sleep(0.02)
        return tensors
