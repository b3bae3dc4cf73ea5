"""The base class of sensors: points of one sample, and reports of values that cannot be measured."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from monitor.points.points import FieldValue, TelemetryPoint

log = logging.getLogger(__name__)

_REPORTS_LIMIT = 256  # bounds the memory that reasons which are never the same twice may take

# Measurement, tags and fields of a point. Without the tags `node` and `run`, which `monitor.sensors.all` adds.
Reading = tuple[str, Mapping[str, str], Mapping[str, FieldValue]]


class Sensor(ABC):
    """Measures one part of a node; used by one thread at a time.

    A value that cannot be read is None or left out; it is never 0. Values that need two samples (energy, CPU share) are
    unknown in the first.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self._reported: set[tuple[str, str]] = set()

    @abstractmethod
    def measure(self, now_s: float) -> Iterator[Reading]:
        """The readings of one sample at monotonic time `now_s`."""

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """The points of one sample at Unix time `time_ns`; never raises."""
        readings: list[Reading] = []
        try:
            readings.extend(self.measure(now_s))
        except Exception as error:  # a bug in one sensor or driver must not cost the others' points
            missing = list(self.report_missing("", error))
            if missing:  # the first of many: a sensor that fails does so in each sample
                log.exception("the sensor %s failed", self.name)
            readings += missing
        return [TelemetryPoint(measurement, time_ns, tags, fields) for measurement, tags, fields in readings]

    def close(self) -> None:  # noqa: B027 - most sensors hold no resources
        """Release all resources. May be called twice."""

    def report_missing(self, part: str, reason: str | Exception) -> Iterator[Reading]:
        """A `missing` point for a part of the sensor ("" for all of it), unless it was reported before."""
        text = _format_error(reason) if isinstance(reason, Exception) else reason
        if (part, text) not in self._reported and len(self._reported) < _REPORTS_LIMIT:
            self._reported.add((part, text))
            yield "missing", {"sensor": f"{self.name}.{part}" if part else self.name}, {"reason": text}


def _format_error(error: Exception) -> str:
    """One line without file names, so that one failure of several files is reported once."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def read_text(path: Path) -> str:
    """The text of a kernel's file without padding; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def read_number(path: Path) -> int | None:
    """The number in a kernel's file; None if it cannot be read or holds a word."""
    text = read_text(path)
    return int(text) if text.isdecimal() else None
