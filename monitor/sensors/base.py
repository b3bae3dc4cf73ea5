"""The interface of sensors, and their reports of values that cannot be measured."""

from __future__ import annotations

from typing import Protocol

from monitor.points.points import TelemetryPoint

_LIMIT = 256  # distinct reports: bounds the memory that reasons which are never the same twice may take


class Sensor(Protocol):
    """Measures one part of a node; used by one thread at a time.

    Its points lack the tags `node` and `run`, which `monitor.sensors.all` adds. A value that cannot be read is None, or
    its point is left out; it is never 0. Values that need two samples (energy, CPU share) are None in the first.
    """

    name: str

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """The points of one sample: `time_ns` is Unix time for the points, `now_s` monotonic time for differences."""
        ...

    def close(self) -> None:
        """Release all resources. May be called twice."""
        ...


class UnavailableSensors:
    """Reports each value that cannot be measured once for each reason."""

    def __init__(self) -> None:
        self._reported: set[tuple[str, str]] = set()

    def report_once(self, time_ns: int, sensor: str, reason: str) -> list[TelemetryPoint]:
        """A `missing` point, or nothing if this sensor and reason were reported before."""
        if (sensor, reason) in self._reported or len(self._reported) >= _LIMIT:
            return []
        self._reported.add((sensor, reason))
        return [TelemetryPoint("missing", time_ns, {"sensor": sensor}, {"reason": reason})]


def error_reason(error: Exception) -> str:
    """One line for an error, without file names, so that one failure of several files is reported once."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
