"""Telemetry points, and the conversion of events and presence records to points (`monitor.points.schema`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from brokers.dispatch.presence import SourceRecord, WorkerRecord
from brokers.protocol.stage_timing import STAGE_DURATIONS
from brokers.telemetry.schema import (
    BatchProcessed,
    EventsDropped,
    LinkTraffic,
    ProcessStarted,
    ProcessStopped,
    RequestDone,
    StepDone,
    TaskProcessed,
    TelemetryEvent,
)

FieldValue = float | int | bool | str | None


@dataclass(frozen=True, slots=True)
class TelemetryPoint:
    """The values of one measurement at one time; a field that was not measured is None, never 0."""

    measurement: str
    time_ns: int  # Unix time
    tags: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, FieldValue] = field(default_factory=dict)


_TASK = (*STAGE_DURATIONS, "bytes_in", "bytes_out", "batch")
_REQUEST = ("latency_ms", "network_ms", "attempts", "bytes_out", "request", "error")
_STEP = ("step", "epoch", "rows", "step_ms", "loss", "accuracy")
_WORKER_LOAD = ("queue", "queue_ms", "done", "failed", "malformed", "rejected", "expired", "busy", "rate", "task_ms")
_SOURCE_LOAD = ("requests", "results", "in_flight", "waiting", "window", "rate", "duplicates")
_SOURCE_COUNTS = ("dropped", "retries", "failed")  # by reason in the record, their sums in the point


def event_to_points(event: TelemetryEvent, node: str, run: str = "") -> list[TelemetryPoint]:
    """The points of an event received on `node`; `run` is used for an event that names no run."""
    tags = {"node": node, "run": event.run or run, "site": event.site, "pipeline": event.pipeline}
    fields: dict[str, FieldValue]
    match event:
        case ProcessStarted() | ProcessStopped():
            measurement = "life"
            tags |= {"role": event.role, "name": event.name}
            fields = _fields(event, ("event", "pid"))
        case TaskProcessed():
            measurement = "task"
            tags |= {"stage": event.stage, "worker": event.worker}
            fields = _fields(event, (*_TASK, "request", "error"))
        case BatchProcessed():
            measurement = "batch"
            tags |= {"stage": event.stage, "worker": event.worker, "phase": event.phase}
            fields = _fields(event, ("tasks", "rows", "busy_ms"))
        case RequestDone():
            measurement = "request"
            tags["source"] = event.source
            fields = _fields(event, _REQUEST)
        case StepDone():
            measurement = "step"
            tags["source"] = event.source
            fields = _fields(event, _STEP)
        case LinkTraffic():
            measurement = "link"
            tags |= {"from": event.from_site, "to": event.to_site}
            fields = _fields(event, ("bytes_out", "bytes_in"))
        case EventsDropped():
            measurement = "dropped_events"
            fields = {"count": event.count}
    points = [TelemetryPoint(measurement, event.time_ns, tags, fields)]
    return points + _hop_points(event, tags) if isinstance(event, RequestDone) else points


def _hop_points(event: RequestDone, tags: Mapping[str, str]) -> list[TelemetryPoint]:
    points = []
    for place, hop in enumerate(event.hops):
        hop_tags = {**tags, "stage": hop.stage, "worker": hop.worker}
        fields = _fields(hop, _TASK) | {"request": event.request, "place": place}
        # One nanosecond apart: InfluxDB merges points of equal tags and time, here two visits to one worker.
        points.append(TelemetryPoint("hop", event.time_ns + place, hop_tags, fields))
    return points


def presence_to_points(
    records: Iterable[WorkerRecord | SourceRecord], time_ns: int, run: str = ""
) -> list[TelemetryPoint]:
    """A `stage` point for each worker's record and a `source` point for each source's."""
    points = []
    for record in records:
        tags = {"node": record.node, "run": run, "site": record.site, "pipeline": record.pipeline}
        if isinstance(record, WorkerRecord):
            tags |= {"stage": record.stage, "worker": record.worker}
            fields = {"state": record.state} | _fields(record.load, _WORKER_LOAD)
            points.append(TelemetryPoint("stage", time_ns, tags, fields))
        else:
            tags["source"] = record.source
            latency_ms = record.load.latency_ms
            fields = _fields(record.load, _SOURCE_LOAD)
            fields |= {name: sum(getattr(record.load, name).values()) for name in _SOURCE_COUNTS}
            fields |= {"latency_p50_ms": latency_ms.p50, "latency_p99_ms": latency_ms.p99}
            points.append(TelemetryPoint("source", time_ns, tags, fields))
    return points


def _fields(source: object, names: Iterable[str]) -> dict[str, FieldValue]:
    return {name: getattr(source, name) for name in names}
