"""Which figures a report has, and what is said of each: the paper's, and ours. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from monitor.report import resource_tables as report_load
from monitor.report import workload_tables as report_tables
from monitor.report.run import ReportRun, group_runs
from monitor.report.table import DataTable, LinePlot, OmittedFigure, ReportFigure, StackedBars
from monitor.report.timeseries import bin_width_s

# A distribution whose largest value is so many times its median is drawn over a logarithmic axis.
_WIDE = 20.0

# All figures that there may be: a later report takes them away.
FIGURE_NAMES = (
    "completion", "where", "latency", "network", "network-cdf", "link-bytes", "gpu", "cpu", "energy", "cpu-seconds",
    "sweep", "learning-step", "learning-time",
)  # fmt: skip

# A figure, and why it is not there should its table be empty.
_Maybe = tuple[ReportFigure, str]


def build_figures(runs: Sequence[ReportRun]) -> tuple[list[ReportFigure], list[OmittedFigure]]:
    """All figures that any of the runs, which are of one kind, has the numbers for; and those that none has."""
    found: list[ReportFigure] = []
    absent: list[OmittedFigure] = []
    trains = runs[0].kind == "training"
    makers: tuple[Callable[[Sequence[ReportRun]], list[_Maybe]], ...] = (
        _completion, _step_spent if trains else _time_spent, _latency, _network, _node, _cost, _sweep,
        *((_learning,) if trains else ()),
    )  # fmt: skip
    for figure, reason in (each for maker in makers for each in maker(runs)):
        if figure.table:
            found.append(figure)
        else:
            absent.append(OmittedFigure(figure.title, reason))
    return found, absent


def _end(runs: Sequence[ReportRun]) -> str:
    """What ends: a request, or a step."""
    return "step" if runs[0].kind == "training" else "request"


def _sample(runs: Sequence[ReportRun]) -> str:
    return "row" if runs[0].kind == "training" else "request"


def _time(runs: Sequence[ReportRun]) -> str:
    return f"time since the first measured {_end(runs)} (s)"


def _completion(runs: Sequence[ReportRun]) -> list[_Maybe]:
    caption = "How far each run was, after how long: the steeper, the faster; straight: an even pace."
    if any(len(repeats) > 1 for repeats in group_runs(runs).values()):
        caption += " The line is the median of the repeats, the band reaches from the least to the most."
    label = f"share of {_sample(runs)}s done"
    shape = LinePlot("time_s", "share", _time(runs), label, band_axis="x", stepped=True, y_is_fraction=True)
    return [
        (
            ReportFigure("completion", "Completion", caption, report_tables.completion_table(runs), shape),
            "nothing ended",
        )
    ]


def _time_spent(runs: Sequence[ReportRun]) -> list[_Maybe]:
    caption = (
        "Mean time of one request, along its way: what each stage spent on queueing, decoding, computing and "
        "encoding; the rest of the round trip is the network. No clocks need to agree for this. " + _way(runs)
    )
    shape = StackedBars("ms", "ms of a request", group_by="stage")
    figure = ReportFigure("where", "Where the time went", caption, report_tables.request_time_table(runs), shape)
    return [(figure, "no stage said how long it took")]


def _way(runs: Sequence[ReportRun]) -> str:
    """The stages in their order: above a short part of a bar there is no room for a name."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for name, repeats in group_runs(runs).items():
        stages = tuple(dict.fromkeys(stage for run in repeats for stage in run.metrics.stages))
        if stages:
            ways.setdefault(stages, []).append(name)
    listed = [", ".join(stages) for stages in ways]
    if len(listed) < 2:
        return f"Stages, in order: {listed[0]}." if listed else ""
    each = (f"of {', '.join(names)}: {said}" for names, said in zip(ways.values(), listed, strict=True))
    return f"Stages, in order, {'; '.join(each)}."


def _step_spent(runs: Sequence[ReportRun]) -> list[_Maybe]:
    caption = (
        "Mean time of one training step in which the workers of each stage computed, by phase. Stages work at the same "
        "time, so each has a bar of its own; what is left of the step they waited."
    )
    shape = StackedBars("ms", "ms of a step", bar="stage")
    figure = ReportFigure("where", "Where the time went", caption, report_tables.step_time_table(runs), shape)
    return [(figure, "no stage said how long it took")]


def _latency(runs: Sequence[ReportRun]) -> list[_Maybe]:
    what, table = _end(runs), report_tables.latency_table(runs)
    caption = (
        f"The share of {what}s that took at most so long: the further left, the faster; a long way right at the top "
        "are the slowest few. Repeats are taken together."
    )
    shape = LinePlot(
        "latency_ms", "share", f"latency of a {what} (ms)", f"share of {what}s",
        stepped=True, y_is_fraction=True, log_x=_is_wide(table, "latency_ms"),
    )  # fmt: skip
    percentiles = report_tables.percentiles_table(runs)
    return [(ReportFigure("latency", f"Latency of {what}s", caption, table, shape, percentiles), "nothing ended")]


