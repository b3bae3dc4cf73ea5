"""The runs of a report, and the groups of repeats in which they are shown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from monitor.analysis.measurement_window import MeasurementWindow, PointsByMeasurement, RunKind, select_window
from monitor.analysis.run_metrics import RunMetrics, compute_run_metrics
from monitor.bench.manifest import Manifest
from monitor.points.points import TelemetryPoint

_NS_PER_S = 1e9


@dataclass(frozen=True)
class ReportRun:
    """One run; its first `warm_up` requests or steps are not measured.

    All properties but `label` raise `NoSamples` for a run without measured samples.
    """

    name: str
    points: PointsByMeasurement
    group: str = ""  # the suite that it is a repeat of; the runs of a group are shown as one
    warm_up: int = 0
    sweep_setting: tuple[str, float | None] | None = None  # what a sweep varied, and its value; None: not cut
    sweep_name: str = ""
    manifest: Manifest | None = None

    @property
    def label(self) -> str:
        return self.group or self.name

    @property
    def kind(self) -> RunKind:
        return self.window.kind

    @property
    def is_training(self) -> bool:
        return self.kind == "training"

    @property
    def event(self) -> str:
        """The unit of progress: step or request."""
        return "step" if self.is_training else "request"

    @property
    def sample(self) -> str:
        """The unit of throughput: row or request."""
        return "row" if self.is_training else "request"

    @cached_property
    def window(self) -> MeasurementWindow:
        return select_window(self.points, self.warm_up)

    @cached_property
    def metrics(self) -> RunMetrics:
        return compute_run_metrics(self.points, self.warm_up)

    def tag_values(self, tag: str) -> list[str]:
        """The values of a tag in the measured requests or steps."""
        return sorted({point.tags.get(tag, "") for point in self.window.points} - {""})

    def seconds_since_start(self, point: TelemetryPoint) -> float:
        """The time since the start of the measured window, which is the zero of all time axes."""
        return (point.time_ns - self.window.begin_ns) / _NS_PER_S


def number_or_none(point: TelemetryPoint, name: str) -> float | None:
    """A field as a number; None where it was not measured."""
    value = point.fields.get(name)
    return float(value) if isinstance(value, int | float) else None


def group_runs(runs: Iterable[ReportRun]) -> dict[str, Sequence[ReportRun]]:
    """The runs by label, in their order."""
    groups: dict[str, list[ReportRun]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return dict(groups)
