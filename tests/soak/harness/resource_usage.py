"""Memory, file descriptors and threads of processes over a run, and the objects that one object keeps alive."""

from __future__ import annotations

import asyncio
import gc
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType, TracebackType
from typing import Any, Self

import psutil

MIB = 1 << 20
_TENTHS = 10
# The program itself, and objects from which everything else can be reached.
_EXCLUDED_TYPES = (
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    CodeType,
    FrameType,
    TracebackType,
    threading.Thread,
    asyncio.AbstractEventLoop,
)


@dataclass(frozen=True, slots=True)
class ResourceSample:
    """The resources of one process at one moment."""

    resident_bytes: int
    file_descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class ResourceTrend:
    """The resources of a process over a run: the median of each tenth of the samples."""

    process: str
    resident_bytes: Sequence[float]
    file_descriptors: Sequence[int]
    threads: Sequence[int]

    @property
    def growth_bytes(self) -> float:
        """From the first tenth to the last."""
        return self.resident_bytes[-1] - self.resident_bytes[0]

    def assert_bounded(self, limit_bytes: int, extra: int = 0) -> None:
        """Assert that memory grew by at most `limit_bytes`, and that at most `extra` descriptors or threads were added.

        A thread pool adds a thread, and a checkpoint that is being written a descriptor.
        """
        assert self.growth_bytes <= limit_bytes, str(self)
        assert self.file_descriptors[-1] <= self.file_descriptors[0] + extra, str(self)
        assert self.threads[-1] <= self.threads[0] + extra, str(self)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, trend: dict[str, Any]) -> Self:
        return cls(**trend)

    def __str__(self) -> str:
        tenths = " ".join(f"{size / MIB:.1f}" for size in self.resident_bytes)
        return (
            f"{self.process:>8}: resident MiB by tenths {tenths} (growth {self.growth_bytes / MIB:+.2f}); "
            f"descriptors {self.file_descriptors[0]} -> {self.file_descriptors[-1]}, "
            f"threads {self.threads[0]} -> {self.threads[-1]}"
        )


class ResourceRecorder:
    """Samples processes on request: at counts of requests or steps, so that the machine's speed is irrelevant.

    `processes` maps names to process ids.
    """

    def __init__(self, processes: Mapping[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self._samples: list[dict[str, ResourceSample]] = []

    def sample(self) -> None:
        self._samples.append({name: sample_resources(process) for name, process in self._processes.items()})

    def trends(self) -> list[ResourceTrend]:
        """The trend of each process; at least ten samples are needed."""
        count = len(self._samples)
        assert count >= _TENTHS, f"{count} samples, at least {_TENTHS} are needed"
        tenths = [self._samples[count * part // _TENTHS : count * (part + 1) // _TENTHS] for part in range(_TENTHS)]
        return [_trend(name, tenths) for name in self._processes]


def sample_resources(process: psutil.Process) -> ResourceSample:
    with process.oneshot():
        return ResourceSample(process.memory_info().rss, process.num_fds(), process.num_threads())


def _trend(name: str, tenths: Sequence[Sequence[Mapping[str, ResourceSample]]]) -> ResourceTrend:
    samples = [[sample[name] for sample in tenth] for tenth in tenths]
    return ResourceTrend(
        process=name,
        resident_bytes=[statistics.median(each.resident_bytes for each in tenth) for tenth in samples],
        file_descriptors=[statistics.median_high(each.file_descriptors for each in tenth) for tenth in samples],
        threads=[statistics.median_high(each.threads for each in tenth) for tenth in samples],
    )


def count_reachable_objects(*roots: object) -> int:
    """Count the objects that are reachable from `roots`: any table that is never cleared shows, by its name.

    Excluded are the program itself, event loops and threads, and the contents of deques of bounded length.
    """
    gc.collect()
    seen: dict[int, object] = {}
    pending: list[object] = list(roots)
    while pending:
        candidate = pending.pop()
        if id(candidate) in seen or isinstance(candidate, _EXCLUDED_TYPES):
            continue
        seen[id(candidate)] = candidate
        if not (isinstance(candidate, deque) and candidate.maxlen is not None):
            pending += gc.get_referents(candidate)
    return len(seen)


async def settle(count: Callable[[], int], target: int | None = None, timeout_s: float = 60.0) -> int:
    """Return the count once it is at most `target`, or (without one) no longer falls; after `timeout_s` as it is."""
    end_s = time.monotonic() + timeout_s
    lowest = count()
    unchanged = 0
    while time.monotonic() < end_s and (unchanged < 5 if target is None else lowest > target):
        await asyncio.sleep(0.1)
        current = count()
        unchanged = unchanged + 1 if current >= lowest else 0
        lowest = min(lowest, current)
    return lowest
