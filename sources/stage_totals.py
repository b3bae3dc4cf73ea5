"""What each stage of a run took, added up: the part of a summary that is the same for every kind of run. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class StageTotals:
    """Sums by stage of whatever is added under a name, with the tasks they are of and the workers that did them."""

    _sums: dict[str, dict[str, float]] = field(default_factory=dict)
    _workers: dict[str, set[str]] = field(default_factory=dict)

    def add(self, stage: str, worker: str, tasks: int, figures: Mapping[str, float]) -> None:
        """A worker of the stage has done so many tasks, and these are their figures in sum."""
        sums = self._sums.setdefault(stage, {})
        for name, value in {"tasks": tasks, **figures}.items():
            sums[name] = sums.get(name, 0) + value
        self._workers.setdefault(stage, set()).add(worker)

    def stage_names(self, order: Sequence[str] = ()) -> list[str]:
        """The stages in `order`; those that are not in it come last."""
        return sorted(self._sums, key=lambda name: order.index(name) if name in order else len(order))

    def total(self, stage: str, name: str) -> float:
        return self._sums[stage].get(name, 0)

    def summary(self, order: Sequence[str], means: Collection[str], sums: Collection[str]) -> dict[str, dict[str, Any]]:
        """By stage: `workers`, `tasks`, means for a task of what `means` names, and the sums of what `sums` does."""
        return {name: self._stage(name, means, sums) for name in self.stage_names(order)}

    def _stage(self, name: str, means: Collection[str], sums: Collection[str]) -> dict[str, Any]:
        found = self._sums[name]
        tasks = found["tasks"]
        return {
            "workers": len(self._workers[name]),
            "tasks": tasks,
            **{key: round(found.get(key, 0) / tasks, 3) if tasks else 0.0 for key in means},
            **{key: found.get(key, 0) for key in sums},
        }


def percentiles(values: Collection[float]) -> dict[str, float]:
    """The median, the 95th and the 99th: values that were there; empty where there are none."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {f"p{percent}": round(ordered[round(last * percent / 100)], 1) for percent in (50, 95, 99) if ordered}
