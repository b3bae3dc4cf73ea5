"""The measured part of a run: its requests or training steps after the warm-up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from monitor.errors import NoSamples
from monitor.points.points import TelemetryPoint

# The points of one run by measurement, in the order of time; a measurement without points may be absent.
PointsByMeasurement = Mapping[str, Sequence[TelemetryPoint]]
RunKind = Literal["inference", "training"]

_NS_PER_S = 1e9
_NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class MeasurementWindow:
    """From the end of the warm-up's last request (or step) to the end of the run's last one.

    Without a warm-up it begins when the first request (or step) begins.
    """

    kind: RunKind
    begin_ns: int  # Unix time
    end_ns: int
    points: tuple[TelemetryPoint, ...]  # `request` or `step` points in the order of their ends
    warm_up: int  # number of requests or steps before the window

    @property
    def span_s(self) -> float:
        return (self.end_ns - self.begin_ns) / _NS_PER_S

    @property
    def succeeded(self) -> tuple[TelemetryPoint, ...]:
        """The requests that have a result; all steps of a training run."""
        return tuple(point for point in self.points if not point.fields.get("error"))


def select_window(points: PointsByMeasurement, warm_up: int = 0) -> MeasurementWindow:
    """The window of a run without its first `warm_up` requests (or steps); a run with steps is a training run.

    Raises `NoSamples` where the window has no request with a result.
    """
    kind: RunKind = "training" if points.get("step") else "inference"
    measurement, duration, unit = (
        ("step", "step_ms", "steps") if kind == "training" else ("request", "latency_ms", "requests")
    )
    ended = sorted(points.get(measurement, ()), key=lambda point: point.time_ns)
    measured = tuple(ended[warm_up:])
    if not ended:
        raise NoSamples(f"its telemetry has no {unit}", ended=0, warm_up=warm_up)
    if not measured:
        raise NoSamples(f"the warm-up of {warm_up} covers all {len(ended)} {unit}", ended=len(ended), warm_up=warm_up)
    if all(point.fields.get("error") for point in measured):
        problem = f"none of the {len(measured)} {unit} after the warm-up has a result"
        raise NoSamples(problem, ended=len(ended), measured=len(measured), warm_up=warm_up)
    if warm_up:
        begin_ns = ended[warm_up - 1].time_ns
    else:
        begin_ns = min(point.time_ns - round(number_or_zero(point, duration) * _NS_PER_MS) for point in ended)
    return MeasurementWindow(kind, begin_ns, measured[-1].time_ns, measured, warm_up)


def number_or_zero(point: TelemetryPoint, name: str) -> float:
    """A numeric field; 0.0 where it was not measured."""
    return float(cast(float, point.fields.get(name) or 0.0))
