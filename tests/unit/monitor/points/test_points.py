"""Events and presence records as points of the schema."""

from __future__ import annotations

from typing import Any

import pytest

from brokers.telemetry.schema import (
    BatchProcessed,
    EventsDropped,
    HopMetrics,
    LinkTraffic,
    ProcessStarted,
    RequestDone,
    StepDone,
    TaskProcessed,
    TelemetryEvent,
)
from monitor.points.points import event_to_points, presence_to_points
from monitor.points.schema import MEASUREMENTS
from tests.support.brokers.presence_records import source_publication, worker_publication

PLACE: dict[str, Any] = {"time_ns": 77, "site": "edge", "pipeline": "street"}
HOPS = (HopMetrics(stage="head", worker="h1", compute_ms=2.0), HopMetrics(stage="head", worker="h1"))
EVENTS: list[TelemetryEvent] = [
    ProcessStarted(**PLACE, role="stage", name="h1", pid=9),
    TaskProcessed(**PLACE, stage="head", worker="h1", request="ab", queue_ms=1.5),
    BatchProcessed(**PLACE, stage="head", worker="h1", phase="forward", tasks=2),
    RequestDone(**PLACE, source="cam", request="ab", latency_ms=3.5, hops=HOPS),
    StepDone(**PLACE, source="cam", step=1, rows=64),
    LinkTraffic(**PLACE, from_site="edge", to_site="cloud", bytes_out=5),
    EventsDropped(**PLACE, count=3),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.event)
def test_event_becomes_points_with_all_tags_and_fields_of_schema(event: TelemetryEvent) -> None:
    for point in event_to_points(event, "rack", "r1"):
        measurement = MEASUREMENTS[point.measurement]
        assert set(point.tags) == set(measurement.tags)
        assert set(point.fields) == {field.name for field in measurement.fields}
        assert {name: point.tags[name] for name in ("node", "run", "site", "pipeline")} == {
            "node": "rack", "run": "r1", "site": "edge", "pipeline": "street",
        }  # fmt: skip


def test_own_run_of_event_has_priority() -> None:
    [point] = event_to_points(EventsDropped(time_ns=1, run="own", count=1), "rack", "r1")
    assert point.tags["run"] == "own"


def test_two_hops_through_one_worker_have_different_times() -> None:
    request, *hops = event_to_points(EVENTS[3], "rack")
    assert (request.measurement, request.time_ns, request.fields["latency_ms"]) == ("request", 77, 3.5)
    assert [(point.measurement, point.time_ns, point.fields["place"]) for point in hops] == [
        ("hop", 77, 0),
        ("hop", 78, 1),
    ]
    assert hops[0].fields["compute_ms"] == 2.0


def test_presence_record_becomes_point_with_all_tags_and_fields_of_schema() -> None:
    load: dict[str, Any] = {"queue": 4, "queue_ms": 250.0, "done": 9, "busy": 0.75, "task_ms": 12.5}
    _, worker = worker_publication("w1", node="rack", **load)
    _, source = source_publication("cam", node="tower", window=4, dropped={"a": 2, "b": 1}, retries={"WorkerLost": 5})
    stage_point, source_point = presence_to_points([worker, source], 77, "r1")
    assert stage_point.tags == {
        "node": "rack", "run": "r1", "site": "local", "pipeline": "street", "stage": "body", "worker": "w1",
    }  # fmt: skip
    assert {name: stage_point.fields[name] for name in ("state", *load)} == {"state": "up", **load}
    assert (source_point.tags["source"], source_point.tags["node"], source_point.fields["window"]) == (
        "cam",
        "tower",
        4,
    )
    assert (source_point.fields["dropped"], source_point.fields["retries"], source_point.fields["failed"]) == (3, 5, 0)
    for point in (stage_point, source_point):
        measurement = MEASUREMENTS[point.measurement]
        assert set(point.tags) == set(measurement.tags)
        assert set(point.fields) == {field.name for field in measurement.fields}
        assert point.time_ns == 77
