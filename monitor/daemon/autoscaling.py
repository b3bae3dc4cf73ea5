"""How each stage fares, as a scaler wants it: one object of numbers a stage. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from brokers.dispatch.presence import WorkerLoad, WorkerRecord
from monitor.presence.presence_table import PresenceTable

# A record may hold any number: sums and products of what is made up must stay numbers, too.
_LARGEST = 1e12


def stage_metrics(census: PresenceTable, now_s: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Pipeline -> stage -> figures, over the workers that are up; a stage that has none has zeros.

    Where one stage is served at several sites, `site` names them all.
    """
    workers: dict[tuple[str, str], list[WorkerRecord]] = {}
    sites: dict[tuple[str, str], list[str]] = {}
    for place, births in census.live_workers_by_stage(now_s).items():
        key = place.pipeline, place.stage
        workers.setdefault(key, []).extend(birth for birth in births if birth.state == "up")
        sites.setdefault(key, []).append(place.site)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (pipeline, stage), births in workers.items():
        figures = _figures([birth.load for birth in births])
        found.setdefault(pipeline, {})[stage] = {**figures, "site": ",".join(sites[pipeline, stage])}
    return found


def _figures(loads: Sequence[WorkerLoad]) -> dict[str, float]:
    """`queue_ms` is the mean over tasks, not over workers: one that nobody asks for anything makes no queue shorter.

    Each worker counts by the tasks that it finished in the last second and those that wait for it.
    """
    rates = [min(load.rate, _LARGEST) for load in loads]
    weights = [rate + load.queue for rate, load in zip(rates, loads, strict=True)]
    waits_ms = [min(load.queue_ms, _LARGEST) for load in loads]
    total = sum(weights)
    waited_ms = sum(weight * wait_ms for weight, wait_ms in zip(weights, waits_ms, strict=True)) / (total or 1.0)
    return {
        "workers": len(loads),
        "queue": sum(load.queue for load in loads),
        "queue_ms": round(waited_ms, 3),
        "busy": round(sum(load.busy for load in loads) / len(loads), 3) if loads else 0.0,
        "rate": round(sum(rates, 0.0), 3),
    }
