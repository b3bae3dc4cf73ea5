"""What Prometheus is told, read back by a reader of its own."""

from __future__ import annotations

import re
from typing import Any

import pytest

from brokers.dispatch.presence import REASON_LIMIT
from brokers.dispatch.worker_registry import ENTRY_LIMIT, PRESENCE_TIMEOUT_S
from monitor.daemon.exposition import MetricFamily, render_exposition
from monitor.daemon.node_metrics import _FIGURES
from monitor.daemon.prometheus import SOURCES_SHOWN, WORKERS_SHOWN, presence_metrics
from monitor.presence.presence_table import PresenceTable
from tests.support.brokers.presence_records import source_record, worker_record
from tests.support.environment.checkout import ROOT
from tests.support.monitor.prometheus_text import SeriesValues, parse_exposition, select_series, series_value
from tests.unit.monitor.presence.test_presence_table import apply_records


def page(board: PresenceTable, now_s: float = 0.0) -> SeriesValues:
    return parse_exposition(presence_metrics(board, now_s, connected=True))


def test_the_figures_of_a_worker_are_those_of_its_record_durations_in_seconds() -> None:
    load: dict[str, Any] = {
        "queue": 4, "queue_ms": 250.0, "task_ms": 12.5, "busy": 0.75, "rate": 3.5,
        "done": 9, "failed": 8, "refused": 7, "rejected": 6, "expired": 5,
    }  # fmt: skip
    series = page(apply_records(PresenceTable(), worker_record("w1", "body", site="cloud", node="rack", **load)))
    names = {"site": "cloud", "pipeline": "street", "stage": "body", "worker": "w1", "node": "rack"}
    found = {name: value for (name, labels), value in series.items() if labels == frozenset(names.items())}
    assert found == {
        "sparse_worker_queue": 4, "sparse_worker_queue_seconds": 0.25, "sparse_worker_task_seconds": 0.0125,
        "sparse_worker_busy_ratio": 0.75, "sparse_worker_rate": 3.5, "sparse_worker_done_total": 9,
        "sparse_worker_failed_total": 8, "sparse_worker_refused_total": 7, "sparse_worker_turned_away_total": 6,
        "sparse_worker_expired_total": 5,
    }  # fmt: skip


def test_the_figures_of_a_source_are_those_of_its_record_by_reason() -> None:
    load: dict[str, Any] = {
        "requests": 20, "results": 11, "in_flight": 3, "waiting": 2, "window": 4, "rate": 1.5, "duplicates": 1,
        "latency_ms": {"p50": 200.0, "p99": 900.0}, "dropped": {"superseded": 7},
        "retries": {"WorkerLost": 5, "NoAnswer": 1}, "failed": {"PoisonRequest": 2},
    }  # fmt: skip
    series = page(apply_records(PresenceTable(), source_record("cam", **load)))
    names = {"site": "local", "pipeline": "street", "source": "cam", "node": "here"}
    plain = {"requests_total": 20, "results_total": 11, "in_flight": 3, "waiting": 2, "window": 4, "rate": 1.5}
    for name, value in {**plain, "twins_total": 1}.items():
        assert series_value(series, f"sparse_source_{name}", **names) == value
    assert series_value(series, "sparse_source_latency_seconds", **names, percentile="50") == 0.2
    assert series_value(series, "sparse_source_latency_seconds", **names, percentile="99") == 0.9
    assert series_value(series, "sparse_source_dropped_total", **names, reason="superseded") == 7
    assert series_value(series, "sparse_source_retries_total", **names, reason="WorkerLost") == 5
    assert series_value(series, "sparse_source_retries_total", **names, reason="NoAnswer") == 1
    assert series_value(series, "sparse_source_failed_total", **names, reason="PoisonRequest") == 2


def test_workers_are_counted_by_stage_and_state_and_a_lost_one_has_no_other_figures() -> None:
    board = apply_records(PresenceTable(), worker_record("old"), source_record("old"))
    apply_records(board, worker_record("a"), worker_record("b", state="draining"), now_s=PRESENCE_TIMEOUT_S)
    apply_records(board, worker_record("c", "tail", state="standby"), now_s=PRESENCE_TIMEOUT_S)
    series = page(board, PRESENCE_TIMEOUT_S + 1)
    counted = {
        (dict(labels)["stage"], dict(labels)["state"]): value
        for labels, value in select_series(series, "sparse_workers", site="local", pipeline="street").items()
    }
    assert counted == {
        ("body", "up"): 1, ("body", "draining"): 1, ("body", "lost"): 1, ("tail", "up"): 0, ("tail", "standby"): 1,
    }  # fmt: skip
    shown = {dict(labels)["worker"] for labels in select_series(series, "sparse_worker_queue")}
    assert shown == {"a", "b", "c"}
    assert not select_series(series, "sparse_source_requests_total")


