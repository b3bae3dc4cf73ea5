"""All that is measured of a node, in one sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from monitor.points.points import TelemetryPoint
from monitor.sensors.base import Sensor, UnavailableSensors, error_reason
from monitor.sensors.host import HostSensor
from monitor.sensors.jetson import JetsonSensor
from monitor.sensors.network import NetworkSensor
from monitor.sensors.nvml import GpuSensor
from monitor.sensors.processes import ProcessSensor
from monitor.sensors.rapl import RaplSensor

log = logging.getLogger(__name__)


def default_sensors(root: Path = Path("/")) -> list[Sensor]:
    """Those of every node, apart from our own processes; `root` stands in for `/` where files are read."""
    return [HostSensor(root), NetworkSensor(), GpuSensor(), RaplSensor(root), JetsonSensor(root)]


class NodeSensors:
    """Samples a node. One thread at a time; cheap, but for a Jetson's rails, which take milliseconds.

    Points have the tags `node` and `run`: a process's run is its own, if it said so. `sensors` takes the place of those
    of this node.
    """

    def __init__(
        self,
        node: str,
        run: str = "",
        processes: ProcessSensor | None = None,
        *,
        sensors: Sequence[Sensor] | None = None,
    ) -> None:
        self._tags = {"node": node, "run": run}
        own = ProcessSensor() if processes is None else processes
        self._sensors: list[Sensor] = [*(default_sensors() if sensors is None else sensors), own]
        self._missing = UnavailableSensors()

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """What is measured now; never raises. `now_s` is a monotonic clock's, of which only differences count."""
        points: list[TelemetryPoint] = []
        for sensor in self._sensors:
            try:
                points += sensor.sample(time_ns, now_s)
            except Exception as error:
                # A mistake of ours, or a driver's: it must not cost what the others measure.
                told = self._missing.report_once(time_ns, type(sensor).__name__.lower(), error_reason(error))
                if told:  # else it fails at every sample, as it is known to
                    log.exception("a sensor failed")
                points += told
        return [replace(point, tags={**self._tags, **point.tags}) for point in points]

    def close(self) -> None:
        """Let go of all that is held. May be called twice."""
        for sensor in self._sensors:
            sensor.close()
