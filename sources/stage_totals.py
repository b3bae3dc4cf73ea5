"""Sums by stage of the tasks of a run: the `stages` of its summary, for inference and training."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BYTE_COUNTS = ("bytes_in", "bytes_out")


@dataclass(slots=True)
class StageTotals:
    """Sums of named values by stage, with the number of tasks and the workers that served them."""

    _sums: dict[str, dict[str, float]] = field(default_factory=dict)
    _workers: dict[str, set[str]] = field(default_factory=dict)

    def add(self, stage: str, worker: str, tasks: int, values: Mapping[str, float]) -> None:
        """Add `values`, each a sum over `tasks` tasks that `worker` completed."""
        sums = self._sums.setdefault(stage, {})
        for name, value in {"tasks": tasks, **values}.items():
            sums[name] = sums.get(name, 0) + value
        self._workers.setdefault(stage, set()).add(worker)

    def stage_names(self, order: Sequence[str] = ()) -> list[str]:
        """The stages in `order`; those that are not in it last."""
        return sorted(self._sums, key=lambda name: order.index(name) if name in order else len(order))

    def total(self, stage: str, name: str) -> float:
        return self._sums[stage].get(name, 0)

    def summary(self, order: Sequence[str], means: Collection[str]) -> dict[str, dict[str, Any]]:
        """For each stage: `workers`, `tasks`, the mean per task of each value in `means`, and the sums of bytes."""
        return {name: self._stage_summary(name, means) for name in self.stage_names(order)}

    def _stage_summary(self, name: str, means: Collection[str]) -> dict[str, Any]:
        sums = self._sums[name]
        tasks = sums["tasks"]
        return {
            "workers": len(self._workers[name]),
            "tasks": tasks,
            **{key: round(sums.get(key, 0) / tasks, 3) if tasks else 0.0 for key in means},
            **{key: sums.get(key, 0) for key in BYTE_COUNTS},
        }
