"""The machine itself: CPU, load, memory and network interfaces.

In a container with a memory limit, memory is the container's.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from monitor.points.points import FieldValue
from monitor.sensors.base import Reading, Sensor, read_number, read_text
from monitor.sensors.counters import MonotonicCounter

_IDLE = ("idle", "iowait")
_INCLUDED = ("guest", "guest_nice")  # Linux counts these times in `user` and `nice` too
# The files of a control group with its limit and its usage, and the line of `memory.stat` with reclaimable cache.
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
# Byte counters have 32 bits on some drivers, and restart when an interface is removed and added again.
_ByteCounter = partial(MonotonicCounter, 1 << 32, restarts=True)


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
        readers: dict[str, Callable[[], dict[str, FieldValue]]] = {
            "cpu": self._cpu,
            "load": lambda: {"load": psutil.getloadavg()[0]},
            "memory": self._memory,
        }
        for name, read in readers.items():
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


def read_interface_counters() -> Mapping[str, Any]:
    """The system's counters by interface; psutil's own `nowrap` would take each 32-bit wrap for a restart."""
    return psutil.net_io_counters(pernic=True, nowrap=False)


class _Interface:
    def __init__(self) -> None:
        self._received = _ByteCounter()
        self._sent = _ByteCounter()
        self._errors = MonotonicCounter()  # a sum of four counters: the increase after a restart is unknown

    def fields(self, counts: Any, elapsed_s: float) -> dict[str, FieldValue]:
        received = self._received.increase(counts.bytes_recv)
        sent = self._sent.increase(counts.bytes_sent)
        return {
            "received_bytes": received,
            "sent_bytes": sent,
            "received_bytes_per_s": received / elapsed_s if received is not None and elapsed_s > 0 else None,
            "sent_bytes_per_s": sent / elapsed_s if sent is not None and elapsed_s > 0 else None,
            "errors": self._errors.increase(_error_count(counts)),
        }


class NetworkSensor(Sensor):
    """The measurement `interface`: a point for each interface that has ever carried a packet.

    An interface has its first point in its second sample: its counters may include traffic from before it was moved
    here, as those of containers do.
    """

    name = "network"

    def __init__(self, read: Callable[[], Mapping[str, Any]] = read_interface_counters) -> None:
        super().__init__()
        self._read = read
        self._interfaces: dict[str, _Interface] = {}
        self._last_s = 0.0

    def measure(self, now_s: float) -> Iterator[Reading]:
        """The interfaces in the system's order; none for the first sample."""
        try:
            counters = self._read()
        except (OSError, RuntimeError, psutil.Error) as error:
            self._interfaces = {}
            yield from self.report_missing("", error)
            return
        elapsed_s = now_s - self._last_s
        self._last_s = now_s
        known = self._interfaces
        self._interfaces = {name: known.get(name) or _Interface() for name in counters}
        for name, counts in counters.items():
            fields = self._interfaces[name].fields(counts, elapsed_s)
            if name in known and any((counts.bytes_recv, counts.bytes_sent, _error_count(counts))):
                yield "interface", {"interface": name}, fields


def _error_count(counts: Any) -> int:
    return int(counts.errin + counts.errout + counts.dropin + counts.dropout)
