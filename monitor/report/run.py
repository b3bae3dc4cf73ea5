"""A run as a report sees it: its points, which part of it is measured, and what it is a repeat of. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from monitor.analysis.measurement_window import Kind, PointsByName, Window, number, window_of
from monitor.analysis.run_metrics import Figures, measured
from monitor.bench.manifest import Manifest
from monitor.points.points import Point, Value

_NS_PER_S = 1e9


@dataclass(frozen=True)
class ReportRun:
    """One run. `warm_up`: so many of its first requests, or steps, are not measured.

    What it tells raises `NoSamples` where nothing of it is measured.
    """

    name: str
    points: PointsByName
    group: str = ""  # what it is a repeat of; runs of one group are shown as one
    warm_up: int = 0
    # Of a sweep: what it varied, and its value here, if it has one; and what the sweep is of.
    setting: tuple[str, float | None] | None = None
    sweep: str = ""
    manifest: Manifest | None = None

    @property
    def label(self) -> str:
        return self.group or self.name

    @property
    def kind(self) -> Kind:
        return self.window.kind

    @cached_property
    def window(self) -> Window:
        """What of it is measured."""
        return window_of(self.points, self.warm_up)

    @cached_property
    def figures(self) -> Figures:
        """All that `sparse bench` tells of it, too."""
        return measured(self.points, self.warm_up)

    @cached_property
    def pipelines(self) -> tuple[str, ...]:
        """The names of the pipelines that its points are of."""
        return tuple(sorted({point.tags.get("pipeline", "") for point in self.window.counted} - {""}))

    @property
    def duration_s(self) -> float:
        """Of the measured part, by the clock."""
        return self.window.span_s

    def rows(self, end: Point) -> int:
        """How many samples a request or step is."""
        return round(number(end, "rows")) if self.kind == "training" else 1

    def seconds(self, point: Point) -> float:
        """Since the measured part began: zero of all time axes."""
        return (point.time_ns - self.window.begin_ns) / _NS_PER_S


def measured_number(value: Value) -> float | None:
    """A field as a number, or None where there is none."""
    return float(value) if isinstance(value, int | float) else None


def groups_of(runs: Iterable[ReportRun]) -> dict[str, Sequence[ReportRun]]:
    """The runs by what they are repeats of, in the order in which they came."""
    found: dict[str, list[ReportRun]] = {}
    for run in runs:
        found.setdefault(run.label, []).append(run)
    return dict(found)
