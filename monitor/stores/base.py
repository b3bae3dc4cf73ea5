"""The interfaces of telemetry stores: a SQLite file or InfluxDB."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from monitor.points.points import TelemetryPoint

T_contra = TypeVar("T_contra", contravariant=True)


class Sink(Protocol[T_contra]):
    """Accepts items in batches; used by one thread at a time."""

    @property
    def waiting(self) -> int:
        """Items accepted and not yet delivered."""

    @property
    def dropped(self) -> int:
        """Items lost."""

    def write(self, items: Sequence[T_contra]) -> None:
        """Accept all items, or raise `BadStore`."""

    def close(self) -> None:
        """Deliver what waits, as far as that is possible soon. May be called twice."""


Store = Sink[TelemetryPoint]


class StoreReader(Protocol):
    """Reads points back; raises `BadStore`."""

    def runs(self) -> list[str]:
        """The names of the runs that have requests or steps, oldest first; "" is points without a run."""

    def points(self, measurement: str, run: str | None = None) -> list[TelemetryPoint]:
        """The points of a measurement, of all runs or one, in the order of time."""
