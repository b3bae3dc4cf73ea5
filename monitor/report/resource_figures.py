"""The figures about the cost: network traffic, GPUs, power, CPU time and energy."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from monitor.analysis.measurement_window import number_or_zero
from monitor.analysis.run_metrics import OBSERVER_ROLES
from monitor.points.points import TelemetryPoint
from monitor.report.run import ReportRun, number_or_none
from monitor.report.table import TOTAL, DataTable, LinePlot, ReportFigure, Row, StackedBars, table_of_groups
from monitor.report.timeseries import (
    SpreadSeries,
    TimeSeries,
    aggregate_repeats,
    bin_width_s,
    binned_means,
    binned_rates,
    time_label,
)
from monitor.report.workload_figures import bar_rows, distribution_rows
from monitor.sensors.counters import is_additive

_KILO, _MEGA = 1e3, 1e6
_LOOPBACK = "lo"
# The order of process roles in a bar; others follow.
_ROLES = ("stage", "source", "run", "broker")
# Lines per panel; the processes with the least CPU time are shown as one.
_MAX_PROCESSES = 7
_OTHERS = "others"
# The panels of the GPU figure: measurement, field, tag of a device, and how the values of several devices combine.
_GPU_PANELS: Mapping[str, tuple[str, str, str, Callable[[Iterable[float]], float]]] = {
    "GPU use (share)": ("gpu", "use", "gpu", fmean),
    "GPU power (W)": ("gpu", "power_w", "gpu", sum),
    "other power (W)": ("power", "power_w", "rail", sum),
}


def network(runs: Sequence[ReportRun]) -> ReportFigure:
    """Megabytes per second in both directions, over time."""
    rates_of = _network_rates(runs)
    table = table_of_groups(
        ("time_s", "rate_mb_per_s", "low", "high"), runs, lambda repeats: aggregate_repeats(map(rates_of, repeats))
    )
    where = "on the links between sites" if _has_links(runs) else "over all interfaces (loopback counted once)"
    caption = f"Megabytes per second {where}, both directions. {_bins(runs)}"
    plot = LinePlot("time_s", "rate_mb_per_s", time_label(runs), "MB/s", band_axis="y")
    return ReportFigure("Network rate", caption, table, plot, _no_network(runs))


def network_distribution(runs: Sequence[ReportRun]) -> ReportFigure:
    """The cumulative distribution of the network rate over all repeats."""
    rates_of = _network_rates(runs)
    table = table_of_groups(
        ("rate_mb_per_s", "share"),
        runs,
        lambda repeats: distribution_rows(rate for run in repeats for _, rate in rates_of(run)),
    )
    caption = (
        "The share of time with at most a given network rate. Far left is idle; a vertical step is a saturated link."
    )
    plot = LinePlot("rate_mb_per_s", "share", "MB/s", "share of time", stepped=True, y_is_fraction=True)
    return ReportFigure("Network rate, distribution", caption, table, plot, _no_network(runs))


def _has_links(runs: Iterable[ReportRun]) -> bool:
    """Whether any run has links between sites: then the network figures are of links, otherwise of interfaces."""
    return any(run.points.get("link") for run in runs)


def _network_rates(runs: Sequence[ReportRun]) -> Callable[[ReportRun], TimeSeries]:
    are_links = _has_links(runs)
    width_s = bin_width_s(runs)

    def bytes_of(point: TelemetryPoint) -> float:
        if are_links:
            return number_or_zero(point, "bytes_out") + number_or_zero(point, "bytes_in")
        # A byte over the loopback is both sent and received on this node: count it once.
        received = 0.0 if point.tags.get("interface") == _LOOPBACK else number_or_zero(point, "received_bytes")
        return received + number_or_zero(point, "sent_bytes")

    def rates(run: ReportRun) -> TimeSeries:
        points = run.points.get("link" if are_links else "interface", ())
        total = binned_rates(run, points, bytes_of, width_s, is_delta=not are_links).get("", ())
        return [(time_s, rate / _MEGA) for time_s, rate in total]

    return rates


def _bins(runs: Sequence[ReportRun]) -> str:
    return f"Means over {bin_width_s(runs):g} s."


def _no_network(runs: Sequence[ReportRun]) -> str:
    return _no_counter(runs, "links or interfaces", "link", "interface")


def _no_counter(runs: Sequence[ReportRun], counters: str, *measurements: str) -> str:
    """Why there are no rates of a counter that the monitor samples."""
    if any(run.points.get(name) for run in runs for name in measurements):
        return f"the monitor's samples of {counters} cover no whole bin of {bin_width_s(runs):g} s"
    return f"the monitor sampled no {counters}"


def gpu(runs: Sequence[ReportRun]) -> ReportFigure:
    """GPU utilisation, GPU power and the power of other rails, over time."""
    width_s = bin_width_s(runs)

    def series(run: ReportRun, panel: str) -> TimeSeries:
        measurement, field, tag, combine = _GPU_PANELS[panel]
        points = [point for point in run.points.get(measurement, ()) if is_additive(point.tags[tag])]
        return binned_means(run, points, field, tag, width_s, combine)

    def rows_of(repeats: Sequence[ReportRun]) -> Iterable[Row]:
        for panel in _GPU_PANELS:
            yield from ((panel, *row) for row in aggregate_repeats(series(run, panel) for run in repeats))

    table = table_of_groups(("of", "time_s", "value", "low", "high"), runs, rows_of)
    plot = LinePlot("time_s", "value", time_label(runs), "", panel="of", band_axis="y")
    caption = f"GPUs and power rails of the nodes. {_bins(runs)}"
    return ReportFigure("GPU use and power", caption, table, plot, _no_power(runs))


def cpu(runs: Sequence[ReportRun]) -> ReportFigure:
    """The CPU cores that each process uses, over time."""
    width_s = bin_width_s(runs)

    def rows_of(repeats: Sequence[ReportRun]) -> Iterable[Row]:
        rates = [_cpu_rates(run, width_s) for run in repeats]
        curves = {name: aggregate_repeats(each.get(name, ()) for each in rates) for name in _keys(rates)}
        for name, curve in _combine_smallest(curves).items():
            yield from ((name, *row) for row in curve)

    table = table_of_groups(("process", "time_s", "cores", "low", "high"), runs, rows_of)
    plot = LinePlot("time_s", "cores", time_label(runs), "cores", series="process", panel="run", band_axis="y")
    caption = f"CPU cores that each process uses; brokers are included, the monitor is not. {_bins(runs)}"
    return ReportFigure("CPU use", caption, table, plot, _no_counter(runs, "processes", "process"))


def _cpu_rates(run: ReportRun, width_s: float) -> dict[str, TimeSeries]:
    """CPU use by process: each worker in the order of a request's path, then the sum of each other role."""
    hops = sorted(run.points.get("hop", ()), key=lambda hop: (number_or_zero(hop, "place"), hop.tags.get("worker", "")))
    workers = list(dict.fromkeys(hop.tags.get("worker", "") for hop in hops))
    points = [
        point
        for point in run.points.get("process", ())
        if point.tags.get("role") not in OBSERVER_ROLES and number_or_none(point, "cpu_s") is not None
    ]

    def order(point: TelemetryPoint) -> tuple[int, str, int, str, int]:
        role, name = point.tags["role"], point.tags["name"]
        return _index(role, _ROLES), role, _index(name, workers), name, point.time_ns

    def process(point: TelemetryPoint) -> str:
        return point.tags["name"] if point.tags["role"] == "stage" else point.tags["role"]

    points.sort(key=order)
    return binned_rates(run, points, lambda point: number_or_zero(point, "cpu_s"), width_s, process, is_delta=False)


