"""Presence records as points: what a database is told of workers and sources each second."""

from __future__ import annotations

from typing import Any

from monitor.points.presence_points import presence_to_points
from monitor.points.schema import MEASUREMENTS
from monitor.presence.presence_table import PresenceTable
from tests.support.brokers.presence_records import source_record, worker_record


def heard(census: PresenceTable, now_s: float, *, retained: bool = False, **load: Any) -> None:
    for topic, record in (worker_record("w1", node="rack", **load), source_record("cam", window=4)):
        census.on_presence(topic, record.to_bytes(), now_s, retained=retained)


def test_a_record_is_a_point_with_all_fields_of_the_schema() -> None:
    census = PresenceTable()
    load: dict[str, Any] = {"queue": 4, "queue_ms": 250.0, "done": 9, "busy": 0.75, "task_ms": 12.5}
    heard(census, 10.0, **load)
    topic, record = source_record("yard", node="tower", dropped={"superseded": 2, "x": 1}, retries={"WorkerLost": 5})
    census.on_presence(topic, record.to_bytes(), 10.0)
    worker, cam, yard = presence_to_points(census, 9.0, 77, "r1")
    assert worker.tags == {
        "node": "rack", "run": "r1", "site": "local", "pipeline": "street", "stage": "body", "worker": "w1",
    }  # fmt: skip
    assert {name: worker.fields[name] for name in load} == load
    assert worker.fields["state"] == "up"
    assert (cam.tags["source"], cam.fields["window"], cam.fields["dropped"]) == ("cam", 4, 0)
    assert (yard.fields["dropped"], yard.fields["retries"], yard.tags["node"]) == (3, 5, "tower")
    for point in (worker, cam, yard):
        known = MEASUREMENTS[point.measurement]
        assert set(point.tags) == set(known.tags)
        assert set(point.fields) == {field.name for field in known.fields}
        assert point.time_ns == 77


def test_only_what_was_heard_since_is_told_again() -> None:
    census = PresenceTable()
    heard(census, 10.0)
    assert len(presence_to_points(census, 10.0, 1, "")) == 2
    assert presence_to_points(census, 10.1, 1, "") == []
    heard(census, 11.0)
    assert len(presence_to_points(census, 10.1, 1, "")) == 2


def test_what_a_broker_has_kept_of_somebody_who_may_be_long_gone_is_not_told() -> None:
    census = PresenceTable()
    heard(census, 10.0, retained=True)
    assert presence_to_points(census, 9.0, 1, "") == []
    heard(census, 11.0)
    assert len(presence_to_points(census, 9.0, 1, "")) == 2
