"""Telemetry points, and the conversion of events and presence records to points.

Tags and fields have the names of the event's or record's own fields: `monitor.points.schema` decides which are used.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from brokers.dispatch.presence import SourceRecord, WorkerRecord
from brokers.telemetry.schema import LinkTraffic, RequestDone, TelemetryEvent
from monitor.points.schema import MEASUREMENTS

FieldValue = float | int | bool | str | None

_MEASUREMENTS_OF_EVENTS = {
    "start": "lifecycle",
    "stop": "lifecycle",
    "task_processed": "task",
    "batch_processed": "batch",
    "request_done": "request",
    "step_done": "step",
    "link_traffic": "link",
    "events_dropped": "dropped_events",
}


@dataclass(frozen=True, slots=True)
class TelemetryPoint:
    """The values of one measurement at one time; a field that was not measured is None or missing, never 0."""

    measurement: str
    time_ns: int  # Unix time
    tags: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, FieldValue] = field(default_factory=dict)


def event_to_points(event: TelemetryEvent, node: str, run: str = "") -> list[TelemetryPoint]:
    """The points of an event received on `node`; `run` is used for an event that names no run."""
    values = {**vars(event), "node": node, "run": event.run or run}
    if isinstance(event, LinkTraffic):
        values |= {"from": event.from_site, "to": event.to_site}
    points = [_make_point(_MEASUREMENTS_OF_EVENTS[event.event], event.time_ns, values)]
    if isinstance(event, RequestDone):
        # One nanosecond apart: InfluxDB merges points of equal tags and time, here two visits to one worker.
        points += [
            _make_point("hop", event.time_ns + place, {**values, **vars(hop), "place": place})
            for place, hop in enumerate(event.hops)
        ]
    return points


def presence_to_points(
    records: Iterable[WorkerRecord | SourceRecord], time_ns: int, run: str = ""
) -> list[TelemetryPoint]:
    """A `stage` point for each worker's record and a `source` point for each source's."""
    points = []
    for record in records:
        values = {**vars(record), **vars(record.load), "run": run}
        if isinstance(record, WorkerRecord):
            points.append(_make_point("stage", time_ns, values))
        else:
            load = record.load
            values |= {"latency_p50_ms": load.latency_ms.p50, "latency_p99_ms": load.latency_ms.p99}
            counts = {"dropped": load.dropped, "retries": load.retries, "failed": load.failed}
            values |= {name: sum(by_reason.values()) for name, by_reason in counts.items()}
            points.append(_make_point("source", time_ns, values))
    return points


def row_to_point(measurement: str, row: Sequence[Any]) -> TelemetryPoint:
    """The point of a row: its time, tags and fields in the order of the schema."""
    schema = MEASUREMENTS[measurement]
    split = 1 + len(schema.tags)
    tags = {tag: value or "" for tag, value in zip(schema.tags, row[1:split], strict=True)}
    fields = {
        # JSON does not tell 5.0 from 5.
        field.name: float(value) if field.type == "float" and value is not None else value
        for field, value in zip(schema.fields, row[split:], strict=True)
    }
    return TelemetryPoint(measurement, row[0], tags, fields)


def _make_point(measurement: str, time_ns: int, values: Mapping[str, Any]) -> TelemetryPoint:
    schema = MEASUREMENTS[measurement]
    tags = {tag: values[tag] for tag in schema.tags}
    fields = {field.name: values[field.name] for field in schema.fields}
    return TelemetryPoint(measurement, time_ns, tags, fields)