def _combine_smallest(curves: Mapping[str, SpreadSeries]) -> dict[str, SpreadSeries]:
    """The largest curves by the sum of their medians, in their order, and the sum of all others."""
    largest = sorted(curves, key=lambda name: -sum(median for _, median, *_ in curves[name]))[:_MAX_PROCESSES]
    others: dict[float, float] = defaultdict(float)
    for name in curves.keys() - set(largest):
        for time_s, median, *_ in curves[name]:
            others[time_s] += median
    combined = {name: curve for name, curve in curves.items() if name in largest}
    if others:
        combined[_OTHERS] = [(time_s, cores, None, None) for time_s, cores in sorted(others.items())]
    return combined


def cpu_seconds(runs: Sequence[ReportRun]) -> ReportFigure:
    """Seconds of CPU time per sample, by the role of the processes."""
    caption = f"CPU time per {runs[0].sample}, by role of the process; brokers are included, the monitor is not."
    if not any(run.metrics.energy_j for run in runs):
        caption += " No power sensor could be read: this stands for the energy."
    bars = _per_sample("s", runs, lambda run: run.metrics.cpu_s, _ROLES)
    return ReportFigure("CPU time", caption, *bars, "the monitor sampled no processes")


def energy(runs: Sequence[ReportRun]) -> ReportFigure:
    """Joules of the whole node per sample, by sensor."""
    caption = f"Energy of the whole nodes per {runs[0].sample}, by sensor, including their idle power."
    bars = _per_sample("J", runs, lambda run: run.metrics.energy_j or {})
    return ReportFigure("Energy", caption, *bars, _no_power(runs))


def link_bytes(runs: Sequence[ReportRun]) -> ReportFigure:
    """Kilobytes per sample on each link between two sites, by direction."""

    def by_direction(run: ReportRun) -> dict[str, float]:
        traffic: dict[str, float] = {}
        for link, counts in run.metrics.links.items():
            site, _, peer = link.partition(" - ")
            traffic[f"{site} to {peer}"] = counts.bytes_out / _KILO
            traffic[f"{peer} to {site}"] = counts.bytes_in / _KILO
        return traffic

    caption = f"Bytes per {runs[0].sample} on each link between sites, by direction."
    bars = _per_sample("kB", runs, by_direction)
    return ReportFigure("Traffic between sites", caption, *bars, "there are no links: everything ran on one site")


def _per_sample(
    unit: str,
    runs: Sequence[ReportRun],
    parts_of: Callable[[ReportRun], Mapping[str, float]],
    first_parts: Sequence[str] = (),
) -> tuple[DataTable, StackedBars]:
    """One bar per group of runs, with the parts in the same order in every bar."""
    parts = sorted(_keys(map(parts_of, runs)), key=lambda part: _index(part, first_parts))
    column = f"{unit.lower()}_per_sample"
    table = table_of_groups(
        ("part", column, "low", "high"),
        runs,
        lambda repeats: bar_rows(
            [{(name,): value for name, value in parts_of(run).items()} for run in repeats],
            (TOTAL,),
            [(part,) for part in parts],
        ),
    )
    return table, StackedBars(column, f"{unit} per {runs[0].sample}")


def _no_power(runs: Iterable[ReportRun]) -> str:
    """Why there is no power and no energy."""
    reasons = {run.metrics.energy_missing_reason for run in runs} - {""}
    return f"no power was measured: {'; '.join(sorted(reasons))}"


def _index(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _keys(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
