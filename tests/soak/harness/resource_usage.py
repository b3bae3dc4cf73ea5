"""What processes hold over time (memory, descriptors, threads), and what hangs on an object; how both have grown."""

from __future__ import annotations

import asyncio
import gc
import statistics
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType, TracebackType

import psutil

MIB = 1 << 20
_TENTHS = 10
# What belongs to the program, and what leads from one object to everything else.
_NOT_HELD = (
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
    """What one process held at one moment."""

    resident_bytes: int
    file_descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class ResourceTrend:
    """What a process held in each tenth of the time after the warm-up: medians, so that one moment decides nothing."""

    process: str
    resident_bytes: tuple[float, ...]
    file_descriptors: tuple[int, ...]
    threads: tuple[int, ...]

    @property
    def growth_bytes(self) -> float:
        """From the first tenth to the last."""
        return self.resident_bytes[-1] - self.resident_bytes[0]

    def __str__(self) -> str:
        tenths = " ".join(f"{size / MIB:.1f}" for size in self.resident_bytes)
        return (
            f"{self.process:>8}: MiB resident in each tenth {tenths} (grown {self.growth_bytes / MIB:+.2f}); "
            f"descriptors {self.file_descriptors[0]} -> {self.file_descriptors[-1]}, "
            f"threads {self.threads[0]} -> {self.threads[-1]}"
        )


class ResourceWatcher:
    """Looks at some processes, by name, `every_s` seconds, from a thread of its own, until the block ends."""

    def __init__(self, processes: Mapping[str, int], every_s: float) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self._every_s = every_s
        self._looks: list[dict[str, ResourceSample]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="watch")

    def __enter__(self) -> ResourceWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def trends(self, warm_up_fraction: float) -> list[ResourceTrend]:
        """What came of each process; the first share `warm_up` of the time does not count, nor does its end."""
        looks = self._looks[int(warm_up_fraction * len(self._looks)) :]
        tenths = [looks[len(looks) * part // _TENTHS : len(looks) * (part + 1) // _TENTHS] for part in range(_TENTHS)]
        assert all(tenths), f"{len(looks)} looks are too few"
        return [_trend(name, tenths) for name in self._processes]

    def _keep_looking(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._looks.append({name: sample_resources(process) for name, process in self._processes.items()})
            except psutil.Error:  # one of them has ended, and with it what is to be seen
                return


def sample_resources(process: psutil.Process) -> ResourceSample:
    with process.oneshot():
        return ResourceSample(process.memory_info().rss, process.num_fds(), process.num_threads())


def _trend(name: str, tenths: Sequence[Sequence[Mapping[str, ResourceSample]]]) -> ResourceTrend:
    looks = [[each[name] for each in tenth] for tenth in tenths]
    return ResourceTrend(
        process=name,
        resident_bytes=tuple(statistics.median(each.resident_bytes for each in tenth) for tenth in looks),
        file_descriptors=tuple(statistics.median_high(each.file_descriptors for each in tenth) for tenth in looks),
        threads=tuple(statistics.median_high(each.threads for each in tenth) for tenth in looks),
    )


def count_reachable_objects(*roots: object) -> int:
    """How many objects hang on these, whichever way: a table that nobody clears shows, wherever it is.

    Not those of the program itself, nor what only an event loop or a thread knows of, nor what is in a deque of bounded
    length, which forgets by itself.
    """
    seen: dict[int, object] = {}
    found: list[object] = list(roots)
    while found:
        each = found.pop()
        if id(each) in seen or isinstance(each, _NOT_HELD):
            continue
        seen[id(each)] = each
        if not (isinstance(each, deque) and each.maxlen is not None):
            found += gc.get_referents(each)
    return len(seen)
