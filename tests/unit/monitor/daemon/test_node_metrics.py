"""What Prometheus is told of the node."""

from __future__ import annotations

from monitor.daemon.node_metrics import node_metrics
from monitor.points.points import TelemetryPoint
from tests.support.monitor.prometheus_text import parse_exposition, select_series, series_value


def test_what_is_measured_is_there_and_what_is_not_is_left_out() -> None:
    tags = {"node": "rack", "run": "r1"}
    points = [
        TelemetryPoint(
            "node", 1, tags, {"cpu": 0.25, "load": 2.0, "memory_used_bytes": 1 << 30, "memory_total_bytes": None}
        ),
        TelemetryPoint("gpu", 1, {**tags, "gpu": "0", "model": "H\n100"}, {"use": 0.5, "power_w": None}),
        TelemetryPoint("gpu", 1, {**tags, "gpu": "1", "model": "H\n100"}, {"use": 0.75, "power_w": 300.5}),
        TelemetryPoint("monitor", 1, tags, {"events": 7, "bad_events": 2, "points": 9, "waiting_points": 0}),
    ]
    series = parse_exposition(node_metrics(points))
    assert series_value(series, "sparse_node_cpu_ratio", node="rack") == 0.25
    assert series_value(series, "sparse_node_memory_used_bytes", node="rack") == 1 << 30
    assert series_value(series, "sparse_gpu_use_ratio", gpu="1") == 0.75
    assert [dict(labels)["gpu"] for labels in select_series(series, "sparse_gpu_power_watts")] == ["1"]
    assert series_value(series, "sparse_monitor_events_total") == 7
    assert series_value(series, "sparse_monitor_bad_events_total") == 2
    assert node_metrics([]) == ""
