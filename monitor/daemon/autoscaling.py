"""The load of each stage in numbers, for autoscalers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from brokers.dispatch.presence import WorkerLoad, WorkerRecord
from monitor.presence.presence_table import PresenceTable

_LARGEST = 1e12  # records hold any finite number, and their sums and products must be finite too


def stage_metrics(presence: PresenceTable, now_s: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics by pipeline and stage, over the workers in state "up"; zeros for a stage without workers.

    `site` lists all sites of the stage, separated by commas.
    """
    records: dict[tuple[str, str], list[WorkerRecord]] = {}
    sites: dict[tuple[str, str], list[str]] = {}
    for key, stage_records in presence.live_workers_by_stage(now_s).items():
        name = key.pipeline, key.stage
        records.setdefault(name, []).extend(record for record in stage_records if record.state == "up")
        sites.setdefault(name, []).append(key.site)
    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    for (pipeline, stage), stage_records in records.items():
        totals = _totals([record.load for record in stage_records])
        metrics.setdefault(pipeline, {})[stage] = {**totals, "site": ",".join(sites[pipeline, stage])}
    return metrics


def _totals(loads: Sequence[WorkerLoad]) -> dict[str, float]:
    """`queue_ms` is the mean over tasks, not over workers: an idle worker does not shorten the others' queues.

    Each worker's weight is the number of tasks it finished in the last second and those in its queue.
    """
    rates = [min(load.rate, _LARGEST) for load in loads]
    weights = [rate + load.queue for rate, load in zip(rates, loads, strict=True)]
    waits_ms = [min(load.queue_ms, _LARGEST) for load in loads]
    weighted_ms = sum(weight * wait_ms for weight, wait_ms in zip(weights, waits_ms, strict=True))
    return {
        "workers": len(loads),
        "queue": sum(load.queue for load in loads),
        "queue_ms": round(weighted_ms / (sum(weights) or 1.0), 3),
        "busy": round(sum(load.busy for load in loads) / len(loads), 3) if loads else 0.0,
        "rate": round(sum(rates, 0.0), 3),
    }
