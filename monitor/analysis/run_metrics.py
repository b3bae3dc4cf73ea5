"""The figures of one run, from its points alone: how fast, how late, where the time went, what it cost. Pure.

What `sparse bench` writes down and `sparse report` draws. Everything is over the `MeasurementWindow` that the warm-up leaves;
"for a sample" is for a result of inference, for a row of training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from monitor.analysis.counter_series import CounterSeries
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

# Of `monitor.points.schema`: what `compute_run_metrics` looks at.
MEASUREMENTS_READ = ("request", "hop", "task", "batch", "step", "link", "life", "process", "gpu", "power", "missing")
STAGE_TIMES = ("queue_ms", "decode_ms", "compute_ms", "encode_ms")
PERCENTILES = (50, 95, 99)
# Roles of processes that measure, and are no part of what is measured.
OBSERVER_ROLES = frozenset({"monitor", "bench"})
_POWER_SENSORS = ("gpu", "rapl", "jetson")


@dataclass(frozen=True, slots=True)
class StageTime:
    """What a stage took, in ms: a mean for a request of inference, for a step of training.

    Stages of one that trains compute at the same time, so these add up to more than a step takes.
    """

    queue_ms: float = 0.0
    decode_ms: float = 0.0
    compute_ms: float = 0.0
    encode_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.decode_ms + self.compute_ms + self.encode_ms


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """What a link carried for a sample, in bytes: from its first site to its second, and back."""

    bytes_out: float
    bytes_in: float


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """All of one run. None is what was not measured."""

    kind: RunKind
    samples: int  # results, or rows
    warm_up: int  # requests or steps that do not count
    failed: int  # requests of the window that ended without a result
    retries: int  # attempts after the first, of the same
    span_s: float  # the window; of training, what its steps took
    throughput_per_s: float  # samples
    latency_ms: Mapping[str, float]  # mean, p50, p95, p99: of a request, or of a step
    network_ms: float | None  # the mean part of a request's latency that no stage accounts for; None of training
    stages: Mapping[str, StageTime]  # in the order of the request's way
    links: Mapping[str, LinkBytes]  # by "device - cloud"
    cpu_s: Mapping[str, float]  # processor time for a sample, by the role of the process; none of what measures
    # Of the whole node for a sample, by sensor: "gpu 0", "rail package-0"; of rails, those that add up.
    energy_j: Mapping[str, float] | None
    energy_missing_reason: str  # why there is none, where there is none

    @property
    def total_cpu_s(self) -> float | None:
        """Processor time for a sample, of all roles but those that measure."""
        return sum(self.cpu_s.values()) if self.cpu_s else None


def compute_run_metrics(points: PointsByMeasurement, warm_up: int = 0) -> RunMetrics:
    """The figures of a run, from its points by measurement (those in `MEASUREMENTS_READ`).

    The first `warm_up` requests, or steps, do not count. Raises `NoSamples` where nothing is left.
    """
    window = select_window(points, warm_up)
    trains = window.kind == "training"
    done = window.succeeded
    samples = sum(round(number_or_zero(point, "rows")) for point in done) if trains else len(done)
    if not samples:  # steps of no rows
        raise NoSamples("rows", 0, 0, warm_up)
    took_ms = [number_or_zero(point, "step_ms" if trains else "latency_ms") for point in done]
    span_s = sum(took_ms) / 1000 if trains else window.span_s
    energy, missing = _energy(points, window, samples)
    return RunMetrics(
        kind=window.kind,
        samples=samples,
        warm_up=warm_up,
        failed=len(window.points) - len(done),
        retries=sum(max(0, round(number_or_zero(point, "attempts")) - 1) for point in window.points),
        span_s=span_s,
        throughput_per_s=samples / span_s if span_s else 0.0,
        latency_ms={"mean": _mean(took_ms), **percentiles(took_ms)},
        network_ms=None if trains else _mean([number_or_zero(point, "network_ms") for point in done]),
        stages=_stages(points, window),
        links=_links(points, window, samples),
        cpu_s=_cpu(points, window, samples),
        energy_j=energy,
        energy_missing_reason=missing,
    )


def percentiles(values: Collection[float]) -> dict[str, float]:
    """`p50`, `p95` and `p99`: values that were there, by the nearest rank; empty where there are none."""
    ordered = sorted(values)
    return {f"p{percent}": ordered[ceil(len(ordered) * percent / 100) - 1] for percent in PERCENTILES if ordered}


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _stages(points: PointsByMeasurement, window: MeasurementWindow) -> dict[str, StageTime]:
    """Mean times by stage: by the hops of the requests that count; of training, by its tasks in the window."""
    if window.kind == "training":
        found = [point for point in points.get("task", ()) if window.begin_ns < point.time_ns <= window.end_ns]
    else:
        ids = {point.fields.get("request") for point in window.succeeded}
        found = [point for point in points.get("hop", ()) if point.fields.get("request") in ids]
        found.sort(key=lambda point: number_or_zero(point, "place"))
    by_stage: dict[str, list[TelemetryPoint]] = defaultdict(list)
    for point in found:
        by_stage[point.tags["stage"]].append(point)
    count = len(window.succeeded)
    return {
        stage: StageTime(*(sum(number_or_zero(point, name) for point in own) / count for name in STAGE_TIMES))
        for stage, own in by_stage.items()
    }


def _links(points: PointsByMeasurement, window: MeasurementWindow, samples: int) -> dict[str, LinkBytes]:
    """What crossed each link in the window.

    A link carries nothing before the run's first request.
    """
    begun_ns = select_window(points).begin_ns
    by_link: dict[str, list[TelemetryPoint]] = defaultdict(list)
    for point in points.get("link", ()):
        if point.time_ns > begun_ns:
            by_link[f"{point.tags['from']} - {point.tags['to']}"].append(point)

    def crossed(own: list[TelemetryPoint], name: str) -> float:
        counter = CounterSeries(((begun_ns, 0.0), *((point.time_ns, number_or_zero(point, name)) for point in own)))
        return _grown(counter, window) / samples

    return {link: LinkBytes(crossed(own, "bytes_out"), crossed(own, "bytes_in")) for link, own in by_link.items()}


def _grown(carried: CounterSeries, window: MeasurementWindow) -> float:
    """What a link carried in the window.

    Of inference, up to what was seen first after its end: nothing but presence crosses then. Where one trains, the
    weights are fetched then: what crossed up to what was seen last before it, and as much in proportion for the rest.
    """
    begun = carried.value_at(window.begin_ns)
    inside = [entry for entry in carried.readings if window.begin_ns < entry[0] <= window.end_ns]
    if window.kind == "inference" or not inside:
        return carried.value_after(window.end_ns) - begun
    last_ns, value = inside[-1]
    return (value - begun) * (window.end_ns - window.begin_ns) / (last_ns - window.begin_ns)


def _cpu(points: PointsByMeasurement, window: MeasurementWindow, samples: int) -> dict[str, float]:
    """Processor time in the window by role; a process that began in the window counts from its beginning.

    One that was there before, and is first seen in it, has what is seen then from before.
    """
    born_ns = {
        (point.tags.get("role", ""), point.tags.get("name", ""), str(point.fields.get("pid"))): point.time_ns
        for point in points.get("life", ())
        if point.fields.get("event") == "start"
    }
    seen: dict[tuple[str, ...], list[tuple[int, float]]] = defaultdict(list)
    for point in points.get("process", ()):
        if point.fields.get("cpu_s") is not None and point.tags.get("role") not in OBSERVER_ROLES:
            which = tuple(point.tags.get(tag, "") for tag in ("role", "node", "name"))
            seen[*which, str(point.fields.get("pid"))].append((point.time_ns, number_or_zero(point, "cpu_s")))
    by_role: dict[str, float] = defaultdict(float)
    for (role, _, name, pid), own in seen.items():
        first_ns, first_s = own[0]
        started_ns = born_ns.get((role, name, pid), 0)
        if window.begin_ns < first_ns:
            own.insert(
                0, (min(started_ns, first_ns), 0.0) if started_ns > window.begin_ns else (window.begin_ns, first_s)
            )
        by_role[role] += CounterSeries(tuple(own)).increase(window.begin_ns, window.end_ns) / samples
    return dict(by_role)


def _energy(
    points: PointsByMeasurement, window: MeasurementWindow, samples: int
) -> tuple[dict[str, float] | None, str]:
    """Energy in the window by sensor, and why there is none; of a sample that the window cuts, its share."""
    by_sensor: dict[str, list[TelemetryPoint]] = defaultdict(list)
    for name, tag in (("gpu", "gpu"), ("power", "rail")):
        for point in points.get(name, ()):
            if point.fields.get("energy_j") is not None and is_additive(point.tags[tag]):
                by_sensor[f"{tag} {point.tags[tag]}"].append(point)
    if by_sensor:
        return {sensor: _joules(own, window) / samples for sensor, own in by_sensor.items()}, ""
    missing = [point for point in points.get("missing", ()) if point.tags["sensor"].startswith(_POWER_SENSORS)]
    reasons = {f"{point.tags['sensor']}: {point.fields.get('reason')}" for point in missing}
    return None, "; ".join(sorted(reasons)) or "no sensor said anything"


def _joules(own: list[TelemetryPoint], window: MeasurementWindow) -> float:
    """Each says the energy since the one before, so the first, of which nobody knows since when, is none."""
    total = 0.0
    for before, point in pairwise(own):
        length_ns = point.time_ns - before.time_ns
        inside_ns = min(point.time_ns, window.end_ns) - max(before.time_ns, window.begin_ns)
        if length_ns > 0 and inside_ns > 0:
            total += number_or_zero(point, "energy_j") * inside_ns / length_ns
    return total
