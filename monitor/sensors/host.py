"""The machine itself: processors, load and memory; in a container with a limit, the container's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from monitor.points.points import FieldValue, TelemetryPoint
from monitor.sensors.base import UnavailableSensors, error_reason
from monitor.sensors.cgroup import MemoryCgroups

_FIELDS = ("cpu", "load", "memory_used_bytes", "memory_total_bytes")
_IDLE = ("idle", "iowait")
_TWICE = ("guest", "guest_nice")  # Linux counts them in `user` and `nice` as well


class HostSensor:
    """The measurement `node`. `root` stands in for `/` where control groups are read."""

    def __init__(self, root: Path = Path("/"), cpu_times: Callable[[], Any] = psutil.cpu_times) -> None:
        self._groups = MemoryCgroups(root)
        self._cpu_times = cpu_times
        self._last: tuple[float, float] | None = None
        self._missing = UnavailableSensors()

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """One point, and what cannot be read."""
        fields: dict[str, FieldValue] = dict.fromkeys(_FIELDS)
        missing: list[TelemetryPoint] = []
        for name, read in (("cpu", self._cpu), ("load", _load), ("memory", self._memory)):
            try:
                fields |= read()
            except (OSError, NotImplementedError, RuntimeError, psutil.Error) as error:
                missing += self._missing.report_once(time_ns, f"node.{name}", error_reason(error))
        return [TelemetryPoint("node", time_ns, {}, fields), *missing]

    def close(self) -> None:
        """Nothing is held."""

    def _cpu(self) -> dict[str, FieldValue]:
        # Not psutil.cpu_percent: that keeps the last times for the whole process, for anybody who asks.
        times = self._cpu_times()
        idle_s = sum(getattr(times, name, 0.0) for name in _IDLE)
        all_s = sum(times) - sum(getattr(times, name, 0.0) for name in _TWICE)
        last, self._last = self._last, (idle_s, all_s)
        if last is None or all_s <= last[1]:
            return {"cpu": None}
        # Linux may count `iowait` back a little.
        return {"cpu": min(1.0, max(0.0, 1 - (idle_s - last[0]) / (all_s - last[1])))}

    def _memory(self) -> dict[str, FieldValue]:
        machine = psutil.virtual_memory()
        if group := self._groups.memory_usage(below_bytes=machine.total):
            return {"memory_used_bytes": group.used_bytes, "memory_total_bytes": group.total_bytes}
        return {"memory_used_bytes": machine.total - machine.available, "memory_total_bytes": machine.total}


def _load() -> dict[str, FieldValue]:
    return {"load": psutil.getloadavg()[0]}
