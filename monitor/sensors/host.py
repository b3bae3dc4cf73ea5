"""The machine itself: CPU, load and memory; in a container with a memory limit, the container's memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from monitor.points.points import FieldValue
from monitor.sensors.base import Reading, Sensor, read_number, read_text

_IDLE = ("idle", "iowait")
_INCLUDED = ("guest", "guest_nice")  # Linux counts these times in `user` and `nice` too
# The files of a control group with its limit and its usage, and the line of `memory.stat` with reclaimable cache.
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")


class HostSensor(Sensor):
    """The measurement `node`. `root` replaces `/` for the files of control groups."""

    name = "host"

    def __init__(self, root: Path = Path("/"), cpu_times: Callable[[], Any] = psutil.cpu_times) -> None:
        super().__init__()
        self._root = root
        self._cpu_times = cpu_times
        self._last: tuple[float, float] | None = None  # idle and total CPU seconds

    def measure(self, now_s: float) -> Iterator[Reading]:
        """One point, and reports of values that cannot be read."""
        fields: dict[str, FieldValue] = {}
        for name, read in (("cpu", self._cpu), ("load", _load), ("memory", self._memory)):
            try:
                fields |= read()
            except (OSError, NotImplementedError, RuntimeError, psutil.Error) as error:
                yield from self.report_missing(name, error)
        yield "node", {}, fields

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
        usage = cgroup_memory(self._root, below_bytes=machine.total)
        usage = usage or MemoryUsage(machine.total - machine.available, machine.total)
        return {"memory_used_bytes": usage.used_bytes, "memory_total_bytes": usage.total_bytes}


def _load() -> dict[str, FieldValue]:
    return {"load": psutil.getloadavg()[0]}


class MemoryUsage(NamedTuple):
    """Memory in bytes; cache that the kernel can reclaim is not counted as used."""

    used_bytes: int
    total_bytes: int


def cgroup_memory(root: Path, below_bytes: int) -> MemoryUsage | None:
    """The memory of this process' control group (version 1 or 2) with the smallest limit below `below_bytes`.

    Its own group and all outer ones that are visible count; None where no group has a limit, for which version 1 has a
    huge number. `root` replaces `/`.
    """
    mount = root / "sys" / "fs" / "cgroup"
    own_path = ""
    limit_file, usage_file, reclaimable = _CGROUP_V2
    for line in read_text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount /= "memory"
            own_path = path
            limit_file, usage_file, reclaimable = _CGROUP_V1
            break
        if not controllers:
            own_path = path
    limits = [
        (limit, folder)
        for folder in _groups(mount, own_path)
        if (limit := read_number(folder / limit_file)) is not None and limit < below_bytes
    ]
    if not limits:
        return None
    limit, folder = min(limits)
    usage = read_number(folder / usage_file)
    if usage is None:
        return None
    statistics = dict(line.split(" ", 1) for line in read_text(folder / "memory.stat").splitlines())
    return MemoryUsage(max(0, usage - int(statistics.get(reclaimable, 0))), limit)


def _groups(mount: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part]
    # A container may see its path on the host, or one relative to another namespace, but only its own group's files.
    if ".." in parts or not mount.joinpath(*parts).is_dir():
        parts = []
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
