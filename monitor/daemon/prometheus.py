"""What Prometheus is told: the records of workers and sources as series. Pure.

Durations are in seconds and names end as Prometheus has it; otherwise they are those of docs/protocol.md. The figures
of a worker or source that is lost are not told: they are its last, and it may be long ago.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from brokers.dispatch.presence import SourceLoad, SourceRecord, WorkerLoad, WorkerRecord
from monitor.daemon.exposition import MetricFamily, MetricType, render_exposition
from monitor.presence.presence_table import PresenceTable, StageKey, stage_key

# Workers and sources whose figures are told one by one, those that came first: whoever makes more of them up than
# anybody runs fills neither the page nor the memory of its reader. All that are known count in sparse_workers.
WORKERS_SHOWN = 1024
SOURCES_SHOWN = 128


L = TypeVar("L", WorkerLoad, SourceLoad)


class _PresenceMetric(NamedTuple, Generic[L]):
    name: str
    kind: MetricType
    about: str
    of: Callable[[L], float]


_OF_WORKERS: tuple[_PresenceMetric[WorkerLoad], ...] = (
    _PresenceMetric("queue", "gauge", "Tasks that wait.", lambda load: load.queue),
    _PresenceMetric("queue_seconds", "gauge", "How long tasks wait to be begun.", lambda load: _seconds(load.queue_ms)),
    _PresenceMetric(
        "task_seconds", "gauge", "How long one task keeps the worker busy.", lambda load: _seconds(load.task_ms)
    ),
    _PresenceMetric("busy_ratio", "gauge", "Share of the last second spent computing.", lambda load: load.busy),
    _PresenceMetric("rate", "gauge", "Tasks a second, over the last second.", lambda load: load.rate),
    _PresenceMetric("done_total", "counter", "Tasks finished.", lambda load: load.done),
    _PresenceMetric("failed_total", "counter", "Tasks answered with a failure.", lambda load: load.failed),
    _PresenceMetric("malformed_total", "counter", "Messages that broke the protocol.", lambda load: load.malformed),
    _PresenceMetric("rejected_total", "counter", "Tasks given back, full or leaving.", lambda load: load.rejected),
    _PresenceMetric("expired_total", "counter", "Tasks dropped past their deadline.", lambda load: load.expired),
)
_OF_SOURCES: tuple[_PresenceMetric[SourceLoad], ...] = (
    _PresenceMetric("requests_total", "counter", "Requests asked for.", lambda load: load.requests),
    _PresenceMetric("results_total", "counter", "Requests answered.", lambda load: load.results),
    _PresenceMetric("twins_total", "counter", "Second answers to one request, dropped.", lambda load: load.duplicates),
    _PresenceMetric("in_flight", "gauge", "Requests sent, and not answered yet.", lambda load: load.in_flight),
    _PresenceMetric("waiting", "gauge", "Requests that wait for room in the window.", lambda load: load.waiting),
    _PresenceMetric("window", "gauge", "How many requests may be in flight.", lambda load: load.window),
    _PresenceMetric("rate", "gauge", "Results a second, lately.", lambda load: load.rate),
)
_REASONS = (
    ("retries", "Attempts after the first, by what befell the one before."),
    ("dropped", "Samples that never became a request, by reason."),
    ("failed", "Requests that ended without a result, by error."),
)


def presence_metrics(census: PresenceTable, now_s: float, *, connected: bool) -> str:
    """The page that /metrics gives."""
    return render_exposition(
        [_connected(connected), *_counted(census, now_s), *_of_workers(census, now_s), *_of_sources(census, now_s)]
    )


def _connected(connected: bool) -> MetricFamily:
    family = MetricFamily("sparse_broker_connected", "gauge", "Whether the monitor is connected to the broker.")
    family.add(int(connected))
    return family


def _counted(census: PresenceTable, now_s: float) -> Iterator[MetricFamily]:
    """How many there are, and what of it was not believed, or is not on this page."""
    present = census.live_workers_by_stage(now_s)
    states: Counter[tuple[StageKey, str]] = Counter({(place, "up"): 0 for place in present})
    states.update((place, birth.state) for place, births in present.items() for birth in births)
    states.update((stage_key(birth), "lost") for birth in census.lost_workers(now_s))
    workers = MetricFamily("sparse_workers", "gauge", "Workers of a stage, by state.")
    for (place, state), count in states.items():
        workers.add(count, {**place._asdict(), "state": state})
    yield workers
    hidden = MetricFamily("sparse_monitor_hidden", "gauge", "Workers and sources too many for this page.")
    hidden.add(max(0, len(census.live_workers(now_s)) - WORKERS_SHOWN), {"kind": "worker"})
    hidden.add(max(0, len(census.live_sources(now_s)) - SOURCES_SHOWN), {"kind": "source"})
    yield hidden
    refused = MetricFamily("sparse_monitor_refused_total", "counter", "Presence records that were not believed.")
    refused.add(census.rejected)
    yield refused


def _of_workers(census: PresenceTable, now_s: float) -> Iterator[MetricFamily]:
    births = census.live_workers(now_s)[:WORKERS_SHOWN]
    yield from _each("sparse_worker", _OF_WORKERS, [(birth.load, _worker_labels(birth)) for birth in births])


def _of_sources(census: PresenceTable, now_s: float) -> Iterator[MetricFamily]:
    births = census.live_sources(now_s)[:SOURCES_SHOWN]
    labels = [_source_labels(birth) for birth in births]
    loads = [birth.load for birth in births]
    yield from _each("sparse_source", _OF_SOURCES, list(zip(loads, labels, strict=True)))
    latency = MetricFamily("sparse_source_latency_seconds", "gauge", "Round trips of the newest results, percentiles.")
    for birth, names in zip(births, labels, strict=True):
        latency.add(_seconds(birth.load.latency_ms.p50), {**names, "percentile": "50"})
        latency.add(_seconds(birth.load.latency_ms.p99), {**names, "percentile": "99"})
    yield latency
    for name, about in _REASONS:
        family = MetricFamily(f"sparse_source_{name}_total", "counter", about)
        for birth, names in zip(births, labels, strict=True):
            for reason, count in getattr(birth.load, name).items():
                family.add(count, {**names, "reason": reason})
        yield family


def _each(
    prefix: str, figures: Iterable[_PresenceMetric[L]], loads: Sequence[tuple[L, dict[str, str]]]
) -> Iterator[MetricFamily]:
    """A family for each figure, of all loads with their labels."""
    for figure in figures:
        family = MetricFamily(f"{prefix}_{figure.name}", figure.kind, figure.about)
        for load, names in loads:
            family.add(figure.of(load), names)
        yield family


def _seconds(duration_ms: float) -> float:
    return round(duration_ms / 1000, 6)


def _worker_labels(birth: WorkerRecord) -> dict[str, str]:
    return {
        "site": birth.site,
        "pipeline": birth.pipeline,
        "stage": birth.stage,
        "worker": birth.worker,
        "node": birth.node,
    }


def _source_labels(birth: SourceRecord) -> dict[str, str]:
    return {"site": birth.site, "pipeline": birth.pipeline, "source": birth.source, "node": birth.node}
