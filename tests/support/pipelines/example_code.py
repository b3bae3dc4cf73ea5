"""Stages and sources of test pipelines, named in their files as `tests.support.pipelines.example_code:NAME`.

No module of torch is imported: the stages need none.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from brokers.protocol.messages import SAFETENSORS
from sources import Sample, Source
from stages.executor import Node, TaskContext, TaskExecutor

Tensors = dict[str, Any]

_GATE_TIMEOUT_S = 240.0
_POLL_S = 0.005

# Functions ------------------------------------------------------------------------------------------------------------


def double(values: Any) -> Tensors:
    return {"values": 2 * values}


def add_one(values: Any, **others: Any) -> Tensors:
    return {"values": values + 1, **others}


def add_padding(values: Any) -> Tensors:
    """Add an array of 800 kB, which makes the output much larger than the input."""
    return {"values": values, "padding": np.full(200_000, float(values), np.float32)}


def strip_padding(values: Any, padding: Any) -> Tensors:
    assert np.all(padding == np.float32(values - 1)), "the padding is that of another request"
    return {"values": values}


def reject_negative(values: Any) -> Tensors:
    if np.any(values < 0):
        raise ArithmeticError(f"{float(np.min(values))} is below zero")
    return {"values": values}


class UnprintableError(Exception):
    """An error whose text cannot be computed."""

    def __str__(self) -> str:
        raise AttributeError("no such field")


class Busy(Exception):
    """An error with the name of one of the protocol, which it is not."""


def raise_by_value(values: Any) -> Tensors:
    """Raise an error that is hard to report, depending on the input."""
    match int(values):
        case 1:
            raise UnprintableError
        case 2:
            raise ValueError("first\nsecond " + "x" * 100_000)
        case 3:
            sys.exit("enough")
        case 4:
            raise Busy("the sensor is in use")
    return {"values": values}


def return_non_dict(values: Any) -> Any:
    return values


# Executors ------------------------------------------------------------------------------------------------------------


class SleepExecutor(TaskExecutor):
    """Sleeps, like work that needs no core of this machine."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        time.sleep(self.seconds)
        return dict(tensors)


class GateExecutor(TaskExecutor):
    """Creates `started_file` at its first task after the first `count`, and executes none before `gate_file` exists."""

    def __init__(self, started_file: str, gate_file: str, count: int = 0) -> None:
        self._started_file = Path(started_file)
        self._gate_file = Path(gate_file)
        self._count = count

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        if self._count:
            self._count -= 1
        else:
            self._started_file.touch()
            _wait_for_file(self._gate_file)
        return dict(tensors)


class FingerprintExecutor(TaskExecutor):
    """Has a given fingerprint. Creates `started_file` when it starts, and is ready once `ready_file` exists."""

    def __init__(self, fingerprint: str, started_file: str, ready_file: str) -> None:
        self.fingerprint = fingerprint
        self._started_file = Path(started_file)
        self._ready_file = Path(ready_file)

    def start(self, node: Node) -> None:
        self._started_file.touch()
        _wait_for_file(self._ready_file)

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        return dict(tensors)


class BatchableExecutor(TaskExecutor):
    """Doubles rows (N, 3); each row of the result has the number of rows of its batch."""

    batchable = True

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        rows = tensors["rows"]  # (N, 3)
        return {"rows": 2 * rows, "batch": np.full(len(rows), len(rows))}


class RoutingExecutor(TaskExecutor):
    """Dispatches values of 100 and above to stage `large`, and leaves others to the next stage."""

    def start(self, node: Node) -> None:
        self.node = node

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors | None:
        if float(tensors["values"]) < 100:
            return tensors
        task.metadata["route"] = "large"
        self.node.dispatch(tensors, task, "large")
        return None


class LoopbackExecutor(TaskExecutor):
    """Sends each request from stage `back` to stage `there` once more."""

    def start(self, node: Node) -> None:
        self.node = node

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors | None:
        rounds = int(task.metadata.get("rounds", "0"))
        if self.node.stage == "back" and rounds == 0:
            task.metadata["rounds"] = "1"
            self.node.dispatch(tensors, task, "there")
            return None
        return tensors


class ByteCountExecutor(TaskExecutor):
    """Accepts any content and returns its size."""

    def prepare(self, content: Any, task: TaskContext) -> Tensors:
        return {"raw": bytes(content.data)}

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        return {"bytes": len(tensors["raw"])}


class FailingStartExecutor(TaskExecutor):
    """Fails to start; must not be stopped."""

    def start(self, node: Node) -> None:
        raise OSError("the file is not there")

    def stop(self) -> None:
        raise AssertionError("stopped an executor that did not start")


class CrashingExecutor(TaskExecutor):
    """Kills its process at one value, as a fault of a driver or a lack of memory does."""

    def __init__(self, value: float) -> None:
        self.value = value

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        if float(tensors["values"]) == self.value:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return dict(tensors)


# Sources --------------------------------------------------------------------------------------------------------------


class CountingSource(Source):
    """Counts from 0, up or down (`sign` -1), as fast as possible or every `every_s` seconds."""

    def __init__(self, name: str, count: int, every_s: float = 0.0, live: bool = False, sign: int = 1) -> None:
        self.name = name
        self.live = live
        self._count = count
        self._sign = sign
        self._every_s = every_s
        self._closed = threading.Event()

    def samples(self) -> Iterator[Sample]:
        for index in range(self._count):
            if self._closed.wait(self._every_s):
                return
            yield Sample(self.name, index, {"values": np.array(float(self._sign * index))}, SAFETENSORS)

    def close(self) -> None:
        self._closed.set()


class PrintingSource(CountingSource):
    """Prints a text to standard output after its last sample, and then may fail."""

    def __init__(self, name: str, count: int, text: str, raise_at_end: bool = False) -> None:
        super().__init__(name, count)
        self._text = text
        self._raise_at_end = raise_at_end

    def samples(self) -> Iterator[Sample]:
        yield from super().samples()
        print(self._text, flush=True)
        if self._raise_at_end:
            raise OSError("the cable is out")


class BlockingSource(Source):
    """Blocks after its first sample, and ignores `close`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def samples(self) -> Iterator[Sample]:
        for index in itertools.count():
            yield Sample(self.name, index, {"values": np.array(1.0)}, SAFETENSORS)
            time.sleep(600)

    def close(self) -> None:
        """Does nothing."""


class FailingSource(CountingSource):
    """Fails after its last sample."""

    def samples(self) -> Iterator[Sample]:
        yield from super().samples()
        raise ValueError(f"no sample {self._count}")


def _wait_for_file(path: Path) -> None:
    deadline_s = time.monotonic() + _GATE_TIMEOUT_S
    while not path.exists() and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
