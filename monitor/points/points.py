"""A point: what was measured at one moment, and what every event and presence record says as points. Pure.

The measurements, their tags, fields and units are those of `monitor.points.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    """Fields that are None were not measured: they are left out where a store has no null."""

    measurement: str
    time_ns: int
    tags: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, FieldValue] = field(default_factory=dict)


_TASK = ("queue_ms", "decode_ms", "compute_ms", "encode_ms", "bytes_in", "bytes_out", "batch")


def event_to_points(event: TelemetryEvent, node: str, run: str = "") -> list[TelemetryPoint]:
    """What an event says, as points; `node` is the one that the monitor is on, `run` that of events that name none."""
    tags = {"node": node, "run": event.run or run, "site": event.site, "pipeline": event.pipeline}
    match event:
        case ProcessStarted() | ProcessStopped():
            fields: dict[str, FieldValue] = {"event": event.event, "pid": event.pid}
            return [TelemetryPoint("life", event.time_ns, {**tags, "role": event.role, "name": event.name}, fields)]
        case TaskProcessed():
            tags |= {"stage": event.stage, "worker": event.worker}
            fields = {name: getattr(event, name) for name in _TASK}
            return [
                TelemetryPoint("task", event.time_ns, tags, {**fields, "request": event.request, "error": event.error})
            ]
        case BatchProcessed():
            tags |= {"stage": event.stage, "worker": event.worker, "phase": event.phase}
            fields = {"tasks": event.tasks, "rows": event.rows, "busy_ms": event.busy_ms}
            return [TelemetryPoint("batch", event.time_ns, tags, fields)]
        case RequestDone():
            return _request_points(event, tags)
        case StepDone():
            fields = {name: getattr(event, name) for name in ("step", "epoch", "rows", "step_ms", "loss", "accuracy")}
            return [TelemetryPoint("step", event.time_ns, {**tags, "source": event.source}, fields)]
        case LinkTraffic():
            tags |= {"from": event.from_site, "to": event.to_site}
            fields = {"bytes_out": event.bytes_out, "bytes_in": event.bytes_in}
            return [TelemetryPoint("link", event.time_ns, tags, fields)]
        case EventsDropped():
            return [TelemetryPoint("dropped_events", event.time_ns, tags, {"count": event.count})]


def _request_points(event: RequestDone, tags: dict[str, str]) -> list[TelemetryPoint]:
    names = ("latency_ms", "network_ms", "attempts", "bytes_out", "request", "error")
    fields: dict[str, FieldValue] = {name: getattr(event, name) for name in names}
    found = [TelemetryPoint("request", event.time_ns, {**tags, "source": event.source}, fields)]
    for place, hop in enumerate(event.hops):
        own = {**tags, "source": event.source, "stage": hop.stage, "worker": hop.worker}
        fields = {name: getattr(hop, name) for name in _TASK}
        # A nanosecond apart: to InfluxDB two visits to one worker would be one point, by their tags and time.
        found.append(
            TelemetryPoint("hop", event.time_ns + place, own, {**fields, "request": event.request, "place": place})
        )
    return found
