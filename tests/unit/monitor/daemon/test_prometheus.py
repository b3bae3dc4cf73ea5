"""The monitor's metrics, rendered and parsed back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from brokers.dispatch.presence import REASON_LIMIT
from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from monitor.daemon import prometheus
from monitor.daemon.prometheus import (
    POINT_METRICS,
    SOURCES_SHOWN,
    WORKERS_SHOWN,
    MonitorCollector,
    render_metrics,
)
from monitor.points.points import TelemetryPoint
from monitor.presence.presence_table import TEXT_LIMIT_CHARACTERS, PresenceTable
from tests.support.brokers.presence_records import source_publication, worker_publication
from tests.support.environment.checkout import ROOT
from tests.support.monitor.prometheus_series import SeriesValues, parse_exposition, select_series, series_value
from tests.unit.monitor.presence.test_presence_table import apply_records


def render(table: PresenceTable, now_s: float = 0.0, *, connected: bool = True) -> str:
    return render_metrics(MonitorCollector(table, lambda: connected, clock=lambda: now_s)).decode()


def presence_series(table: PresenceTable, now_s: float = 0.0) -> SeriesValues:
    return parse_exposition(render(table, now_s))


def node_series(points: Sequence[TelemetryPoint]) -> SeriesValues:
    return parse_exposition(render_metrics(MonitorCollector(PresenceTable(), None, lambda: points)).decode())


def test_metrics_of_worker_are_its_record_with_durations_in_seconds() -> None:
    load: dict[str, Any] = {
        "queue": 4, "queue_ms": 250.0, "task_ms": 12.5, "busy": 0.75, "rate": 3.5,
        "done": 9, "failed": 8, "malformed": 7, "rejected": 6, "expired": 5,
    }  # fmt: skip
    record = worker_publication("w1", "body", site="cloud", node="rack", **load)
    series = presence_series(apply_records(PresenceTable(), record))
    labels = {"site": "cloud", "pipeline": "street", "stage": "body", "worker": "w1", "node": "rack"}
    values = {name: value for (name, key), value in series.items() if key == frozenset(labels.items())}
    assert values == {
        "sparse_worker_queue": 4, "sparse_worker_queue_seconds": 0.25, "sparse_worker_task_seconds": 0.0125,
        "sparse_worker_busy_ratio": 0.75, "sparse_worker_rate": 3.5, "sparse_worker_done_total": 9,
        "sparse_worker_failed_total": 8, "sparse_worker_malformed_total": 7, "sparse_worker_rejected_total": 6,
        "sparse_worker_expired_total": 5,
    }  # fmt: skip


def test_metrics_of_source_are_its_record_with_counts_by_reason() -> None:
    load: dict[str, Any] = {
        "requests": 20, "results": 11, "in_flight": 3, "waiting": 2, "window": 4, "rate": 1.5, "duplicates": 1,
        "latency_ms": {"p50": 200.0, "p99": 900.0}, "dropped": {"superseded": 7},
        "retries": {"WorkerLost": 5, "NoAnswer": 1}, "failed": {"PoisonRequest": 2},
    }  # fmt: skip
    series = presence_series(apply_records(PresenceTable(), source_publication("cam", **load)))
    labels = {"site": "local", "pipeline": "street", "source": "cam", "node": "here"}
    for name in ("in_flight", "waiting", "window", "rate"):
        assert series_value(series, f"sparse_source_{name}", **labels) == load[name]
    for name in ("requests", "results", "duplicates"):
        assert series_value(series, f"sparse_source_{name}_total", **labels) == load[name]
    for name in ("dropped", "retries", "failed"):
        for reason, count in load[name].items():
            assert series_value(series, f"sparse_source_{name}_total", **labels, reason=reason) == count
    assert series_value(series, "sparse_source_latency_seconds", **labels, quantile="0.5") == 0.2
    assert series_value(series, "sparse_source_latency_seconds", **labels, quantile="0.99") == 0.9


def test_workers_are_counted_by_stage_and_state_and_lost_ones_have_no_metrics() -> None:
    table = apply_records(PresenceTable(), worker_publication("old"), source_publication("old"))
    apply_records(table, worker_publication("a"), worker_publication("b", state="draining"), now_s=PRESENCE_TIMEOUT_S)
    apply_records(table, worker_publication("c", "tail", state="standby"), now_s=PRESENCE_TIMEOUT_S)
    series = presence_series(table, PRESENCE_TIMEOUT_S + 1)
    counts = {
        (dict(labels)["stage"], dict(labels)["state"]): value
        for labels, value in select_series(series, "sparse_workers", site="local", pipeline="street").items()
    }
    assert counts == {
        ("body", "up"): 1, ("body", "draining"): 1, ("body", "lost"): 1, ("tail", "up"): 0, ("tail", "standby"): 1,
    }  # fmt: skip
    assert {dict(labels)["worker"] for labels in select_series(series, "sparse_worker_queue")} == {"a", "b", "c"}
    assert not select_series(series, "sparse_source_requests_total")


@pytest.mark.parametrize(
    "node", ['a "quoted" one', "back\\slash", "two\nlines", "\\n", 'end\\"', "", "Küche 🍳", "\r\t"]
)
def test_any_text_in_a_label_is_escaped(node: str) -> None:
    table = apply_records(
        PresenceTable(), worker_publication("w1", node=node, queue=5), source_publication("cam", node=node)
    )
    series = presence_series(table)
    assert series_value(series, "sparse_worker_queue", worker="w1", node=node) == 5
    assert series_value(series, "sparse_source_window", source="cam", node=node) == 0


def test_record_on_foreign_topics_is_one_series() -> None:
    topic, record = worker_publication("w1", queue=1)
    foreign = [(topic.replace("/w1", "/w2"), record), (f"{topic}/x", record)]
    series = presence_series(apply_records(PresenceTable(), (topic, record), *foreign, (topic, record)))
    assert series_value(series, "sparse_worker_queue", worker="w1") == 1
    assert series_value(series, "sparse_monitor_refused_total") == 2


def test_number_of_workers_and_sources_on_page_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "WORKERS_SHOWN", 5)
    monkeypatch.setattr(prometheus, "SOURCES_SHOWN", 3)
    table = apply_records(PresenceTable(), worker_publication("real"), source_publication("real"))
    apply_records(table, *(worker_publication(f"fake{number}") for number in range(9)))
    apply_records(table, *(source_publication(f"fake{number}") for number in range(9)))
    series = presence_series(table)
    assert len(select_series(series, "sparse_worker_queue")) == 5
    assert len(select_series(series, "sparse_source_window")) == 3
    assert select_series(series, "sparse_worker_queue", worker="real")
    assert select_series(series, "sparse_source_window", source="real")
    assert series_value(series, "sparse_workers", state="up") == 10
    assert series_value(series, "sparse_monitor_hidden", kind="worker") == 10 - 5
    assert series_value(series, "sparse_monitor_hidden", kind="source") == 10 - 3


def test_largest_page_is_a_few_megabytes() -> None:
    """The longest names and the most reasons, times the number of workers and sources on a page."""
    reasons = {f"{number:064}": (1 << 53) - 1 for number in range(REASON_LIMIT)}
    name, node = "n" * 64, "\\" * TEXT_LIMIT_CHARACTERS
    places: dict[str, Any] = {"pipeline": name, "site": name, "node": node}
    worker = apply_records(PresenceTable(), worker_publication(name, name, **places))
    source = apply_records(PresenceTable(), source_publication(name, node=node, dropped=reasons, retries=reasons))
    worker_bytes, source_bytes = (len(render(table)) for table in (worker, source))
    assert WORKERS_SHOWN * worker_bytes + SOURCES_SHOWN * source_bytes < 20_000_000


@pytest.mark.parametrize("connected", [True, False])
def test_broker_connection_is_a_metric(connected: bool) -> None:
    series = parse_exposition(render(PresenceTable(), connected=connected))
    assert series_value(series, "sparse_broker_connected") == connected


def test_metrics_of_node_are_its_newest_points() -> None:
    tags = {"node": "rack", "run": "r1"}
    memory = {"memory_used_bytes": 1 << 30, "memory_total_bytes": None}
    points = [
        TelemetryPoint("node", 1, tags, {"cpu": 0.25, "load": 2.0, **memory}),
        TelemetryPoint("gpu", 1, {**tags, "gpu": "0", "model": "H\n100"}, {"use": 0.5, "power_w": None}),
        TelemetryPoint("gpu", 1, {**tags, "gpu": "1", "model": "H\n100"}, {"use": 0.75, "power_w": 300.5}),
        TelemetryPoint("monitor", 1, tags, {"events": 7, "bad_events": 2, "points": 9, "waiting_points": 0}),
    ]
    series = node_series(points)
    assert series_value(series, "sparse_node_cpu_ratio", node="rack") == 0.25
    assert series_value(series, "sparse_node_memory_used_bytes", node="rack") == 1 << 30
    assert series_value(series, "sparse_gpu_use_ratio", gpu="1", model="H\n100") == 0.75
    assert [dict(labels)["gpu"] for labels in select_series(series, "sparse_gpu_power_watts")] == ["1"]
    assert series_value(series, "sparse_monitor_events_total") == 7
    assert series_value(series, "sparse_monitor_bad_events_total") == 2


def test_node_without_a_broker_has_no_other_metrics() -> None:
    assert node_series([]) == {}


def test_documentation_lists_all_series() -> None:
    load: dict[str, Any] = {"dropped": {"a": 1}, "retries": {"a": 1}, "failed": {"a": 1}}
    table = apply_records(PresenceTable(), worker_publication(), source_publication("cam", **load))
    names = {name for name, _ in presence_series(table)} | set(POINT_METRICS)
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("## The monitor")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(sparse_\w+)`", section)) == names
