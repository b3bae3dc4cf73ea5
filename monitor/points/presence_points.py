"""What workers and sources say of themselves as points: the newest record of each, where there is a new one. Pure."""

from __future__ import annotations

from brokers.dispatch.presence import SourceRecord, WorkerRecord
from monitor.points.points import TelemetryPoint
from monitor.presence.presence_table import PresenceTable

_LOAD = ("queue", "queue_ms", "done", "failed", "malformed", "rejected", "expired", "busy", "rate", "task_ms")
_SOURCE_LOAD = ("requests", "results", "in_flight", "waiting", "window", "rate", "duplicates")


def presence_to_points(census: PresenceTable, since_s: float, time_ns: int, run: str) -> list[TelemetryPoint]:
    """A `stage` point of each worker, and a `source` point of each source, that was heard since `since_s`."""
    return [
        _of_worker(birth, time_ns, run) if isinstance(birth, WorkerRecord) else _of_source(birth, time_ns, run)
        for birth in census.updated_since(since_s)
    ]


def _of_worker(birth: WorkerRecord, time_ns: int, run: str) -> TelemetryPoint:
    tags = {**_place(birth, run), "stage": birth.stage, "worker": birth.worker}
    figures = {name: getattr(birth.load, name) for name in _LOAD}
    return TelemetryPoint("stage", time_ns, tags, {"state": birth.state, **figures})


def _of_source(birth: SourceRecord, time_ns: int, run: str) -> TelemetryPoint:
    load = birth.load
    figures = {name: getattr(load, name) for name in _SOURCE_LOAD}
    figures |= {name: sum(getattr(load, name).values()) for name in ("dropped", "retries", "failed")}
    figures |= {"latency_p50_ms": load.latency_ms.p50, "latency_p99_ms": load.latency_ms.p99}
    return TelemetryPoint("source", time_ns, {**_place(birth, run), "source": birth.source}, figures)


def _place(birth: WorkerRecord | SourceRecord, run: str) -> dict[str, str]:
    return {"node": birth.node, "run": run, "site": birth.site, "pipeline": birth.pipeline}
