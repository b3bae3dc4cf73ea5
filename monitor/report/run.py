"""A run as a report sees it: its points, which part of it is measured, and what it is a repeat of. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from monitor.analysis.measurement_window import (
    MeasurementWindow,
    PointsByMeasurement,
    RunKind,
    number_or_zero,
    select_window,
)
from monitor.analysis.run_metrics import RunMetrics, compute_run_metrics
from monitor.bench.manifest import Manifest
from monitor.points.points import FieldValue, TelemetryPoint

_NS_PER_S = 1e9


@dataclass(frozen=True)
class ReportRun:
    """One run. `warm_up`: so many of its first requests, or steps, are not measured.

    What it tells raises `NoSamples` where nothing of it is measured.
    """

    name: str
    points: PointsByMeasurement
    group: str = ""  # what it is a repeat of; runs of one group are shown as one
    warm_up: int = 0
    # Of a sweep: what it varied, and its value here, if it has one; and what the sweep is of.
    sweep_setting: tuple[str, float | None] | None = None
    sweep_name: str = ""
    manifest: Manifest | None = None

    @property
    def label(self) -> str:
        return self.group or self.name

    @property
    def kind(self) -> RunKind:
        return self.window.kind

    @cached_property
    def window(self) -> MeasurementWindow:
        """What of it is measured."""
        return select_window(self.points, self.warm_up)

    @cached_property
    def metrics(self) -> RunMetrics:
        """All that `sparse bench` tells of it, too."""
        return compute_run_metrics(self.points, self.warm_up)

    @cached_property
    def pipelines(self) -> tuple[str, ...]:
        """The names of the pipelines that its points are of."""
        return tuple(sorted({point.tags.get("pipeline", "") for point in self.window.points} - {""}))

    @property
    def duration_s(self) -> float:
        """Of the measured part, by the clock."""
        return self.window.span_s

    def sample_count(self, end: TelemetryPoint) -> int:
        """How many samples a request or step is."""
        return round(number_or_zero(end, "rows")) if self.kind == "training" else 1

    def seconds_since_start(self, point: TelemetryPoint) -> float:
        """Since the measured part began: zero of all time axes."""
        return (point.time_ns - self.window.begin_ns) / _NS_PER_S


def number_or_none(value: FieldValue) -> float | None:
    """A field as a number, or None where there is none."""
    return float(value) if isinstance(value, int | float) else None


def group_runs(runs: Iterable[ReportRun]) -> dict[str, Sequence[ReportRun]]:
    """The runs by what they are repeats of, in the order in which they came."""
    found: dict[str, list[ReportRun]] = {}
    for run in runs:
        found.setdefault(run.label, []).append(run)
    return dict(found)
