"""The load of each stage that an autoscaler reads."""

from __future__ import annotations

import json
from typing import Any

from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from monitor.daemon.http_server import stage_metrics
from monitor.presence.presence_table import PresenceTable
from tests.support.brokers.presence_records import worker_publication
from tests.unit.monitor.presence.test_presence_table import apply_records


def test_queueing_time_is_the_mean_over_tasks_not_workers() -> None:
    table = apply_records(
        PresenceTable(),
        worker_publication("busy", queue=6, rate=2.0, queue_ms=900.0, busy=1.0),
        worker_publication("half", queue=1, rate=1.0, queue_ms=100.0, busy=0.5),
        worker_publication("idle"),
    )
    assert stage_metrics(table, 0.0)["street"]["body"] == {
        "workers": 3,
        "queue": 7,
        "queue_ms": 740.0,
        "busy": 0.5,
        "rate": 3.0,
        "site": "local",
    }


def test_only_workers_in_state_up_count_and_only_while_they_report() -> None:
    table = apply_records(
        PresenceTable(),
        worker_publication("up", queue=1, queue_ms=10.0),
        worker_publication("draining", state="draining", queue=9, queue_ms=5000.0),
        worker_publication("standby", state="standby", queue=9, queue_ms=5000.0),
    )
    metrics = stage_metrics(table, PRESENCE_TIMEOUT_S)["street"]["body"]
    assert (metrics["workers"], metrics["queue"], metrics["queue_ms"]) == (1, 1, 10.0)
    assert stage_metrics(table, PRESENCE_TIMEOUT_S + 0.1)["street"]["body"]["workers"] == 0


def test_stage_without_workers_has_zeros() -> None:
    topic, record = worker_publication(queue=4, queue_ms=250, busy=0.5, rate=2)
    table = apply_records(PresenceTable(), (topic, record))
    table.on_presence(topic, b"", 1.0)
    zeros = {"workers": 0, "queue": 0, "queue_ms": 0.0, "busy": 0.0, "rate": 0.0, "site": "local"}
    assert stage_metrics(table, 1.0) == {"street": {"body": zeros}}


def test_stage_at_two_sites_is_one_stage() -> None:
    table = apply_records(
        PresenceTable(),
        worker_publication("a", site="cloud", queue=1),
        worker_publication("b", site="cloudlet", queue=2),
    )
    assert stage_metrics(table, 0.0)["street"]["body"]["site"] == "cloud,cloudlet"
    assert stage_metrics(table, 0.0)["street"]["body"]["queue"] == 3


def test_enormous_values_stay_finite() -> None:
    huge: dict[str, Any] = {"queue": (1 << 53) - 1, "queue_ms": 1e308, "rate": 1e308, "task_ms": 1e308}
    table = apply_records(PresenceTable(), *(worker_publication(f"w{number}", **huge) for number in range(20)))
    metrics = json.loads(json.dumps(stage_metrics(table, 0.0), allow_nan=False))
    assert metrics["street"]["body"]["workers"] == 20
