"""Energy per sample: what the GPUs and rails of a node used, beside what was done meanwhile. Pure.

InfluxQL divides no measurement by another, so both are made points of one, `energy`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from monitor.points.points import TelemetryPoint
from monitor.sensors.counters import is_additive

# What stores can hold, whatever number of rows somebody makes up.
_MOST = 1 << 53


@dataclass(slots=True)
class _EnergyTotals:
    energy_j: float | None = None
    samples: int = 0


class EnergyPerSample:
    """Adds up, run by run, what passes by on its way to a store."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._runs: defaultdict[str, _EnergyTotals] = defaultdict(_EnergyTotals)

    def add(self, points: Iterable[TelemetryPoint]) -> None:
        """Take notice of these; of most measurements there is nothing to notice."""
        for point in points:
            match point.measurement:
                case "request" if not point.fields["error"]:
                    self._of(point).samples += 1
                case "step":
                    spent = self._of(point)
                    spent.samples = min(spent.samples + int(point.fields["rows"] or 0), _MOST)
                case "gpu":
                    self._use(point)
                case "power" if is_additive(point.tags["rail"]):
                    self._use(point)

    def pop_points(self, time_ns: int) -> list[TelemetryPoint]:
        """What was added up since the last call; of a run of which nothing was, none."""
        found = [
            TelemetryPoint(
                "energy",
                time_ns,
                {"node": self._node, "run": run},
                {"energy_j": spent.energy_j, "samples": spent.samples},
            )
            for run, spent in self._runs.items()
        ]
        self._runs.clear()
        return found

    def _of(self, point: TelemetryPoint) -> _EnergyTotals:
        return self._runs[point.tags["run"]]

    def _use(self, point: TelemetryPoint) -> None:
        energy_j = point.fields["energy_j"]
        if energy_j is not None:
            spent = self._of(point)
            spent.energy_j = (spent.energy_j or 0.0) + float(energy_j)
