"""What Prometheus is told of the node and of its monitor: few figures, since a node exporter has the others. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from monitor.daemon.exposition import MetricFamily, MetricType, render_exposition
from monitor.points.points import TelemetryPoint


class _NodeMetric(NamedTuple):
    measurement: str
    field: str
    name: str
    kind: MetricType
    about: str


_FIGURES = (
    _NodeMetric("node", "cpu", "sparse_node_cpu_ratio", "gauge", "Share of all cores' time that was spent."),
    _NodeMetric("node", "memory_used_bytes", "sparse_node_memory_used_bytes", "gauge", "Memory that is taken."),
    _NodeMetric("gpu", "use", "sparse_gpu_use_ratio", "gauge", "Share of the time in which a GPU computed."),
    _NodeMetric("gpu", "memory_used_bytes", "sparse_gpu_memory_used_bytes", "gauge", "Memory of a GPU that is taken."),
    _NodeMetric("gpu", "power_w", "sparse_gpu_power_watts", "gauge", "What a GPU draws."),
    _NodeMetric("monitor", "events", "sparse_monitor_events_total", "counter", "Events that were heard."),
    _NodeMetric("monitor", "bad_events", "sparse_monitor_bad_events_total", "counter", "Lines that were no event."),
    _NodeMetric("monitor", "dropped_events", "sparse_monitor_dropped_events_total", "counter", "Events without room."),
    _NodeMetric("monitor", "points", "sparse_monitor_points_total", "counter", "Points that were made."),
    _NodeMetric("monitor", "waiting_points", "sparse_monitor_waiting_points", "gauge", "Points no store has yet."),
    _NodeMetric("monitor", "dropped_points", "sparse_monitor_dropped_points_total", "counter", "Points without room."),
)
_LABELS = ("node", "gpu", "model")


def node_metrics(points: Sequence[TelemetryPoint]) -> str:
    """The part of the page that is of the node; what was not measured is not there."""
    return render_exposition(_families(points))


def _families(points: Sequence[TelemetryPoint]) -> Iterable[MetricFamily]:
    for figure in _FIGURES:
        family = MetricFamily(figure.name, figure.kind, figure.about)
        for point in points:
            value = point.fields.get(figure.field) if point.measurement == figure.measurement else None
            if isinstance(value, float | int):
                family.add(value, {name: point.tags[name] for name in _LABELS if name in point.tags})
        yield family
