"""Our own processes on the node: those that said that they began, and the monitor itself."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

import psutil

from monitor.points.points import FieldValue, TelemetryPoint

# More than anybody runs on one node, and an end to what a hostile sender can make us look at.
PROCESSES_LIMIT = 256


@dataclass(slots=True)
class _SampledProcess:
    role: str
    name: str
    run: str
    process: psutil.Process
    clients: int = 1  # that said `start` in it, and have not said `stop`
    last: tuple[float, float] | None = None  # processor time, and when


class ProcessSensor:
    """The measurement `process`. `began` and `ended` may be called from another thread than `sample`.

    A process ends with the last of those in it that began: one with two sources is one. A pid that means nothing here,
    such as one of another container, is left out without a word. One that is given to somebody else later is noticed by
    the time at which its process was made. Our own pid is the monitor, whoever else it says that it is.
    """

    def __init__(self) -> None:
        self._monitor = _SampledProcess("monitor", "monitor", "", psutil.Process())
        self._known: dict[int, _SampledProcess] = {}  # by pid

    def on_start(self, role: str, name: str, pid: int, run: str) -> None:
        """From now on this process is sampled, if it can be seen, for as long as it lives."""
        if pid <= 0 or pid == os.getpid():
            return
        if pid not in self._known and len(self._known) >= PROCESSES_LIMIT:
            return
        try:
            own = _SampledProcess(role, name, run, psutil.Process(pid))
        except psutil.Error:
            return
        known = self._known.get(pid)
        if known is not None and known.process == own.process:  # and not another one that has its pid by now
            own.clients = known.clients + 1
        self._known[pid] = own

    def on_stop(self, pid: int) -> None:
        """Somebody in it has ended: with the last one it is sampled no more. One that is not known is no matter."""
        if (own := self._known.get(pid)) is None:
            return
        own.clients -= 1
        if own.clients <= 0:
            self._known.pop(pid, None)

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """One point for each that lives."""
        points: list[TelemetryPoint] = []
        twins: Counter[tuple[str, str, str]] = Counter()
        for own in [self._monitor, *self._known.values()]:
            fields = _look(own, now_s)
            if fields is None:
                if self._known.get(own.process.pid) is own:
                    self._known.pop(own.process.pid, None)
                continue
            tags = {"role": own.role, "name": own.name} | ({"run": own.run} if own.run else {})
            # A nanosecond apart: to InfluxDB two processes of one name would be one point, by their tags and time.
            place = twins[(own.role, own.name, own.run)]
            twins[(own.role, own.name, own.run)] += 1
            points.append(TelemetryPoint("process", time_ns + place, tags, fields))
        return points

    def close(self) -> None:
        """Nothing is held."""


def _look(own: _SampledProcess, now_s: float) -> dict[str, FieldValue] | None:
    """None of a process that has ended, or that its parent has not taken leave of yet."""
    process = own.process
    try:
        # It compares the time at which it was made: cheaper ways would take a stranger with its pid for it.
        if not process.is_running():
            return None
        with process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            times = process.cpu_times()
            memory_bytes, threads = process.memory_info().rss, process.num_threads()
    except psutil.Error:
        return None
    cpu_s = times.user + times.system
    last, own.last = own.last, (cpu_s, now_s)
    cpu = (cpu_s - last[0]) / (now_s - last[1]) if last is not None and now_s > last[1] else None
    return {"cpu": cpu, "cpu_s": cpu_s, "memory_bytes": memory_bytes, "threads": threads, "pid": process.pid}
