"""What measures something of a node, and how it says that it cannot."""

from __future__ import annotations

from typing import Protocol

from monitor.points.points import TelemetryPoint

_LIMIT = 256  # reasons that one sensor gives: an end to what a reason that is never the same twice makes us hold


class Sensor(Protocol):
    """One kind of thing to measure. One thread at a time.

    Its points lack the tags `node` and `run`, which `monitor.sensors.all` adds. A value that cannot be read is None, or its
    point is not there; never 0. What is known of two samples only (energy, a share of time) is None in the first.
    """

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """What is measured now: `time_ns` is Unix time, for the points; `now_s` is monotonic, for differences."""
        ...

    def close(self) -> None:
        """Let go of what is held. May be called twice."""
        ...


class UnavailableSensors:
    """Tells of each thing that cannot be measured, and why, once: a reason that is new is told, too."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def report_once(self, time_ns: int, sensor: str, reason: str) -> list[TelemetryPoint]:
        """The point that says so; none if it was made before."""
        if (sensor, reason) in self._told or len(self._told) >= _LIMIT:
            return []
        self._told.add((sensor, reason))
        return [TelemetryPoint("missing", time_ns, {"sensor": sensor}, {"reason": reason})]


def error_reason(error: Exception) -> str:
    """An error's reason in a line: the same whatever the file was, so that it is told once."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
