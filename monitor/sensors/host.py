"""The machine itself: CPU, load and memory; in a container with a memory limit, the container's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from monitor.points.points import FieldValue, TelemetryPoint
from monitor.sensors.base import Sensor

_IDLE = ("idle", "iowait")
_INCLUDED = ("guest", "guest_nice")  # Linux counts these times in `user` and `nice` too


class HostSensor(Sensor):
    """The measurement `node`. `root` replaces `/` for the files of control groups."""

    name = "host"

    def __init__(self, root: Path = Path("/"), cpu_times: Callable[[], Any] = psutil.cpu_times) -> None:
        super().__init__()
        self._cgroups = MemoryCgroups(root)
        self._cpu_times = cpu_times
        self._last: tuple[float, float] | None = None  # idle and total CPU seconds

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """One point, and reports of values that cannot be read."""
        fields: dict[str, FieldValue] = {}
        missing: list[TelemetryPoint] = []
        for name, read in (("cpu", self._cpu), ("load", _load), ("memory", self._memory)):
            try:
                fields |= read()
            except (OSError, NotImplementedError, RuntimeError, psutil.Error) as error:
                missing += self.report_missing(time_ns, name, error)
        return [TelemetryPoint("node", time_ns, {}, fields), *missing]

    def _cpu(self) -> dict[str, FieldValue]:
        # Not psutil.cpu_percent: its previous times are shared by all callers in the process.
        times = self._cpu_times()
        idle_s = sum(getattr(times, name, 0.0) for name in _IDLE)
        total_s = sum(times) - sum(getattr(times, name, 0.0) for name in _INCLUDED)
        last = self._last
        self._last = (idle_s, total_s)
        if last is None or total_s <= last[1]:
            return {"cpu": None}
        busy = 1 - (idle_s - last[0]) / (total_s - last[1])
        return {"cpu": min(1.0, max(0.0, busy))}  # Linux may decrease `iowait` a little

    def _memory(self) -> dict[str, FieldValue]:
        machine = psutil.virtual_memory()
        if usage := self._cgroups.memory_usage(below_bytes=machine.total):
            return {"memory_used_bytes": usage.used_bytes, "memory_total_bytes": usage.total_bytes}
        return {"memory_used_bytes": machine.total - machine.available, "memory_total_bytes": machine.total}


def _load() -> dict[str, FieldValue]:
    return {"load": psutil.getloadavg()[0]}


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Memory of a control group, in bytes; cache that the kernel can reclaim is not counted as used."""

    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """The file names of one version of control groups."""

    limit: str
    usage: str
    reclaimable: str


_V1 = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _CgroupFiles("memory.max", "memory.current", "inactive_file")


class MemoryCgroups:
    """The memory control groups (version 1 or 2) of this process, from its own group to the outermost visible one.

    Limits are read at each call, since a container's may be changed while it runs. `root` replaces `/`.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._files = _V2
        self._folders: list[Path] = []
        mount = root / "sys" / "fs" / "cgroup"
        own_path = ""
        for line in _read_text(root / "proc" / "self" / "cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                self._files = _V1
                self._folders = _folders(mount / "memory", path)
                return
            if not controllers:
                own_path = path
        self._folders = _folders(mount, own_path)

    def memory_usage(self, below_bytes: int) -> MemoryUsage | None:
        """Usage and limit of the group with the smallest limit below `below_bytes`; None where no group has one.

        Version 1 has a huge number for "no limit".
        """
        limits = [
            (limit, folder)
            for folder in self._folders
            if (limit := _read_number(folder / self._files.limit)) is not None and limit < below_bytes
        ]
        if not limits:
            return None
        limit, folder = min(limits)
        usage = _read_number(folder / self._files.usage)
        return None if usage is None else MemoryUsage(max(0, usage - self._reclaimable(folder)), limit)

    def _reclaimable(self, folder: Path) -> int:
        for line in _read_text(folder / "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == self._files.reclaimable:
                return int(value)
        return 0


def _folders(mount: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part]
    # A container may see its path on the host, or one relative to another namespace, but only its own group's files.
    if ".." in parts or not mount.joinpath(*parts).is_dir():
        parts = []
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _read_number(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.isdecimal() else None  # "max": no limit


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
