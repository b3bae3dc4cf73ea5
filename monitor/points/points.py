"""A point: what was measured at one moment, and what every event and presence record says as points. Pure.

The measurements, their tags, fields and units are those of `monitor.points.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from brokers.telemetry.schema import (
    BatchProcessed,
    Event,
    EventsDropped,
    LinkCarried,
    RequestDone,
    Start,
    StepDone,
    Stop,
    TaskProcessed,
)

Value = float | int | bool | str | None


@dataclass(frozen=True, slots=True)
class Point:
    """Fields that are None were not measured: they are left out where a store has no null."""

    measurement: str
    time_ns: int
    tags: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Value] = field(default_factory=dict)


_TASK = ("queue_ms", "decode_ms", "compute_ms", "encode_ms", "bytes_in", "bytes_out", "batch")


def points_of(event: Event, node: str, run: str = "") -> list[Point]:
    """What an event says, as points; `node` is the one that the monitor is on, `run` that of events that name none."""
    tags = {"node": node, "run": event.run or run, "site": event.site, "pipeline": event.pipeline}
    match event:
        case Start() | Stop():
            fields: dict[str, Value] = {"event": event.event, "pid": event.pid}
            return [Point("life", event.time_ns, {**tags, "role": event.role, "name": event.name}, fields)]
        case TaskProcessed():
            tags |= {"stage": event.stage, "worker": event.worker}
            fields = {name: getattr(event, name) for name in _TASK}
            return [Point("task", event.time_ns, tags, {**fields, "request": event.request, "error": event.error})]
        case BatchProcessed():
            tags |= {"stage": event.stage, "worker": event.worker, "phase": event.phase}
            fields = {"tasks": event.tasks, "rows": event.rows, "busy_ms": event.busy_ms}
            return [Point("batch", event.time_ns, tags, fields)]
        case RequestDone():
            return _request_points(event, tags)
        case StepDone():
            fields = {name: getattr(event, name) for name in ("step", "epoch", "rows", "step_ms", "loss", "accuracy")}
            return [Point("step", event.time_ns, {**tags, "source": event.source}, fields)]
        case LinkCarried():
            tags |= {"from": event.from_site, "to": event.to_site}
            fields = {"bytes_out": event.bytes_out, "bytes_in": event.bytes_in}
            return [Point("link", event.time_ns, tags, fields)]
        case EventsDropped():
            return [Point("dropped_events", event.time_ns, tags, {"count": event.count})]


def _request_points(event: RequestDone, tags: dict[str, str]) -> list[Point]:
    names = ("latency_ms", "network_ms", "attempts", "bytes_out", "request", "error")
    fields: dict[str, Value] = {name: getattr(event, name) for name in names}
    found = [Point("request", event.time_ns, {**tags, "source": event.source}, fields)]
    for place, hop in enumerate(event.hops):
        own = {**tags, "source": event.source, "stage": hop.stage, "worker": hop.worker}
        fields = {name: getattr(hop, name) for name in _TASK}
        # A nanosecond apart: to InfluxDB two visits to one worker would be one point, by their tags and time.
        found.append(Point("hop", event.time_ns + place, own, {**fields, "request": event.request, "place": place}))
    return found
