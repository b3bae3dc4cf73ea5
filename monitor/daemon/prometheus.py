"""The monitor's Prometheus metrics: presence records of workers and sources, the node, and the monitor itself.

Durations are in seconds; names follow Prometheus' conventions and otherwise docs/protocol.md. A worker or source that
is lost has no metrics of its own, since its last record may be old.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from brokers.dispatch.presence import SourceRecord, WorkerRecord
from monitor.points.points import TelemetryPoint
from monitor.presence.presence_table import PresenceTable, StageKey, stage_key

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4  # of `render_metrics`
# The workers and sources with metrics of their own, oldest first: a client that invents records can fill neither the
# page nor its reader's memory. `sparse_workers` counts all.
WORKERS_SHOWN = 1024
SOURCES_SHOWN = 128


class _LoadMetric(NamedTuple):
    """A metric of the `load` of a presence record."""

    name: str
    documentation: str
    value: Callable[[Any], float]


_WORKER_METRICS = (
    _LoadMetric("sparse_worker_queue", "Tasks waiting.", lambda load: load.queue),
    _LoadMetric("sparse_worker_queue_seconds", "Time that tasks wait.", lambda load: _seconds(load.queue_ms)),
    _LoadMetric("sparse_worker_task_seconds", "Time that a task takes.", lambda load: _seconds(load.task_ms)),
    _LoadMetric("sparse_worker_busy_ratio", "Share of the last second spent computing.", lambda load: load.busy),
    _LoadMetric("sparse_worker_rate", "Tasks finished in the last second.", lambda load: load.rate),
    _LoadMetric("sparse_worker_done_total", "Tasks finished.", lambda load: load.done),
    _LoadMetric("sparse_worker_failed_total", "Tasks answered with a failure.", lambda load: load.failed),
    _LoadMetric("sparse_worker_malformed_total", "Messages that break the protocol.", lambda load: load.malformed),
    _LoadMetric("sparse_worker_rejected_total", "Tasks returned when full or leaving.", lambda load: load.rejected),
    _LoadMetric("sparse_worker_expired_total", "Tasks dropped after their deadline.", lambda load: load.expired),
)
_SOURCE_METRICS = (
    _LoadMetric("sparse_source_requests_total", "Requests made.", lambda load: load.requests),
    _LoadMetric("sparse_source_results_total", "Requests with a result.", lambda load: load.results),
    _LoadMetric("sparse_source_duplicates_total", "Duplicate results dropped.", lambda load: load.duplicates),
    _LoadMetric("sparse_source_in_flight", "Requests sent and not yet answered.", lambda load: load.in_flight),
    _LoadMetric("sparse_source_waiting", "Requests waiting for a slot of the window.", lambda load: load.waiting),
    _LoadMetric("sparse_source_window", "Size of the in-flight window.", lambda load: load.window),
    _LoadMetric("sparse_source_rate", "Recent results per second.", lambda load: load.rate),
)
_REASON_COUNTERS = (
    ("retries", "Attempts after the first, by the reason of the previous one's end."),
    ("dropped", "Samples dropped before they became requests, by reason."),
    ("failed", "Requests that ended without a result, by error."),
)


class _PointMetric(NamedTuple):
    """A metric of a field of the newest points of a measurement."""

    measurement: str
    field: str
    name: str
    documentation: str
    labels: tuple[str, ...] = ("node",)


_GPU_LABELS = ("node", "gpu", "model")
POINT_METRICS = (
    _PointMetric("node", "cpu", "sparse_node_cpu_ratio", "Share of the CPU time of all cores in use."),
    _PointMetric("node", "memory_used_bytes", "sparse_node_memory_used_bytes", "Memory in use."),
    _PointMetric("gpu", "use", "sparse_gpu_use_ratio", "Share of the time in which the GPU computes.", _GPU_LABELS),
    _PointMetric("gpu", "memory_used_bytes", "sparse_gpu_memory_used_bytes", "GPU memory in use.", _GPU_LABELS),
    _PointMetric("gpu", "power_w", "sparse_gpu_power_watts", "Power of the GPU.", _GPU_LABELS),
    _PointMetric("monitor", "events", "sparse_monitor_events_total", "Events received."),
    _PointMetric("monitor", "bad_events", "sparse_monitor_bad_events_total", "Lines that are not a valid event."),
    _PointMetric("monitor", "dropped_events", "sparse_monitor_dropped_events_total", "Events dropped: buffer full."),
    _PointMetric("monitor", "points", "sparse_monitor_points_total", "Points made."),
    _PointMetric("monitor", "waiting_points", "sparse_monitor_waiting_points", "Points not yet stored."),
    _PointMetric("monitor", "dropped_points", "sparse_monitor_dropped_points_total", "Points lost."),
)


@dataclass(eq=False, slots=True)  # a registry identifies collectors by their hash
class MonitorCollector(Collector):
    """Collects all metrics at each scrape.

    `is_connected` is None where no broker is watched; `latest_points` returns the newest points of the node.
    """

    presence: PresenceTable
    is_connected: Callable[[], bool] | None = None
    latest_points: Callable[[], Sequence[TelemetryPoint]] = tuple
    clock: Callable[[], float] = time.monotonic

    def collect(self) -> Iterator[Metric]:
        """All metric families, in the order of the page."""
        if self.is_connected is not None:
            documentation = "Whether the monitor is connected to the broker."
            yield GaugeMetricFamily("sparse_broker_connected", documentation, value=int(self.is_connected()))
            now_s = self.clock()
            yield from self._totals(now_s)
            yield from _worker_families(self.presence.live_workers(now_s)[:WORKERS_SHOWN])
            yield from _source_families(self.presence.live_sources(now_s)[:SOURCES_SHOWN])
        yield from _point_families(self.latest_points())

    def _totals(self, now_s: float) -> Iterator[Metric]:
        by_stage = self.presence.live_workers_by_stage(now_s)
        counts: Counter[tuple[StageKey, str]] = Counter({(key, "up"): 0 for key in by_stage})
        counts.update((key, record.state) for key, records in by_stage.items() for record in records)
        counts.update((stage_key(record), "lost") for record in self.presence.lost_workers(now_s))
        workers = _family("sparse_workers", "Workers of a stage, by state.", (*StageKey._fields, "state"))
        for (key, state), count in counts.items():
            workers.add_metric((*key, state), count)
        yield workers
        hidden = _family("sparse_monitor_hidden", "Workers and sources beyond the limits of this page.", ("kind",))
        hidden.add_metric(("worker",), max(0, len(self.presence.live_workers(now_s)) - WORKERS_SHOWN))
        hidden.add_metric(("source",), max(0, len(self.presence.live_sources(now_s)) - SOURCES_SHOWN))
        yield hidden
        documentation = "Presence records that were rejected."
        yield CounterMetricFamily("sparse_monitor_refused_total", documentation, value=self.presence.rejected)


def render_metrics(collector: MonitorCollector) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()  # not the global one, which has metrics of the Python process
    registry.register(collector)
    return generate_latest(registry)


def _family(name: str, documentation: str, labels: Sequence[str]) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(name, documentation, labels=labels)


def _worker_families(records: Sequence[WorkerRecord]) -> Iterator[Metric]:
    labels = ("site", "pipeline", "stage", "worker", "node")
    for metric in _WORKER_METRICS:
        family = _family(metric.name, metric.documentation, labels)
        for record in records:
            family.add_metric(_values(record, labels), metric.value(record.load))
        yield family


def _source_families(records: Sequence[SourceRecord]) -> Iterator[Metric]:
    labels = ("site", "pipeline", "source", "node")
    for metric in _SOURCE_METRICS:
        family = _family(metric.name, metric.documentation, labels)
        for record in records:
            family.add_metric(_values(record, labels), metric.value(record.load))
        yield family
    latency = _family("sparse_source_latency_seconds", "Latency of the newest results.", (*labels, "quantile"))
    for record in records:
        for quantile, latency_ms in (("0.5", record.load.latency_ms.p50), ("0.99", record.load.latency_ms.p99)):
            latency.add_metric((*_values(record, labels), quantile), _seconds(latency_ms))
    yield latency
    for name, documentation in _REASON_COUNTERS:
        family = _family(f"sparse_source_{name}_total", documentation, (*labels, "reason"))
        for record in records:
            counts: Mapping[str, int] = getattr(record.load, name)
            for reason, count in counts.items():
                family.add_metric((*_values(record, labels), reason), count)
        yield family


def _point_families(points: Iterable[TelemetryPoint]) -> Iterator[Metric]:
    """A family for each metric that was measured."""
    for metric in POINT_METRICS:
        family = _family(metric.name, metric.documentation, metric.labels)
        for point in points:
            value = point.fields.get(metric.field) if point.measurement == metric.measurement else None
            if isinstance(value, float | int):
                family.add_metric([point.tags[label] for label in metric.labels], value)
        if family.samples:
            yield family


def _values(record: WorkerRecord | SourceRecord, labels: Sequence[str]) -> list[str]:
    return [getattr(record, label) for label in labels]


def _seconds(duration_ms: float) -> float:
    return round(duration_ms / 1000, 6)
