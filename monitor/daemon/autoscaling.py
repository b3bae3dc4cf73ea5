"""The load of each stage in numbers, for autoscalers."""

from collections.abc import Sequence
from typing import Any

from brokers.dispatch.presence import WorkerLoad
from monitor.presence.presence_table import PresenceTable, StageKey

_LARGEST = 1e12  # records hold any finite number, and their sums and products must be finite too


def stage_metrics(presence: PresenceTable, now_s: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics by pipeline and stage, over the workers in state "up"; zeros for a stage without workers.

    `site` lists all sites of the stage, separated by commas.
    """
    by_name: dict[tuple[str, str], list[StageKey]] = {}
    by_stage = presence.live_workers_by_stage(now_s)
    for key in by_stage:
        by_name.setdefault((key.pipeline, key.stage), []).append(key)
    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    for (pipeline, stage), keys in by_name.items():
        loads = [record.load for key in keys for record in by_stage[key] if record.state == "up"]
        metrics.setdefault(pipeline, {})[stage] = {**_totals(loads), "site": ",".join(key.site for key in keys)}
    return metrics


def _totals(loads: Sequence[WorkerLoad]) -> dict[str, float]:
    """`queue_ms` is the mean over tasks, not over workers: an idle worker does not shorten the others' queues.

    Each worker's weight is the number of tasks it finished in the last second and those in its queue.
    """
    rates = [min(load.rate, _LARGEST) for load in loads]
    weights = [rate + load.queue for rate, load in zip(rates, loads, strict=True)]
    weighted_ms = sum(weight * min(load.queue_ms, _LARGEST) for weight, load in zip(weights, loads, strict=True))
    return {
        "workers": len(loads),
        "queue": sum(load.queue for load in loads),
        "queue_ms": round(weighted_ms / (sum(weights) or 1.0), 3),
        "busy": round(sum(load.busy for load in loads) / (len(loads) or 1), 3),
        "rate": round(sum(rates, 0.0), 3),
    }
