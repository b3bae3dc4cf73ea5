"""What keeps points, and what gives them back: a SQLite file, or InfluxDB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from monitor.points.points import TelemetryPoint


class Store(Protocol):
    """Takes points. One thread at a time."""

    def write(self, points: Sequence[TelemetryPoint]) -> None:
        """Keep them; raises `BadStore` when that is impossible."""
        ...

    def close(self) -> None:
        """Keep what is still in hand, if that can be done soon. May be called twice."""
        ...


class StoreReader(Protocol):
    """Gives points back; raises `BadStore`."""

    def runs(self) -> list[str]:
        """The names of the runs that have requests or steps, the oldest first."""
        ...

    def points(self, measurement: str, run: str | None = None) -> list[TelemetryPoint]:
        """The points of a measurement, by time; of one run, where it is given."""
        ...
