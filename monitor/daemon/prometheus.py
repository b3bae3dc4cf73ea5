"""The monitor's Prometheus metrics: presence records of workers and sources, the node, and the monitor itself.

Durations are in seconds; names follow Prometheus' conventions and otherwise docs/protocol.md. A worker or source that
is lost has no metrics, since its last record may be old.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from brokers.dispatch.presence import SourceRecord, WorkerRecord
from monitor.points.points import TelemetryPoint
from monitor.points.schema import MEASUREMENTS
from monitor.presence.presence_table import PresenceTable, StageKey, stage_key

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4  # of `render_metrics`
# The workers and sources that have metrics, oldest first: a client that invents records can fill neither the
# page nor its reader's memory. `sparse_workers` counts all.
WORKERS_SHOWN = 1024
SOURCES_SHOWN = 128

_WORKER_LABELS = ("site", "pipeline", "stage", "worker", "node")
_SOURCE_LABELS = ("site", "pipeline", "source", "node")
# Metrics by name, each with its field of the measurement `stage` or `source`, or with a measurement and a field.
_WORKER_METRICS = {
    "sparse_worker_queue": "queue",
    "sparse_worker_queue_seconds": "queue_ms",
    "sparse_worker_task_seconds": "task_ms",
    "sparse_worker_busy_ratio": "busy",
    "sparse_worker_rate": "rate",
    "sparse_worker_done_total": "done",
    "sparse_worker_failed_total": "failed",
    "sparse_worker_malformed_total": "malformed",
    "sparse_worker_rejected_total": "rejected",
    "sparse_worker_expired_total": "expired",
}
_SOURCE_METRICS = {
    "sparse_source_requests_total": "requests",
    "sparse_source_results_total": "results",
    "sparse_source_duplicates_total": "duplicates",
    "sparse_source_in_flight": "in_flight",
    "sparse_source_waiting": "waiting",
    "sparse_source_window": "window",
    "sparse_source_rate": "rate",
}
_SOURCE_METRICS_BY_REASON = {
    "sparse_source_retries_total": "retries",
    "sparse_source_dropped_total": "dropped",
    "sparse_source_failed_total": "failed",
}
POINT_METRICS = {
    "sparse_node_cpu_ratio": ("node", "cpu"),
    "sparse_node_memory_used_bytes": ("node", "memory_used_bytes"),
    "sparse_gpu_use_ratio": ("gpu", "use"),
    "sparse_gpu_memory_used_bytes": ("gpu", "memory_used_bytes"),
    "sparse_gpu_power_watts": ("gpu", "power_w"),
    "sparse_monitor_events_total": ("monitor", "events"),
    "sparse_monitor_bad_events_total": ("monitor", "bad_events"),
    "sparse_monitor_dropped_events_total": ("monitor", "dropped_events"),
    "sparse_monitor_points_total": ("monitor", "points"),
    "sparse_monitor_waiting_points": ("monitor", "waiting_points"),
    "sparse_monitor_dropped_points_total": ("monitor", "dropped_points"),
}


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
            connected = [((), int(self.is_connected()))]
            yield _family("sparse_broker_connected", "whether the monitor is connected to the broker", (), connected)
            yield from self._presence_families(self.clock())
        yield from _point_families(self.latest_points())

    def _presence_families(self, now_s: float) -> Iterator[Metric]:
        by_stage = self.presence.live_workers_by_stage(now_s)
        counts: Counter[tuple[str, ...]] = Counter({(*key, "up"): 0 for key in by_stage})
        counts.update((*key, record.state) for key, records in by_stage.items() for record in records)
        counts.update((*stage_key(record), "lost") for record in self.presence.lost_workers(now_s))
        yield _family("sparse_workers", "workers of a stage, by state", (*StageKey._fields, "state"), counts.items())
        workers = self.presence.live_workers(now_s)
        sources = self.presence.live_sources(now_s)
        hidden = [(("worker",), len(workers[WORKERS_SHOWN:])), (("source",), len(sources[SOURCES_SHOWN:]))]
        yield _family("sparse_monitor_hidden", "workers and sources beyond the limits of this page", ("kind",), hidden)
        rejected = [((), self.presence.rejected)]
        yield _family("sparse_monitor_refused_total", "presence records that were rejected", (), rejected)
        yield from _load_families("stage", _WORKER_METRICS, _WORKER_LABELS, workers[:WORKERS_SHOWN])
        yield from _load_families("source", _SOURCE_METRICS, _SOURCE_LABELS, sources[:SOURCES_SHOWN])
        yield from _latency_and_reason_families(sources[:SOURCES_SHOWN])


def render_metrics(collector: MonitorCollector) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()  # not the global one, which has metrics of the Python process
    registry.register(collector)
    return generate_latest(registry)


def _load_families(
    measurement: str,
    metrics: Mapping[str, str],
    labels: Sequence[str],
    records: Sequence[WorkerRecord] | Sequence[SourceRecord],
) -> Iterator[Metric]:
    """Metrics of fields of the `load` of each record."""
    for name, field in metrics.items():
        scale = _seconds if field.endswith("_ms") else float
        values = [(_label_values(record, labels), scale(getattr(record.load, field))) for record in records]
        yield _family(name, _describe(measurement, field), labels, values)


def _latency_and_reason_families(records: Sequence[SourceRecord]) -> Iterator[Metric]:
    sources = [(_label_values(record, _SOURCE_LABELS), record.load) for record in records]
    latencies = [
        ((*source, quantile), _seconds(latency_ms))
        for source, load in sources
        for quantile, latency_ms in (("0.5", load.latency_ms.p50), ("0.99", load.latency_ms.p99))
    ]
    documentation = "latency of the newest results"
    yield _family("sparse_source_latency_seconds", documentation, (*_SOURCE_LABELS, "quantile"), latencies)
    for name, field in _SOURCE_METRICS_BY_REASON.items():
        counts = [
            ((*source, reason), count) for source, load in sources for reason, count in getattr(load, field).items()
        ]
        yield _family(name, f"{_describe('source', field)}, by reason", (*_SOURCE_LABELS, "reason"), counts)


def _point_families(points: Iterable[TelemetryPoint]) -> Iterator[Metric]:
    """A family for each metric that was measured."""
    for name, (measurement, field) in POINT_METRICS.items():
        labels = ("node", "gpu", "model") if measurement == "gpu" else ("node",)
        values = [
            (tuple(point.tags[label] for label in labels), value)
            for point in points
            if point.measurement == measurement and isinstance(value := point.fields.get(field), float | int)
        ]
        if values:
            yield _family(name, _describe(measurement, field), labels, values)


def _family(
    name: str, documentation: str, labels: Sequence[str], values: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    """A family with a value for each combination of labels."""
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family: CounterMetricFamily | GaugeMetricFamily = kind(name, documentation, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def _describe(measurement: str, field: str) -> str:
    """The schema's description of a field."""
    return next(each.description for each in MEASUREMENTS[measurement].fields if each.name == field)


def _label_values(record: WorkerRecord | SourceRecord, labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(getattr(record, label) for label in labels)


def _seconds(duration_ms: float) -> float:
    return round(duration_ms / 1000, 6)
