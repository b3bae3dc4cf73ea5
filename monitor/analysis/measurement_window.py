"""What of a run counts: its requests or steps after the warm-up, and the time they took. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from monitor.errors import NoSamples
from monitor.points.points import TelemetryPoint

# What a `Reader` gives, by the name of the measurement; those that are not there have no points.
PointsByMeasurement = Mapping[str, Sequence[TelemetryPoint]]
RunKind = Literal["inference", "training"]

_NS = 1e9
_NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class MeasurementWindow:
    """The measured part of a run.

    It begins when the last request (or step) of the warm-up ends; without a warm-up, when the first is asked. It ends
    with the last one.
    """

    kind: RunKind
    begin_ns: int  # Unix time
    end_ns: int
    points: tuple[TelemetryPoint, ...]  # `request` or `step` points, as they ended
    warm_up: int  # requests or steps before them

    @property
    def span_s(self) -> float:
        return (self.end_ns - self.begin_ns) / _NS

    @property
    def succeeded(self) -> tuple[TelemetryPoint, ...]:
        """Those of `counted` that have a result; of training, all."""
        return tuple(point for point in self.points if not point.fields.get("error"))


def select_window(points: PointsByMeasurement, warm_up: int = 0) -> MeasurementWindow:
    """What counts of a run, whose `warm_up` first requests (or steps) do not.

    A run that has steps is one of training. Raises `NoSamples` where nothing is left, or nothing that has a result.
    """
    kind: RunKind = "training" if points.get("step") else "inference"
    length = "step_ms" if kind == "training" else "latency_ms"
    ended = sorted(points.get("step" if kind == "training" else "request", ()), key=lambda point: point.time_ns)
    counted = tuple(ended[warm_up:])
    if not any(not point.fields.get("error") for point in counted):
        raise NoSamples("steps" if kind == "training" else "requests", len(ended), len(counted), warm_up)
    begin_ns = ended[warm_up - 1].time_ns if warm_up else _first_asked(ended, length)
    return MeasurementWindow(kind, begin_ns, counted[-1].time_ns, counted, warm_up)


def _first_asked(ended: Iterable[TelemetryPoint], length: str) -> int:
    return min(point.time_ns - round(number_or_zero(point, length) * _NS_PER_MS) for point in ended)


def number_or_zero(point: TelemetryPoint, name: str) -> float:
    """A field as a number; 0 where it was not measured."""
    return float(cast(float, point.fields.get(name) or 0.0))
