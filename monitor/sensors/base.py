"""The base class of sensors: reports of values that cannot be measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from monitor.points.points import TelemetryPoint

_REPORTS_LIMIT = 256  # bounds the memory that reasons which are never the same twice may take


class Sensor(ABC):
    """Measures one part of a node; used by one thread at a time.

    Its points lack the tags `node` and `run`, which `monitor.sensors.all` adds. A value that cannot be read is None or
    left out; it is never 0. Values that need two samples (energy, CPU share) are unknown in the first.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self._reported: set[tuple[str, str]] = set()

    @abstractmethod
    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """The points of one sample: `time_ns` is Unix time for the points, `now_s` monotonic time for differences."""

    def close(self) -> None:  # noqa: B027 - most sensors hold no resources
        """Release all resources. May be called twice."""

    def report_missing(self, time_ns: int, part: str, reason: str | Exception) -> list[TelemetryPoint]:
        """A `missing` point for a part of the sensor ("" for all of it), or nothing if it was reported before."""
        text = _format_error(reason) if isinstance(reason, Exception) else reason
        if (part, text) in self._reported or len(self._reported) >= _REPORTS_LIMIT:
            return []
        self._reported.add((part, text))
        sensor = f"{self.name}.{part}" if part else self.name
        return [TelemetryPoint("missing", time_ns, {"sensor": sensor}, {"reason": text})]


def _format_error(error: Exception) -> str:
    """One line without file names, so that one failure of several files is reported once."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