@pytest.mark.parametrize(
    "node", ['a "quoted" one', "back\\slash", "two\nlines", "\\n", 'end\\"', "", "Küche 🍳", "\r\t"]
)
def test_any_text_in_a_label_is_read_back_as_it_was(node: str) -> None:
    series = page(
        apply_records(PresenceTable(), worker_record("w1", node=node, queue=5), source_record("cam", node=node))
    )
    assert series_value(series, "sparse_worker_queue", worker="w1", node=node) == 5
    assert series_value(series, "sparse_source_window", source="cam", node=node) == 0


def test_a_worker_that_is_told_of_twice_is_one_series() -> None:
    """Prometheus refuses a page that has one twice, and would see nothing at all."""
    topic, birth = worker_record("w1", queue=1)
    board = apply_records(
        PresenceTable(),
        (topic, birth),
        (topic.replace("/w1", "/w2"), birth),
        (f"{topic}/x", birth),
        (topic, birth),
    )
    assert series_value(page(board), "sparse_worker_queue", worker="w1") == 1
    assert series_value(page(board), "sparse_monitor_refused_total") == 2


def test_thousands_of_made_up_workers_and_sources_fill_no_more_than_a_page() -> None:
    reasons = {f"reason{number}": 1 for number in range(REASON_LIMIT)}
    counts: dict[str, Any] = {"dropped": reasons, "retries": reasons, "failed": reasons}
    board = apply_records(PresenceTable(), worker_record("real"), source_record("real"))
    long = "n" * 50_000
    apply_records(board, *(worker_record(f"fake{number}", node=long) for number in range(2 * ENTRY_LIMIT)))
    apply_records(board, *(source_record(f"fake{number}", **counts) for number in range(2 * SOURCES_SHOWN)))
    text = presence_metrics(board, 0.0, connected=True)
    series = parse_exposition(text)
    assert len(text) < 4_000_000
    assert len(select_series(series, "sparse_worker_queue")) == WORKERS_SHOWN
    assert len(select_series(series, "sparse_source_window")) == SOURCES_SHOWN
    assert select_series(series, "sparse_worker_queue", worker="real")
    assert select_series(series, "sparse_source_window", source="real")
    assert series_value(series, "sparse_workers", state="up") == ENTRY_LIMIT
    assert series_value(series, "sparse_monitor_hidden", kind="worker") == ENTRY_LIMIT - WORKERS_SHOWN
    assert series_value(series, "sparse_monitor_hidden", kind="source") == SOURCES_SHOWN + 1


@pytest.mark.parametrize("connected", [True, False])
def test_whether_the_broker_is_there_is_told(connected: bool) -> None:
    series = parse_exposition(presence_metrics(PresenceTable(), 0.0, connected=connected))
    assert series_value(series, "sparse_broker_connected") == connected


def test_numbers_of_any_size_are_written_as_numbers() -> None:
    family = MetricFamily("n_total", "counter", "N.")
    values = [0, 1, 0.1, 1e308, 5e-324, (1 << 53) - 1]
    for number, value in enumerate(values):
        family.add(value, {"n": str(number)})
    series = parse_exposition(render_exposition([family, MetricFamily("empty", "gauge", "Nothing.")]))
    assert [series_value(series, "n_total", n=str(number)) for number in range(len(values))] == values


def test_the_series_of_the_page_in_docs_are_those_that_are_told() -> None:
    load: dict[str, Any] = {"dropped": {"a": 1}, "retries": {"a": 1}, "failed": {"a": 1}}
    told = {name for name, _ in page(apply_records(PresenceTable(), worker_record(), source_record("cam", **load)))}
    told |= {figure.name for figure in _FIGURES}
    page_text = (ROOT / "docs" / "operations.md").read_text()
    section = page_text.partition("## Watching it from outside")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(sparse_\w+)`", section)) == told
