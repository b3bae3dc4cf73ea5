"""The metrics of one run, computed from its points: throughput, latency, time by stage, traffic, CPU time, energy.

`sparse bench` records them and `sparse report` shows them. All are of the run's `MeasurementWindow`; "per sample" is
per result for inference and per row for training.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from brokers.protocol.stage_timing import STAGE_DURATIONS
from brokers.telemetry.percentiles import percentiles
from monitor.analysis.measurement_window import (
    MeasurementWindow,
    PointsByMeasurement,
    RunKind,
    number_or_zero,
    select_window,
)
from monitor.errors import NoSamples
from monitor.points.points import TelemetryPoint
from monitor.sensors.counters import is_additive

# The measurements of `monitor.points.schema` that `compute_run_metrics` uses.
METRIC_INPUTS = ("request", "hop", "task", "batch", "step", "link", "lifecycle", "process", "gpu", "power", "missing")
# Processes that measure: their CPU time is no cost of the pipeline.
OBSERVER_ROLES = frozenset({"monitor", "bench"})
_POWER_SENSORS = ("gpu", "rapl", "jetson")


@dataclass(frozen=True, slots=True)
class StageTime:
    """Mean times of a stage per request (inference) or per step (training), in milliseconds.

    In training the stages compute at the same time, so their sum exceeds the duration of a step.
    """

    queue_ms: float = 0.0
    decode_ms: float = 0.0
    compute_ms: float = 0.0
    encode_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """Bytes per sample on a link: from its first site to its second, and back."""

    bytes_out: float
    bytes_in: float


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """The metrics of one run; None where something was not measured."""

    kind: RunKind
    samples: int  # results, or rows
    warm_up: int  # requests or steps before the window
    failed: int  # requests of the window without a result
    retries: int  # attempts after the first, of the window's requests
    span_s: float  # of the window; for training, the sum of its steps' durations
    throughput_per_s: float  # samples per second
    latency_ms: Mapping[str, float]  # mean, p50, p95, p99 of the requests or steps
    network_ms: float | None  # mean part of the latency spent outside the stages; None for training
    stages: Mapping[str, StageTime]  # in the order of the request's path
    links: Mapping[str, LinkBytes]  # by "device - cloud"
    cpu_s: Mapping[str, float]  # CPU time per sample, by the role of the process; without `OBSERVER_ROLES`
    energy_j: Mapping[str, float] | None  # of the node per sample, by additive sensor: "gpu 0", "rail package-0"
    energy_missing_reason: str  # empty where there is energy


@dataclass(frozen=True, slots=True)
class MedianRange:
    """Repeated measurements of one metric: median, smallest and largest of `count`."""

    median: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> MedianRange:
        """Raises `ValueError` where there are no values."""
        return cls(median(values), min(values), max(values), len(values))

    @property
    def bounds(self) -> tuple[float, float] | tuple[None, None]:
        """The range; (None, None) for a single measurement, which has none."""
        return (self.minimum, self.maximum) if self.count > 1 else (None, None)


@dataclass(frozen=True, slots=True)
class CounterSeries:
    """Readings of a monotonic counter: at least one (time, value), in the order of time."""

    readings: tuple[tuple[float, float], ...]

    def value_at(self, time: float) -> float:
        """The value, interpolated linearly; the first reading's before it, the last one's after it."""
        after = bisect_right(self.readings, time, key=lambda reading: reading[0])
        if after in (0, len(self.readings)):
            return self.readings[min(after, len(self.readings) - 1)][1]
        (begin, first), (end, last) = self.readings[after - 1], self.readings[after]
        return first + (last - first) * (time - begin) / (end - begin)

    def value_after(self, time: float) -> float:
        """The first reading at `time` or later; without one, the last."""
        return next((value for read_at, value in self.readings if read_at >= time), self.readings[-1][1])

    def increase(self, begin: float, end: float) -> float:
        """By how much the counter grows from `begin` to `end`."""
        return self.value_at(end) - self.value_at(begin)


def compute_run_metrics(points: PointsByMeasurement, warm_up: int = 0) -> RunMetrics:
    """The metrics of a run without its first `warm_up` requests or steps.

    `points` holds the measurements in `METRIC_INPUTS`. Raises `NoSamples`.
    """
    window = select_window(points, warm_up)
    trains = window.kind == "training"
    succeeded = window.succeeded
    samples = sum(round(number_or_zero(point, "rows")) for point in succeeded) if trains else len(succeeded)
    if not samples:
        raise NoSamples("its steps have no rows", warm_up=warm_up)
    durations_ms = [number_or_zero(point, "step_ms" if trains else "latency_ms") for point in succeeded]
    span_s = sum(durations_ms) / 1000 if trains else window.span_s
    energy_j, energy_missing_reason = _energy(points, window, samples)
    return RunMetrics(
        kind=window.kind,
        samples=samples,
        warm_up=warm_up,
        failed=len(window.points) - len(succeeded),
        retries=sum(max(0, round(number_or_zero(point, "attempts")) - 1) for point in window.points),
        span_s=span_s,
        throughput_per_s=samples / span_s if span_s else 0.0,
        latency_ms={"mean": fmean(durations_ms), **percentiles(durations_ms)},
        network_ms=None if trains else fmean([number_or_zero(point, "network_ms") for point in succeeded]),
        stages=_stages(points, window),
        links=_links(points, window, samples),
        cpu_s=_cpu(points, window, samples),
        energy_j=energy_j,
        energy_missing_reason=energy_missing_reason,
    )


def _stages(points: PointsByMeasurement, window: MeasurementWindow) -> dict[str, StageTime]:
    """Mean times by stage: from the hops of the measured requests, or the tasks in the window of a training run."""
    if window.kind == "training":
        tasks = [point for point in points.get("task", ()) if window.begin_ns < point.time_ns <= window.end_ns]
    else:
        ids = {point.fields.get("request") for point in window.succeeded}
        tasks = [point for point in points.get("hop", ()) if point.fields.get("request") in ids]
        tasks.sort(key=lambda point: number_or_zero(point, "place"))
    by_stage: dict[str, list[TelemetryPoint]] = defaultdict(list)
    for point in tasks:
        by_stage[point.tags["stage"]].append(point)
    count = len(window.succeeded)
    return {
        stage: StageTime(
            *(sum(number_or_zero(point, name) for point in stage_tasks) / count for name in STAGE_DURATIONS)
        )
        for stage, stage_tasks in by_stage.items()
    }


def _links(points: PointsByMeasurement, window: MeasurementWindow, samples: int) -> dict[str, LinkBytes]:
    run_begin_ns = select_window(points).begin_ns  # a link carries nothing before the run's first request
    by_link: dict[str, list[TelemetryPoint]] = defaultdict(list)
    for point in points.get("link", ()):
        if point.time_ns > run_begin_ns:
            by_link[f"{point.tags['from']} - {point.tags['to']}"].append(point)

    def per_sample(readings: Sequence[TelemetryPoint], name: str) -> float:
        values = [(point.time_ns, number_or_zero(point, name)) for point in readings]
        return _link_increase(CounterSeries(((run_begin_ns, 0.0), *values)), window) / samples

    return {
        link: LinkBytes(per_sample(readings, "bytes_out"), per_sample(readings, "bytes_in"))
        for link, readings in by_link.items()
    }


def _link_increase(carried: CounterSeries, window: MeasurementWindow) -> float:
    """The bytes that a link carried in the window.

    For inference up to the first reading after the window, since only presence records follow. After training the
    weights are fetched: there the last reading inside the window is extrapolated to its end.
    """
    begin = carried.value_at(window.begin_ns)
    inside = [reading for reading in carried.readings if window.begin_ns < reading[0] <= window.end_ns]
    if window.kind == "inference" or not inside:
        return carried.value_after(window.end_ns) - begin
    last_ns, value = inside[-1]
    return (value - begin) * (window.end_ns - window.begin_ns) / (last_ns - window.begin_ns)


def _cpu(points: PointsByMeasurement, window: MeasurementWindow, samples: int) -> dict[str, float]:
    """CPU time in the window by role.

    A process that starts in the window counts from its start. One that is older and has its first sample in the window
    had that CPU time before the window.
    """
    started_ns = {
        (point.tags.get("role", ""), point.tags.get("name", ""), str(point.fields.get("pid"))): point.time_ns
        for point in points.get("lifecycle", ())
        if point.fields.get("event") == "start"
    }
    by_process: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    for point in points.get("process", ()):
        if point.fields.get("cpu_s") is not None and point.tags.get("role") not in OBSERVER_ROLES:
            process = tuple(point.tags.get(tag, "") for tag in ("role", "node", "name"))
            by_process[*process, str(point.fields.get("pid"))].append((point.time_ns, number_or_zero(point, "cpu_s")))
    by_role: dict[str, float] = defaultdict(float)
    for (role, _, name, pid), readings in by_process.items():
        first_ns, first_s = readings[0]
        start_ns = started_ns.get((role, name, pid), 0)
        if first_ns > window.begin_ns:
            started_inside = start_ns > window.begin_ns
            readings.insert(0, (min(start_ns, first_ns), 0.0) if started_inside else (window.begin_ns, first_s))
        by_role[role] += CounterSeries(tuple(readings)).increase(window.begin_ns, window.end_ns) / samples
    return dict(by_role)


def _energy(
    points: PointsByMeasurement, window: MeasurementWindow, samples: int
) -> tuple[dict[str, float] | None, str]:
    """Energy per sample by sensor, or None with the reasons."""
    by_sensor: dict[str, list[TelemetryPoint]] = defaultdict(list)
    for name, tag in (("gpu", "gpu"), ("power", "rail")):
        for point in points.get(name, ()):
            if point.fields.get("energy_j") is not None and is_additive(point.tags[tag]):
                by_sensor[f"{tag} {point.tags[tag]}"].append(point)
    if by_sensor:
        return {sensor: _joules(readings, window) / samples for sensor, readings in by_sensor.items()}, ""
    missing = [point for point in points.get("missing", ()) if point.tags["sensor"].startswith(_POWER_SENSORS)]
    reasons = {f"{point.tags['sensor']}: {point.fields.get('reason')}" for point in missing}
    return None, "; ".join(sorted(reasons)) or "no power sensor reported"


def _joules(readings: Sequence[TelemetryPoint], window: MeasurementWindow) -> float:
    """Energy in the window: each reading is the energy since the previous one, counted by its share in the window.

    The first reading has no known beginning and is left out.
    """
    total = 0.0
    for previous, point in pairwise(readings):
        length_ns = point.time_ns - previous.time_ns
        inside_ns = min(point.time_ns, window.end_ns) - max(previous.time_ns, window.begin_ns)
        if length_ns > 0 and inside_ns > 0:
            total += number_or_zero(point, "energy_j") * inside_ns / length_ns
    return total
