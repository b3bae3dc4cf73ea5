"""The figures of a report: those of the paper, and more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from monitor.report import resource_figures, workload_figures
from monitor.report.run import ReportRun
from monitor.report.table import ReportFigure

_GENERAL: Mapping[str, Callable[[Sequence[ReportRun]], ReportFigure]] = {
    "completion": workload_figures.completion,
    "where": workload_figures.stage_time,
    "latency": workload_figures.latency,
    "network": resource_figures.network,
    "network-cdf": resource_figures.network_distribution,
    "link-bytes": resource_figures.link_bytes,
    "gpu": resource_figures.gpu,
    "cpu": resource_figures.cpu,
    "energy": resource_figures.energy,
    "cpu-seconds": resource_figures.cpu_seconds,
    "sweep": workload_figures.sweep,
}
_TRAINING: Mapping[str, Callable[[Sequence[ReportRun]], ReportFigure]] = {
    "learning-step": partial(workload_figures.learning, x="step"),
    "learning-time": partial(workload_figures.learning, x="time_s"),
}
# All figures that a report may have, so that a new report can remove those of an old one in its folder.
FIGURE_NAMES = (*_GENERAL, *_TRAINING)


def build_figures(runs: Sequence[ReportRun]) -> tuple[list[ReportFigure], list[ReportFigure]]:
    """The figures that have data, and those that have none; all runs are of one kind."""
    builders = {**_GENERAL, **_TRAINING} if runs[0].is_training else _GENERAL
    figures = [replace(build(runs), name=name) for name, build in builders.items()]
    return [figure for figure in figures if figure.table], [figure for figure in figures if not figure.table]
