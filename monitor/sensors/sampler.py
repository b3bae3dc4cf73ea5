"""Samples the node's sensors so many times a second, in a thread of its own: a driver that hangs stops nothing else."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from brokers.telemetry.schema import ProcessStarted, ProcessStopped, TelemetryEvent
from monitor.points.points import TelemetryPoint
from monitor.sensors.all import NodeSensors
from monitor.sensors.processes import ProcessSensor

log = logging.getLogger(__name__)

_HEARD_LIMIT = 10_000  # processes that began or ended since the last sample: more than any node starts


class Sampler:
    """Life: `start`, `stop`."""

    def __init__(
        self, node: str, run: str, interval_s: float, on_sample: Callable[[Sequence[TelemetryPoint]], None]
    ) -> None:
        self.latest: Sequence[TelemetryPoint] = ()
        self._node, self._run_name, self._every_s, self._give = node, run, interval_s, on_sample
        self._heard: deque[ProcessStarted | ProcessStopped] = deque(maxlen=_HEARD_LIMIT)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def on_events(self, events: Sequence[TelemetryEvent]) -> None:
        """Which processes are ours is known by what they say; from any thread."""
        self._heard.extend(event for event in events if isinstance(event, ProcessStarted | ProcessStopped))

    def stop(self, timeout_s: float) -> None:
        """Sample no more; one that hangs is left behind. May be called twice, and without `start`."""
        self._leaving.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        own = ProcessSensor()
        sensors = NodeSensors(self._node, self._run_name, own)
        due_s = time.monotonic()
        while not self._leaving.is_set():
            self._tell(own)
            self.latest = sensors.sample(time.time_ns(), time.monotonic())
            self._give(self.latest)
            due_s = max(due_s + self._every_s, time.monotonic())  # a sample that was late is not made up for
            self._leaving.wait(due_s - time.monotonic())
        sensors.close()

    def _tell(self, own: ProcessSensor) -> None:
        while self._heard:
            event = self._heard.popleft()
            if isinstance(event, ProcessStarted):
                own.on_start(event.role, event.name, event.pid, event.run or self._run_name)
            else:
                own.on_stop(event.pid)
