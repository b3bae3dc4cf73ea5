"""The figures of a report: those of the paper, and more; with their titles, captions and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from monitor.report import resource_tables, workload_tables
from monitor.report.run import ReportRun, group_runs
from monitor.report.table import LinePlot, ReportFigure, StackedBars
from monitor.report.timeseries import bin_width_s

# A distribution has a logarithmic axis if its maximum is more than this many times its median.
_WIDE_RANGE = 20.0
# All figures that a report may have, so that a new report can remove those of an old one in its folder.
FIGURE_NAMES = [
    "completion",
    "where",
    "latency",
    "network",
    "network-cdf",
    "link-bytes",
    "gpu",
    "cpu",
    "energy",
    "cpu-seconds",
    "sweep",
    "learning-step",
    "learning-time",
]


def build_figures(runs: Sequence[ReportRun]) -> tuple[list[ReportFigure], list[ReportFigure]]:
    """The figures that have data, and those that have none; all runs are of one kind."""
    is_training = runs[0].kind == "training"
    builders: list[Callable[[Sequence[ReportRun]], Iterable[ReportFigure]]] = [
        _completion,
        _step_time if is_training else _request_time,
        _latency,
        _network,
        _processors,
        _cost,
        _sweep,
    ]
    if is_training:
        builders.append(_learning)
    figures = [figure for build in builders for figure in build(runs)]
    return [figure for figure in figures if figure.table], [figure for figure in figures if not figure.table]


def _event(runs: Sequence[ReportRun]) -> str:
    return "step" if runs[0].kind == "training" else "request"


def _sample(runs: Sequence[ReportRun]) -> str:
    return "row" if runs[0].kind == "training" else "request"


def _time_label(runs: Sequence[ReportRun]) -> str:
    return f"time since the first measured {_event(runs)} (s)"


def _bins(runs: Sequence[ReportRun]) -> str:
    return f"Means over {bin_width_s(runs):g} s."


def _completion(runs: Sequence[ReportRun]) -> Iterable[ReportFigure]:
    caption = "The share of samples completed over time. Steeper is faster; a straight line is a constant rate."
    if any(len(repeats) > 1 for repeats in group_runs(runs).values()):
        caption += " Repeats: the line is their median, the band their range."
    label = f"share of {_sample(runs)}s completed"
    plot = LinePlot("time_s", "share", _time_label(runs), label, band_axis="x", stepped=True, y_is_fraction=True)
    table = workload_tables.completion_table(runs)
    yield ReportFigure("completion", "Completion", caption, table, plot, f"no {_event(runs)} ended")


def _request_time(runs: Sequence[ReportRun]) -> Iterable[ReportFigure]:
    caption = (
        "The mean time of a request on its path through the stages: queueing, decoding, computing and encoding. The "
        "rest of the round trip is the network; clocks need not be synchronised. " + _stage_order(runs)
    )
    plot = StackedBars("ms", "ms per request", group_by="stage")
    table = workload_tables.request_time_table(runs)
    yield ReportFigure("where", "Time by stage", caption, table, plot, "no stage reported its times")


def _stage_order(runs: Sequence[ReportRun]) -> str:
    """The stages in order; a short part of a bar has no room for the name of its stage."""
    labels_by_order: dict[tuple[str, ...], list[str]] = {}
    for label, repeats in group_runs(runs).items():
        stages = tuple(dict.fromkeys(stage for run in repeats for stage in run.metrics.stages))
        if stages:
            labels_by_order.setdefault(stages, []).append(label)
    if not labels_by_order:
        return ""
    if len(labels_by_order) == 1:
        return f"Stages in order: {', '.join(*labels_by_order)}."
    orders = (f"{', '.join(labels)}: {', '.join(stages)}" for stages, labels in labels_by_order.items())
    return f"Stages in order, for {'; for '.join(orders)}."


def _step_time(runs: Sequence[ReportRun]) -> Iterable[ReportFigure]:
    caption = (
        "The mean time of a training step that the workers of each stage compute, by phase; the rest of the step they "
        "are idle. Stages compute at the same time, so each has a separate bar."
    )
    table = workload_tables.step_time_table(runs)
    plot = StackedBars("ms", "ms per step", bar="stage")
    yield ReportFigure("where", "Time by stage", caption, table, plot, "no stage reported its times")


def _latency(runs: Sequence[ReportRun]) -> Iterable[ReportFigure]:
    event = _event(runs)
    title = "Step duration" if event == "step" else "Request latency"
    table = workload_tables.latency_table(runs)
    caption = (
        f"The share of {event}s that took at most a given time. Further left is faster; a long tail at the top right "
        "is a few slow ones. Repeats are combined."
    )
    plot = LinePlot(
        "latency_ms",
        "share",
        f"{title.lower()} (ms)",
        f"share of {event}s",
        stepped=True,
        y_is_fraction=True,
        log_x=_has_wide_range(table.floats("latency_ms")),
    )
    percentiles = workload_tables.percentiles_table(runs)
    yield ReportFigure("latency", title, caption, table, plot, f"no {event} ended", percentiles)


def _has_wide_range(values: Sequence[float]) -> bool:
    ordered = sorted(values)
    return bool(ordered) and ordered[0] > 0 and ordered[-1] > _WIDE_RANGE * ordered[len(ordered) // 2]


def _network(runs: Sequence[ReportRun]) -> Iterable[ReportFigure]:
    links = resource_tables.has_links(runs)
    where = "on the links between sites" if links else "over all interfaces (loopback counted once)"
    no_data = _no_counter(runs, "links or interfaces", "link", "interface")
    yield ReportFigure(
        "network",
        "Network rate",
        f"Megabytes per second {where}, both directions. {_bins(runs)}",
        resource_tables.network_rate_table(runs),
        LinePlot("time_s", "rate_mb_per_s", _time_label(runs), "MB/s", band_axis="y"),
        no_data,
    )
    yield ReportFigure(
        "network-cdf",
        "Network rate, distribution",
        "The share of time with at most a given network rate. Far left is idle; a vertical step is a saturated link.",
        resource_tables.network_distribution_table(runs),
        LinePlot("rate_mb_per_s", "share", "MB/s", "share of time", stepped=True, y_is_fraction=True),
        no_data,
    )
    yield ReportFigure(
        "link-bytes",
        "Traffic between sites",
        f"Bytes per {_sample(runs)} on each link between sites, by direction.",
        resource_tables.link_bytes_table(runs),
        StackedBars("kb_per_sample", f"kB per {_sample(runs)}"),
        "there are no links: everything ran on one site",
    )


def _no_counter(runs: Sequence[ReportRun], what: str, *measurements: str) -> str:
    """Why there are no rates of a counter that the monitor samples."""
    if any(run.points.get(name) for run in runs for name in measurements):
        return f"the monitor's samples of {what} cover no whole bin of {bin_width_s(runs):g} s"
    return f"the monitor sampled no {what}"


def _processors(runs: Sequence[ReportRun]) -> Iterable[ReportFigure]:
    yield ReportFigure(
        "gpu",
        "GPU use and power",
        f"GPUs and power rails of the nodes. {_bins(runs)}",
        resource_tables.gpu_table(runs),
        LinePlot("time_s", "value", _time_label(runs), "", panel="of", band_axis="y"),
        _no_power_sensor(runs),
    )
    yield ReportFigure(
        "cpu",
        "CPU use",
        f"CPU cores that each process uses; brokers are included, the monitor is not. {_bins(runs)}",
        resource_tables.cpu_table(runs),
        LinePlot("time_s", "cores", _time_label(runs), "cores", series="process", panel="run", band_axis="y"),
        _no_counter(runs, "processes", "process"),
    )


def _no_power_sensor(runs: Sequence[ReportRun]) -> str:
    reasons = resource_tables.missing_sensor_reasons(runs, "gpu", "rapl", "jetson")
    return f"no power sensor could be read ({reasons})" if reasons else "the monitor sampled no power sensor"


def _cost(runs: Sequence[ReportRun]) -> Iterable[ReportFigure]:
    sample = _sample(runs)
    energy = resource_tables.energy_table(runs)
    yield ReportFigure(
        "energy",
        "Energy",
        f"Energy of the whole nodes per {sample}, by sensor, including their idle power.",
        energy,
        StackedBars("j_per_sample", f"J per {sample}"),
        _no_power_sensor(runs),
    )
    caption = f"CPU time per {sample}, by role of the process; brokers are included, the monitor is not."
    if not energy:
        caption += " No power sensor could be read: this stands for the energy."
    yield ReportFigure(
        "cpu-seconds",
        "CPU time",
        caption,
        resource_tables.cpu_seconds_table(runs),
        StackedBars("s_per_sample", f"s per {sample}"),
        "the monitor sampled no processes",
    )


def _sweep(runs: Sequence[ReportRun]) -> Iterable[ReportFigure]:
    varied = next((run.sweep_setting[0] for run in runs if run.sweep_setting), "batch")
    caption = "The median throughput of the repeats at each value; error bars are their range."
    plot = LinePlot("value", "throughput_per_s", varied, f"{_sample(runs)}s/s", band_axis="y", markers=True)
    table = workload_tables.sweep_table(runs)
    yield ReportFigure("sweep", f"Throughput by {varied}", caption, table, plot, "no run is part of a sweep")


def _learning(runs: Sequence[ReportRun]) -> Iterable[ReportFigure]:
    axes: tuple[tuple[Literal["step", "time_s"], str], ...] = (("step", "step"), ("time_s", _time_label(runs)))
    for x, label in axes:
        name = "step" if x == "step" else "time"
        caption = f"Loss and accuracy of each training step, over {'the steps' if x == 'step' else 'time'}."
        table = workload_tables.learning_table(runs, x)
        plot = LinePlot(x, "value", label, "", panel="of", band_axis="y")
        yield ReportFigure(f"learning-{name}", f"Learning by {name}", caption, table, plot, "no step has a loss")
