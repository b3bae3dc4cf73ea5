"""Energy per sample: the energy of a node and the samples processed in the same time, as points of `energy`.

They share a measurement because InfluxQL cannot divide one measurement by another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from monitor.points.points import TelemetryPoint
from monitor.sensors.counters import is_additive

_SAMPLES_LIMIT = 1 << 53  # stores hold 64 bits; rows are numbers that any sender can make up


@dataclass(slots=True)
class _Totals:
    energy_j: float | None = None
    samples: int = 0


class EnergyPerSample:
    """Totals by run of the points that pass `add`."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._runs: defaultdict[str, _Totals] = defaultdict(_Totals)

    def add(self, points: Iterable[TelemetryPoint]) -> None:
        """Count requests with a result, rows of steps, and energy of GPUs and additive rails; ignore other points."""
        for point in points:
            match point.measurement:
                case "request" if not point.fields["error"]:
                    self._totals(point).samples += 1
                case "step":
                    totals = self._totals(point)
                    totals.samples = min(totals.samples + int(point.fields["rows"] or 0), _SAMPLES_LIMIT)
                case "gpu":
                    self._add_energy(point)
                case "power" if is_additive(point.tags["rail"]):
                    self._add_energy(point)

    def pop_points(self, time_ns: int) -> list[TelemetryPoint]:
        """A point with the totals since the last call for each run that has any."""
        points = []
        for run, totals in self._runs.items():
            fields = {"energy_j": totals.energy_j, "samples": totals.samples}
            points.append(TelemetryPoint("energy", time_ns, {"node": self._node, "run": run}, fields))
        self._runs.clear()
        return points

    def _totals(self, point: TelemetryPoint) -> _Totals:
        return self._runs[point.tags["run"]]

    def _add_energy(self, point: TelemetryPoint) -> None:
        energy_j = point.fields.get("energy_j")
        if energy_j is not None:
            totals = self._totals(point)
            totals.energy_j = (totals.energy_j or 0.0) + float(energy_j)
