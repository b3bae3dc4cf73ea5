"""The processes of Sparse on the node: those that sent a `start` event, and the monitor itself."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from monitor.points.points import FieldValue
from monitor.sensors.base import Reading, Sensor

PROCESSES_LIMIT = 256  # bounds what a hostile sender of events can make the monitor sample


@dataclass(slots=True)
class _SampledProcess:
    role: str
    name: str
    run: str
    process: psutil.Process
    clients: int = 1  # `start` events without a `stop`
    last: tuple[float, float] | None = None  # CPU time and time of the previous sample, in seconds

    def fields(self, now_s: float) -> dict[str, FieldValue] | None:
        """The fields of its point; None if it has ended (a zombie has) or cannot be read."""
        process = self.process
        try:
            if not process.is_running():  # also compares the start time, so a reused pid is another process
                return None
            with process.oneshot():
                if process.status() == psutil.STATUS_ZOMBIE:
                    return None
                times = process.cpu_times()
                memory_bytes = process.memory_info().rss
                threads = process.num_threads()
        except psutil.Error:
            return None
        cpu_s = times.user + times.system
        last = self.last
        self.last = (cpu_s, now_s)
        cpu = (cpu_s - last[0]) / (now_s - last[1]) if last is not None and now_s > last[1] else None
        return {"cpu": cpu, "cpu_s": cpu_s, "memory_bytes": memory_bytes, "threads": threads, "pid": process.pid}


class ProcessSensor(Sensor):
    """The measurement `process`. `on_start` and `on_stop` may be called from another thread.

    A process with several clients (two sources, say) is one process, which ends with the last of them. A pid that does
    not exist here, such as one of another container, is ignored. Events with the monitor's own pid are ignored too: it
    has the role `monitor`.
    """

    name = "processes"

    def __init__(self) -> None:
        super().__init__()
        self._monitor = _SampledProcess("monitor", "monitor", "", psutil.Process())
        self._processes: dict[int, _SampledProcess] = {}  # by pid

    def on_start(self, role: str, name: str, pid: int, run: str) -> None:
        """Sample this process from now on, until it ends."""
        if pid <= 0 or pid == os.getpid():
            return
        known = self._processes.get(pid)
        if known is None and len(self._processes) >= PROCESSES_LIMIT:
            return
        try:
            started = _SampledProcess(role, name, run, psutil.Process(pid))
        except psutil.Error:
            return
        if known is not None and known.process == started.process:  # not equal if the pid was reused
            started.clients = known.clients + 1
        self._processes[pid] = started

    def on_stop(self, pid: int) -> None:
        """One client of this process has ended; an unknown pid is ignored."""
        if process := self._processes.get(pid):
            process.clients -= 1
            if process.clients <= 0:
                self._processes.pop(pid, None)

    def measure(self, now_s: float) -> Iterator[Reading]:
        """A reading of each process that runs."""
        for process in [self._monitor, *self._processes.values()]:
            fields = process.fields(now_s)
            if fields is not None:
                tags = {"role": process.role, "name": process.name} | ({"run": process.run} if process.run else {})
                yield "process", tags, fields
            elif self._processes.get(process.process.pid) is process:
                self._processes.pop(process.process.pid, None)
