"""The machine itself: processors, load and memory; in a container with a limit, the container's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from monitor.points.points import Point, Value
from monitor.sensors.base import Missing, why
from monitor.sensors.cgroup import MemoryGroups

_FIELDS = ("cpu", "load", "memory_used_bytes", "memory_total_bytes")
_IDLE = ("idle", "iowait")
_TWICE = ("guest", "guest_nice")  # Linux counts them in `user` and `nice` as well


class Host:
    """The measurement `node`. `root` stands in for `/` where control groups are read."""

    def __init__(self, root: Path = Path("/"), cpu_times: Callable[[], Any] = psutil.cpu_times) -> None:
        self._groups = MemoryGroups(root)
        self._cpu_times = cpu_times
        self._last: tuple[float, float] | None = None
        self._missing = Missing()

    def sample(self, time_ns: int, now_s: float) -> list[Point]:
        """One point, and what cannot be read."""
        fields: dict[str, Value] = dict.fromkeys(_FIELDS)
        missing: list[Point] = []
        for name, read in (("cpu", self._cpu), ("load", _load), ("memory", self._memory)):
            try:
                fields |= read()
            except (OSError, NotImplementedError, RuntimeError, psutil.Error) as error:
                missing += self._missing.tell(time_ns, f"node.{name}", why(error))
        return [Point("node", time_ns, {}, fields), *missing]

    def close(self) -> None:
        """Nothing is held."""

    def _cpu(self) -> dict[str, Value]:
        # Not psutil.cpu_percent: that keeps the last times for the whole process, for anybody who asks.
        times = self._cpu_times()
        idle_s = sum(getattr(times, name, 0.0) for name in _IDLE)
        all_s = sum(times) - sum(getattr(times, name, 0.0) for name in _TWICE)
        last, self._last = self._last, (idle_s, all_s)
        if last is None or all_s <= last[1]:
            return {"cpu": None}
        # Linux may count `iowait` back a little.
        return {"cpu": min(1.0, max(0.0, 1 - (idle_s - last[0]) / (all_s - last[1])))}

    def _memory(self) -> dict[str, Value]:
        machine = psutil.virtual_memory()
        if group := self._groups.memory(below=machine.total):
            return {"memory_used_bytes": group.used, "memory_total_bytes": group.total}
        return {"memory_used_bytes": machine.total - machine.available, "memory_total_bytes": machine.total}


def _load() -> dict[str, Value]:
    return {"load": psutil.getloadavg()[0]}
