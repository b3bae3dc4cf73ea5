"""Stages, sources and networks that tests name in their pipeline files: small, and each with one habit of its own."""

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


def double(values: Any) -> Tensors:
    return {"values": 2 * values}


def add_one(values: Any, **others: Any) -> Tensors:
    return {"values": values + 1, **others}


def add_padding(values: Any) -> Tensors:
    """What crosses a cut is much larger than what came in: 800 kB."""
    return {"values": values, "padding": np.full(200_000, float(values), np.float32)}


def strip_padding(values: Any, padding: Any) -> Tensors:
    assert np.all(padding == np.float32(values - 1)), "the padding is another request's"
    return {"values": values}


def reject_negative(values: Any) -> Tensors:
    """Raises what an executor's author did not foresee, for some inputs."""
    if np.any(values < 0):
        raise ArithmeticError(f"{float(np.min(values))} is below zero")
    return {"values": values}


class UnprintableError(Exception):
    """Has no text: making it fails."""

    def __str__(self) -> str:
        raise AttributeError("no such field")


class Busy(Exception):
    """Called as the protocol calls a full worker, which it is not."""


def raise_by_value(values: Any) -> Tensors:
    """Raises, by its input, what makes trouble for whoever has to tell of it."""
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
    """Does not return what a stage must return."""
    return values


class SleepExecutor(TaskExecutor):
    """Sleeps, as work that needs no core of this machine."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        time.sleep(self.seconds)
        return dict(tensors)


class FingerprintExecutor(TaskExecutor):
    """Says to be of a model of this fingerprint; says in a file that it is there, and is ready once another is."""

    def __init__(self, fingerprint: str, started_file: str, ready_file: str) -> None:
        self.fingerprint, self.started_file, self.ready_file = fingerprint, Path(started_file), Path(ready_file)

    def start(self, node: Node) -> None:
        self.started_file.touch()
        while not self.ready_file.exists():
            time.sleep(0.001)

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        return dict(tensors)


class BatchableExecutor(TaskExecutor):
    """Doubles rows, many requests at once; says in how large a batch each row was, and after how many calls."""

    batchable = True

    def start(self, node: Node) -> None:
        self.calls = 0

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        self.calls += 1
        time.sleep(0.02)  # so that requests gather meanwhile
        rows = tensors["rows"]  # (N, 3)
        return {"rows": 2 * rows, "batch": np.full(len(rows), len(rows))}


class RoutingExecutor(TaskExecutor):
    """Sends what is large on a detour, by itself; leaves the rest to the next stage."""

    def start(self, node: Node) -> None:
        self.node = node

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors | None:
        if float(tensors["values"]) < 100:
            return tensors
        task.metadata["way"] = "detour"
        self.node.dispatch(tensors, task, "large")
        return None


class ByteCountExecutor(TaskExecutor):
    """Takes what is no array at all, and counts it."""

    def prepare(self, content: Any, task: TaskContext) -> Tensors:
        return {"raw": bytes(content.data)}

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        return {"bytes": len(tensors["raw"])}


class FailingStartExecutor(TaskExecutor):
    """Fails before it has anything to stop."""

    def start(self, node: Node) -> None:
        raise OSError("the file is not there")

    def stop(self) -> None:
        raise AssertionError("stopped what has not begun")


class CountingSource(Source):
    """Counts, as fast as it is asked to or `every_s` seconds."""

    def __init__(self, name: str, count: int, every_s: float = 0.0, live: bool = False) -> None:
        self.name, self.live = name, live
        self._count, self._every_s = count, every_s
        self._closed = threading.Event()

    def samples(self) -> Iterator[Sample]:
        for index in range(self._count):
            if self._closed.wait(self._every_s):
                return
            yield Sample(self.name, index, {"values": np.array(float(index))}, SAFETENSORS)

    def close(self) -> None:
        self._closed.set()


class PrintingSource(CountingSource):
    """Prints what it likes when it has counted to the end, and then may fail."""

    def __init__(self, name: str, count: int, text: str, raise_at_end: bool = False) -> None:
        super().__init__(name, count)
        self._says, self._fails = text, raise_at_end

    def samples(self) -> Iterator[Sample]:
        yield from super().samples()
        print(self._says, flush=True)
        if self._fails:
            raise OSError("the cable is out")


class BlockingSource(Source):
    """Gives one sample and then blocks, and does not mind being closed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def samples(self) -> Iterator[Sample]:
        for index in itertools.count():
            yield Sample(self.name, index, {"values": np.array(1.0)}, SAFETENSORS)
            time.sleep(600)

    def close(self) -> None:
        """Nothing, which is the point."""


class FailingSource(Source):
    """Gives two samples and fails."""

    def __init__(self, name: str) -> None:
        self.name = name

    def samples(self) -> Iterator[Sample]:
        for index in range(2):
            yield Sample(self.name, index, {"values": np.array(float(index))}, SAFETENSORS)
        raise ValueError("no third one")

    def close(self) -> None:
        """Nothing."""


class LoopbackExecutor(TaskExecutor):
    """Sends each request around once more, from the last stage back to the first."""

    def start(self, node: Node) -> None:
        self.node = node

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors | None:
        rounds = int(task.metadata.get("rounds", "0"))
        if self.node.stage == "back" and rounds == 0:
            task.metadata["rounds"] = "1"
            self.node.dispatch(tensors, task, "there")
            return None
        return tensors


class CrashingExecutor(TaskExecutor):
    """Takes the process with it when it meets this value, as a driver's fault or a lack of memory does."""

    def __init__(self, value: float) -> None:
        self.value = value

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        if float(tensors["values"]) == self.value:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return dict(tensors)