def _is_wide(table: DataTable, column: str) -> bool:
    ordered = sorted(table.floats(column))
    return bool(ordered) and ordered[0] > 0 and ordered[-1] > _WIDE * ordered[len(ordered) // 2]


def _network(runs: Sequence[ReportRun]) -> list[_Maybe]:
    links = report_load.network_measurement(runs) == "links"
    over = "between sites, both ways" if links else "over all interfaces, both ways, the loopback once"
    caption = f"Megabytes a second {over}. {_width(runs)}"
    share = "The share of the time in which the network carried at most so much: far left: idle; at a step: full."
    sample, unseen = _sample(runs), _no_counter(runs, "links or interfaces", "link", "interface")
    crossed = f"What crossed the links between sites for one {sample}, by direction."
    rate = LinePlot("time_s", "rate_mb_per_s", _time(runs), "MB/s", band_axis="y")
    shares = LinePlot("rate_mb_per_s", "share", "MB/s", "share of the time", stepped=True, y_is_fraction=True)
    distribution, stacks = (
        report_load.network_distribution_table(runs),
        StackedBars("kb_per_sample", f"kB for a {sample}"),
    )
    return [
        (
            ReportFigure("network", "Network rate", caption, report_load.network_rate_table(runs), rate),
            unseen,
        ),
        (
            ReportFigure("network-cdf", "Network rate, distribution", share, distribution, shares),
            unseen,
        ),
        (
            ReportFigure("link-bytes", "Bytes between sites", crossed, report_load.link_bytes_table(runs), stacks),
            "all of it was on one site: there are no links",
        ),
    ]


def _no_counter(runs: Sequence[ReportRun], what: str, *measurements: str) -> str:
    """Why nothing is known of something that a monitor counts."""
    if any(run.points.get(name) for run in runs for name in measurements):
        return (
            f"no monitor saw {what} from the beginning to the end of any {bin_width_s(runs):g} s, or of a shorter run"
        )
    return f"no monitor saw {what}"


def _width(runs: Sequence[ReportRun]) -> str:
    return f"Means over {bin_width_s(runs):g} s."


def _node(runs: Sequence[ReportRun]) -> list[_Maybe]:
    gpu = LinePlot("time_s", "value", _time(runs), "", panel="of", band_axis="y")
    cores = LinePlot("time_s", "cores", _time(runs), "cores", series="process", panel="run", band_axis="y")
    powered = f"GPUs and power rails of the nodes. {_width(runs)}"
    busy = f"How many cores each process kept busy; brokers count, the monitor does not. {_width(runs)}"
    unseen = _no_counter(runs, "the processes", "process")
    return [
        (ReportFigure("gpu", "GPU use and power", powered, report_load.gpu_table(runs), gpu), _no_power(runs)),
        (ReportFigure("cpu", "Processors", busy, report_load.cpu_table(runs), cores), unseen),
    ]


def _no_power(runs: Sequence[ReportRun]) -> str:
    said = report_load.missing_sensor_reasons(runs, "gpu", "rapl", "jetson")
    return f"no sensor of power could be read ({said})" if said else "no monitor saw a sensor of power"


def _cost(runs: Sequence[ReportRun]) -> list[_Maybe]:
    sample, energy = _sample(runs), report_load.energy_table(runs)
    drew = f"What the nodes drew for one {sample}, idle share included, by sensor."
    took = (
        f"Seconds of processor time for one {sample}, by what the processes are; brokers count, the monitor does not."
    )
    took += "" if energy else " No power sensor could be read, so this stands for the energy."
    joules, seconds = StackedBars("j_per_sample", f"J for a {sample}"), StackedBars("s_per_sample", f"s for a {sample}")
    return [
        (ReportFigure("energy", "Energy", drew, energy, joules), _no_power(runs)),
        (
            ReportFigure("cpu-seconds", "Processor time", took, report_load.cpu_seconds_table(runs), seconds),
            "no monitor saw the processes",
        ),
    ]


def _sweep(runs: Sequence[ReportRun]) -> list[_Maybe]:
    what = next((run.sweep_setting[0] for run in runs if run.sweep_setting), "batch")
    caption = "The median of the repeats at each value; the bar reaches from the least to the most."
    shape = LinePlot("value", "throughput_per_s", what, f"{_sample(runs)}s/s", band_axis="y", markers=True)
    figure = ReportFigure("sweep", f"Throughput by {what}", caption, report_tables.sweep_table(runs), shape)
    return [(figure, "none of the runs is part of a sweep")]


def _learning(runs: Sequence[ReportRun]) -> list[_Maybe]:
    found = []
    for name, over, title, label, caption in (
        (
            "step",
            "step",
            "Learning, by step",
            "step",
            "Loss and accuracy of each step: the same work, whatever it took.",
        ),
        ("time", "time_s", "Learning, by time", _time(runs), "Loss and accuracy of each step."),
    ):
        shape = LinePlot(over, "value", label, "", panel="of", band_axis="y")
        figure = ReportFigure(f"learning-{name}", title, caption, report_tables.learning_table(runs, over), shape)
        found.append((figure, "no step has a loss"))
    return found
