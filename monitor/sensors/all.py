"""All sensors of a node, and the thread that samples them."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from brokers.telemetry.schema import ProcessStarted, ProcessStopped, TelemetryEvent
from monitor.points.points import TelemetryPoint
from monitor.sensors.base import Sensor
from monitor.sensors.host import HostSensor, NetworkSensor
from monitor.sensors.jetson import JetsonSensor
from monitor.sensors.nvml import GpuSensor
from monitor.sensors.processes import ProcessSensor
from monitor.sensors.rapl import RaplSensor

SAMPLE_INTERVAL_S = 0.5


def default_sensors(root: Path = Path("/")) -> list[Sensor]:
    """The sensors of a node, without its processes; `root` replaces `/` where they read files."""
    return [HostSensor(root), NetworkSensor(), GpuSensor(), RaplSensor(root), JetsonSensor(root)]


class Sampler:
    """Samples all sensors of a node; periodically in a separate thread, so a driver that hangs blocks nothing else.

    Points get the tags `node` and `run`, unless a process has its own run. `sensors` replaces `default_sensors()`.
    Lifecycle: `start`, `stop`. `on_sample` is called in the sampler's thread.
    """

    def __init__(
        self,
        node: str,
        run: str = "",
        on_sample: Callable[[Sequence[TelemetryPoint]], None] = lambda points: None,
        interval_s: float = SAMPLE_INTERVAL_S,
        *,
        sensors: Sequence[Sensor] | None = None,
    ) -> None:
        self.latest: Sequence[TelemetryPoint] = ()  # the newest sample
        self.processes = ProcessSensor()
        self._tags = {"node": node, "run": run}
        self._on_sample = on_sample
        self._interval_s = interval_s
        self._sensors = [*(default_sensors() if sensors is None else sensors), self.processes]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="sampler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def on_events(self, events: Sequence[TelemetryEvent]) -> None:
        """Follow the start and the end of processes; from any thread."""
        for event in events:
            if isinstance(event, ProcessStarted):
                self.processes.on_start(event.role, event.name, event.pid, event.run or self._tags["run"])
            elif isinstance(event, ProcessStopped):
                self.processes.on_stop(event.pid)

    def stop(self, timeout_s: float) -> None:
        """End the thread; one that hangs is abandoned. May be called twice, and without `start`."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """The points of all sensors at Unix time `time_ns` and monotonic time `now_s`; never raises.

        It is cheap except for a Jetson's rails, which take milliseconds.
        """
        points = [point for sensor in self._sensors for point in sensor.sample(time_ns, now_s)]
        return [replace(point, tags={**self._tags, **point.tags}) for point in points]

    def close(self) -> None:
        """Release the resources of all sensors. May be called twice."""
        for sensor in self._sensors:
            sensor.close()

    def _sample_until_stopped(self) -> None:
        due_s = time.monotonic()
        while not self._stopping.is_set():
            self.latest = self.sample(time.time_ns(), time.monotonic())
            self._on_sample(self.latest)
            due_s = max(due_s + self._interval_s, time.monotonic())  # late samples are not made up for
            self._stopping.wait(due_s - time.monotonic())
        self.close()
