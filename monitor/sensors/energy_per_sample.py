"""Energy per sample: the energy of a node and the samples processed in the same time, as points of `energy`.

They share a measurement because InfluxQL cannot divide one measurement by another.
"""

from collections import Counter
from collections.abc import Iterable

from monitor.points.points import TelemetryPoint
from monitor.sensors.counters import additive_energy_j

_SAMPLES_LIMIT = 1 << 53  # stores hold 64 bits; rows are numbers that any sender can make up


class EnergyPerSample:
    """Totals by run of the points that pass `add`."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._samples: Counter[str] = Counter()
        self._energy_j: dict[str, float] = {}

    def add(self, points: Iterable[TelemetryPoint]) -> None:
        """Count requests with a result, rows of steps, and energy of GPUs and additive rails; ignore other points."""
        for point in points:
            run = point.tags["run"]
            if point.measurement == "request" and not point.fields["error"]:
                self._samples[run] += 1
            elif point.measurement == "step":
                self._samples[run] = min(self._samples[run] + int(point.fields["rows"] or 0), _SAMPLES_LIMIT)
            elif (energy_j := additive_energy_j(point)) is not None:
                self._energy_j[run] = self._energy_j.get(run, 0.0) + energy_j

    def pop_points(self, time_ns: int) -> list[TelemetryPoint]:
        """A point with the totals since the last call for each run that has any."""
        points = []
        for run in sorted({*self._samples, *self._energy_j}):
            fields = {"energy_j": self._energy_j.get(run), "samples": self._samples[run]}
            points.append(TelemetryPoint("energy", time_ns, {"node": self._node, "run": run}, fields))
        self._samples.clear()
        self._energy_j.clear()
        return points
