"""What Prometheus is told: the records of workers and sources as series. Pure.

Durations are in seconds and names end as Prometheus has it; otherwise they are those of docs/protocol.md. The figures
of a worker or source that is lost are not told: they are its last, and it may be long ago.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from brokers.dispatch.presence import Birth, Load, SourceBirth, SourceLoad
from monitor.daemon.exposition import Family, Kind, exposition
from monitor.presence.census import Census, Place, place_of

# Workers and sources whose figures are told one by one, those that came first: whoever makes more of them up than
# anybody runs fills neither the page nor the memory of its reader. All that are known count in sparse_workers.
WORKERS_SHOWN = 1024
SOURCES_SHOWN = 128


L = TypeVar("L", Load, SourceLoad)


class _Figure(NamedTuple, Generic[L]):
    name: str
    kind: Kind
    about: str
    of: Callable[[L], float]


_OF_WORKERS: tuple[_Figure[Load], ...] = (
    _Figure("queue", "gauge", "Tasks that wait.", lambda load: load.queue),
    _Figure("queue_seconds", "gauge", "How long tasks wait to be begun.", lambda load: _seconds(load.queue_ms)),
    _Figure("task_seconds", "gauge", "How long one task keeps the worker busy.", lambda load: _seconds(load.task_ms)),
    _Figure("busy_ratio", "gauge", "Share of the last second spent computing.", lambda load: load.busy),
    _Figure("rate", "gauge", "Tasks a second, over the last second.", lambda load: load.rate),
    _Figure("done_total", "counter", "Tasks finished.", lambda load: load.done),
    _Figure("failed_total", "counter", "Tasks answered with a failure.", lambda load: load.failed),
    _Figure("refused_total", "counter", "Messages that broke the protocol.", lambda load: load.refused),
    _Figure("turned_away_total", "counter", "Tasks given back, full or leaving.", lambda load: load.turned_away),
    _Figure("expired_total", "counter", "Tasks dropped past their deadline.", lambda load: load.expired),
)
_OF_SOURCES: tuple[_Figure[SourceLoad], ...] = (
    _Figure("requests_total", "counter", "Requests asked for.", lambda load: load.requests),
    _Figure("results_total", "counter", "Requests answered.", lambda load: load.results),
    _Figure("twins_total", "counter", "Second answers to one request, dropped.", lambda load: load.twins),
    _Figure("in_flight", "gauge", "Requests sent, and not answered yet.", lambda load: load.in_flight),
    _Figure("waiting", "gauge", "Requests that wait for room in the window.", lambda load: load.waiting),
    _Figure("window", "gauge", "How many requests may be in flight.", lambda load: load.window),
    _Figure("rate", "gauge", "Results a second, lately.", lambda load: load.rate),
)
_REASONS = (
    ("retries", "Attempts after the first, by what befell the one before."),
    ("dropped", "Samples that never became a request, by reason."),
    ("failed", "Requests that ended without a result, by error."),
)


def metrics(census: Census, now_s: float, *, connected: bool) -> str:
    """The page that /metrics gives."""
    return exposition(
        [_connected(connected), *_counted(census, now_s), *_of_workers(census, now_s), *_of_sources(census, now_s)]
    )


def _connected(connected: bool) -> Family:
    family = Family("sparse_broker_connected", "gauge", "Whether the monitor is connected to the broker.")
    family.add(int(connected))
    return family


def _counted(census: Census, now_s: float) -> Iterator[Family]:
    """How many there are, and what of it was not believed, or is not on this page."""
    present = census.present(now_s)
    states: Counter[tuple[Place, str]] = Counter({(place, "up"): 0 for place in present})
    states.update((place, birth.state) for place, births in present.items() for birth in births)
    states.update((place_of(birth), "lost") for birth in census.workers_lost(now_s))
    workers = Family("sparse_workers", "gauge", "Workers of a stage, by state.")
    for (place, state), count in states.items():
        workers.add(count, {**place._asdict(), "state": state})
    yield workers
    hidden = Family("sparse_monitor_hidden", "gauge", "Workers and sources too many for this page.")
    hidden.add(max(0, len(census.workers_here(now_s)) - WORKERS_SHOWN), {"kind": "worker"})
    hidden.add(max(0, len(census.sources_here(now_s)) - SOURCES_SHOWN), {"kind": "source"})
    yield hidden
    refused = Family("sparse_monitor_refused_total", "counter", "Presence records that were not believed.")
    refused.add(census.garbage)
    yield refused


def _of_workers(census: Census, now_s: float) -> Iterator[Family]:
    births = census.workers_here(now_s)[:WORKERS_SHOWN]
    yield from _each("sparse_worker", _OF_WORKERS, [(birth.load, _worker_labels(birth)) for birth in births])


def _of_sources(census: Census, now_s: float) -> Iterator[Family]:
    births = census.sources_here(now_s)[:SOURCES_SHOWN]
    labels = [_source_labels(birth) for birth in births]
    loads = [birth.load for birth in births]
    yield from _each("sparse_source", _OF_SOURCES, list(zip(loads, labels, strict=True)))
    latency = Family("sparse_source_latency_seconds", "gauge", "Round trips of the newest results, percentiles.")
    for birth, names in zip(births, labels, strict=True):
        latency.add(_seconds(birth.load.latency_ms.p50), {**names, "percentile": "50"})
        latency.add(_seconds(birth.load.latency_ms.p99), {**names, "percentile": "99"})
    yield latency
    for name, about in _REASONS:
        family = Family(f"sparse_source_{name}_total", "counter", about)
        for birth, names in zip(births, labels, strict=True):
            for reason, count in getattr(birth.load, name).items():
                family.add(count, {**names, "reason": reason})
        yield family


def _each(prefix: str, figures: Iterable[_Figure[L]], loads: Sequence[tuple[L, dict[str, str]]]) -> Iterator[Family]:
    """A family for each figure, of all loads with their labels."""
    for figure in figures:
        family = Family(f"{prefix}_{figure.name}", figure.kind, figure.about)
        for load, names in loads:
            family.add(figure.of(load), names)
        yield family


def _seconds(duration_ms: float) -> float:
    return round(duration_ms / 1000, 6)


def _worker_labels(birth: Birth) -> dict[str, str]:
    return {
        "site": birth.site,
        "pipeline": birth.pipeline,
        "stage": birth.stage,
        "worker": birth.worker,
        "node": birth.node,
    }


def _source_labels(birth: SourceBirth) -> dict[str, str]:
    return {"site": birth.site, "pipeline": birth.pipeline, "source": birth.source, "node": birth.node}
