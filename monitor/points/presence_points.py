"""What workers and sources say of themselves as points: the newest record of each, where there is a new one. Pure."""

from __future__ import annotations

from brokers.dispatch.presence import Birth, SourceBirth
from monitor.points.points import Point
from monitor.presence.census import Census

_LOAD = ("queue", "queue_ms", "done", "failed", "refused", "turned_away", "expired", "busy", "rate", "task_ms")
_SOURCE_LOAD = ("requests", "results", "in_flight", "waiting", "window", "rate", "twins")


def presence_points(census: Census, since_s: float, time_ns: int, run: str) -> list[Point]:
    """A `stage` point of each worker, and a `source` point of each source, that was heard since `since_s`."""
    return [
        _of_worker(birth, time_ns, run) if isinstance(birth, Birth) else _of_source(birth, time_ns, run)
        for birth in census.heard_since(since_s)
    ]


def _of_worker(birth: Birth, time_ns: int, run: str) -> Point:
    tags = {**_place(birth, run), "stage": birth.stage, "worker": birth.worker}
    figures = {name: getattr(birth.load, name) for name in _LOAD}
    return Point("stage", time_ns, tags, {"state": birth.state, **figures})


def _of_source(birth: SourceBirth, time_ns: int, run: str) -> Point:
    load = birth.load
    figures = {name: getattr(load, name) for name in _SOURCE_LOAD}
    figures |= {name: sum(getattr(load, name).values()) for name in ("dropped", "retries", "failed")}
    figures |= {"latency_p50_ms": load.latency_ms.p50, "latency_p99_ms": load.latency_ms.p99}
    return Point("source", time_ns, {**_place(birth, run), "source": birth.source}, figures)


def _place(birth: Birth | SourceBirth, run: str) -> dict[str, str]:
    return {"node": birth.node, "run": run, "site": birth.site, "pipeline": birth.pipeline}
