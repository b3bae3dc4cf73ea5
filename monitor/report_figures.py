"""Which figures a report has, and what is said of each: the paper's, and ours. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from monitor import report_load, report_tables
from monitor.report_run import ReportRun, groups_of
from monitor.report_series import bin_width_s
from monitor.report_table import Absent, Lines, ReportFigure, Shape, Stacks, Table

_TIME = "time since the first measured {} (s)"
# A distribution whose largest value is so many times its median is drawn over a logarithmic axis.
_WIDE = 20.0


def figures_of(runs: Sequence[ReportRun]) -> tuple[list[ReportFigure], list[Absent]]:
    """All figures that any of the runs, which are of one kind, has the numbers for; and those that none has."""
    found: list[ReportFigure] = []
    absent: list[Absent] = []
    trains = runs[0].kind == "training"
    for figure, reason in (*_progress(runs, trains), *_machine(runs, trains), *_varied(runs, trains)):
        if figure.table:
            found.append(figure)
        elif reason:
            absent.append(Absent(figure.title, reason))
    return found, absent


def _progress(runs: Sequence[ReportRun], trains: bool) -> list[tuple[ReportFigure, str]]:
    what = "step" if trains else "request"
    samples = "rows" if trains else "requests"
    repeated = any(len(repeats) > 1 for repeats in groups_of(runs).values())
    spread = " The line is the median of the repeats, the band reaches from the least to the most." if repeated else ""
    completion = Lines(
        "time_s", "share", _TIME.format(what), f"share of {samples} done", spread="x", steps=True, share=True
    )
    latency = report_tables.latency(runs)
    spent = report_tables.step_spent(runs) if trains else report_tables.time_spent(runs)
    where = (
        "Mean time of one training step in which the workers of each stage computed, by phase. Stages work at the same "
        "time, so each has a bar of its own; what is left of the step they waited."
        if trains
        else "Mean time of one request, along its way: what each stage spent on queueing, decoding, computing and "
        "encoding; the rest of the round trip is the network. No clocks need to agree for this."
    )
    shape = Stacks("ms", "ms of a step", bar="stage") if trains else Stacks("ms", "ms of a request", within="stage")
    return [
        (
            ReportFigure(
                "completion",
                "Completion",
                f"How far each run was, after how long: the steeper, the faster; straight: an even pace.{spread}",
                report_tables.completion(runs),
                completion,
            ),
            "",
        ),
        (
            ReportFigure("where", "Where the time went", where, spent, shape),
            "no stage said how long it took",
        ),
        (
            ReportFigure(
                "latency",
                f"Latency of {'steps' if trains else 'requests'}",
                f"The share of {what}s that took at most so long: the further left, the faster; a long way right at "
                "the top are the slowest few. Repeats are taken together.",
                latency,
                Lines(
                    "latency_ms", "share", f"latency of a {what} (ms)", f"share of {what}s",
                    steps=True, share=True, log_x=_is_wide(latency, "latency_ms"),
                ),
                report_tables.percentiles(runs),
            ),
            "",
        ),
    ]  # fmt: skip


def _is_wide(table: Table, column: str) -> bool:
    ordered = sorted(table.numbers(column))
    return bool(ordered) and ordered[0] > 0 and ordered[-1] > _WIDE * ordered[len(ordered) // 2]


def _machine(runs: Sequence[ReportRun], trains: bool) -> list[tuple[ReportFigure, str]]:
    time = _TIME.format("step" if trains else "request")
    width = f"Means over {bin_width_s(runs):g} s."
    links = report_load.network_over(runs) == "links"
    over = "between sites, both ways" if links else "over all interfaces, both ways, the loopback once"
    no_network = "no monitor saw links or interfaces"
    said = report_load.why_missing(runs, "gpu", "rapl", "jetson")
    no_power = f"no sensor of power could be read ({said})" if said else "no monitor saw a sensor of power"
    sample = "row" if trains else "request"

    def figure(
        name: str, title: str, caption: str, table: Table, shape: Shape, absent: str
    ) -> tuple[ReportFigure, str]:
        return ReportFigure(name, title, caption, table, shape), absent

    energy = report_load.energy(runs)
    return [
        figure(
            "network", "Network rate", f"Megabytes a second {over}. {width}", report_load.network(runs),
            Lines("time_s", "rate_mb_per_s", time, "MB/s", spread="y"), no_network,
        ),
        figure(
            "network-cdf", "Network rate, distribution",
            "The share of the time in which the network carried at most so much: far left: idle; at a step: full.",
            report_load.network_distribution(runs),
            Lines("rate_mb_per_s", "share", "MB/s", "share of the time", steps=True, share=True), no_network,
        ),
        figure(
            "link-bytes", "Bytes between sites",
            f"What crossed the links between sites for one {sample}, by direction.",
            report_load.link_bytes(runs), Stacks("kb_per_sample", f"kB for a {sample}"),
            "all of it was on one site: there are no links",
        ),
        figure(
            "gpu", "GPU use and power", f"GPUs and power rails of the nodes. {width}", report_load.gpu(runs),
            Lines("time_s", "value", time, "", panel="of", spread="y"), no_power,
        ),
        figure(
            "cpu", "Processors", f"How many cores each process kept busy. {width}", report_load.processors(runs),
            Lines("time_s", "cores", time, "cores", series="process", panel="run", spread="y"),
            "no monitor saw the processes",
        ),
        figure(
            "energy", "Energy", f"What the nodes drew for one {sample}, idle share included, by sensor.", energy,
            Stacks("j_per_sample", f"J for a {sample}"), no_power,
        ),
        figure(
            "cpu-seconds", "Processor time",
            f"Seconds of processor time for one {sample}, by what the processes are"
            + ("." if energy else "; no power sensor could be read, so this stands for the energy."),
            report_load.processor_s(runs), Stacks("s_per_sample", f"s for a {sample}"), "no monitor saw the processes",
        ),
    ]  # fmt: skip


def _varied(runs: Sequence[ReportRun], trains: bool) -> list[tuple[ReportFigure, str]]:
    what = next((run.setting[0] for run in runs if run.setting), "batch")
    per = "rows/s" if trains else "requests/s"
    found = [
        (
            ReportFigure(
                "sweep", f"Throughput by {what}",
                "The median of the repeats at each value; the bar reaches from the least to the most.",
                report_tables.sweep(runs),
                Lines("value", "throughput_per_s", what, per, spread="y", markers=True),
            ),
            "none of the runs is part of a sweep",
        )
    ]  # fmt: skip
    if not trains:
        return found
    for over, name, label in (
        ("step", "Learning, by step", "step"),
        ("time_s", "Learning, by time", _TIME.format("step")),
    ):
        caption = "Loss and accuracy of each step" + (": the same work, whatever it took." if over == "step" else ".")
        shape = Lines(over, "value", label, "", panel="of", spread="y")
        table = report_tables.learning(runs, over)
        found.append(
            (ReportFigure(f"learning-{over.split('_')[0]}", name, caption, table, shape), "no step has a loss")
        )
    return found
