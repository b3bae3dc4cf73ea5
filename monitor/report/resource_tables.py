"""The data of the figures about the cost: network traffic, GPUs, power, CPU time and energy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from monitor.analysis.counter_series import CounterSeries
from monitor.analysis.measurement_window import number_or_zero
from monitor.analysis.median_range import MedianRange
from monitor.analysis.run_metrics import OBSERVER_ROLES
from monitor.points.points import TelemetryPoint
from monitor.report.run import ReportRun, group_runs
from monitor.report.table import TOTAL, DataTable, Row
from monitor.report.timeseries import (
    TimeSeries,
    add_series,
    aggregate_repeats,
    bin_width_s,
    binned_means,
    binned_rates,
    counter_series,
)
from monitor.report.workload_tables import bar_rows, distribution_rows
from monitor.sensors.counters import is_additive

_KILO, _MEGA = 1e3, 1e6
_LOOPBACK = "lo"
# The order of process roles in a bar; others follow.
_ROLES = ("stage", "source", "run", "broker")
# Lines per panel; the processes with the least CPU time are shown as one.
_MAX_PROCESSES = 7
_OTHERS = "others"


def has_links(runs: Iterable[ReportRun]) -> bool:
    """Whether any run has links between sites: then the network figures are of links, otherwise of interfaces."""
    return any(run.points.get("link") for run in runs)


def network_rate_table(runs: Sequence[ReportRun]) -> DataTable:
    """Megabytes per second in both directions, over time."""
    return _over_time("rate_mb_per_s", runs, _network_rates(runs))


def network_distribution_table(runs: Sequence[ReportRun]) -> DataTable:
    """The cumulative distribution of the network rate over all repeats."""
    rates_of = _network_rates(runs)
    rows: list[Row] = []
    for label, repeats in group_runs(runs).items():
        rows += distribution_rows(label, [rate for run in repeats for _, rate in rates_of(run)])
    return DataTable(("run", "rate_mb_per_s", "share"), tuple(rows))


def _network_rates(runs: Sequence[ReportRun]) -> Callable[[ReportRun], TimeSeries]:
    counters_of = _link_counters if has_links(runs) else _interface_counters
    width_s = bin_width_s(runs)

    def rates(run: ReportRun) -> TimeSeries:
        total = add_series([binned_rates(run, counter, width_s) for counter in counters_of(run)])
        return [(time_s, rate / _MEGA) for time_s, rate in total]

    return rates


def _link_counters(run: ReportRun) -> list[CounterSeries]:
    links = run.points.get("link", ())
    return list(counter_series(run, links, ("bytes_out", "bytes_in"), lambda _: "", is_delta=False).values())


def _interface_counters(run: ReportRun) -> list[CounterSeries]:
    points = run.points.get("interface", ())
    loopback = [point for point in points if point.tags.get("interface") == _LOOPBACK]
    other = [point for point in points if point.tags.get("interface") != _LOOPBACK]
    # A byte over the loopback is both sent and received on this node: count it once.
    return [
        *counter_series(run, other, ("received_bytes", "sent_bytes"), lambda _: "", is_delta=True).values(),
        *counter_series(run, loopback, ("sent_bytes",), lambda _: "", is_delta=True).values(),
    ]


def gpu_table(runs: Sequence[ReportRun]) -> DataTable:
    """GPU utilisation, GPU power and the power of other rails, over time."""
    width_s = bin_width_s(runs)

    def series(run: ReportRun, measurement: str, field: str, tag: str) -> list[TimeSeries]:
        points = [point for point in run.points.get(measurement, ()) if is_additive(point.tags[tag])]
        return binned_means(run, points, field, tag, width_s)

    def mean_use(run: ReportRun) -> TimeSeries:
        gpus = series(run, "gpu", "use", "gpu")
        return [(time_s, total / len(gpus)) for time_s, total in add_series(gpus)]

    panels: Mapping[str, Callable[[ReportRun], TimeSeries]] = {
        "GPU use (share)": mean_use,
        "GPU power (W)": lambda run: add_series(series(run, "gpu", "power_w", "gpu")),
        "other power (W)": lambda run: add_series(series(run, "power", "power_w", "rail")),
    }
    rows = [(panel, *row) for panel, series_of in panels.items() for row in _over_time("value", runs, series_of).rows]
    return DataTable(("of", "run", "time_s", "value", "low", "high"), tuple(rows))


def cpu_table(runs: Sequence[ReportRun]) -> DataTable:
    """The CPU cores that each process uses, over time."""
    width_s = bin_width_s(runs)
    rows: list[Row] = []
    for label, repeats in group_runs(runs).items():
        rates = [
            {name: binned_rates(run, counter, width_s) for name, counter in _cpu_counters(run).items()}
            for run in repeats
        ]
        curves = {name: aggregate_repeats(each.get(name, []) for each in rates) for name in _keys(rates)}
        for name, curve in _combine_smallest(curves).items():
            rows += [(label, name, time_s, cores.median, *cores.bounds) for time_s, cores in curve]
    return DataTable(("run", "process", "time_s", "cores", "low", "high"), tuple(rows))


def cpu_seconds_table(runs: Sequence[ReportRun]) -> DataTable:
    """Seconds of CPU time per sample, by the role of the processes."""
    return _per_sample("s", runs, lambda run: run.metrics.cpu_s, _ROLES)


def energy_table(runs: Sequence[ReportRun]) -> DataTable:
    """Joules of the whole node per sample, by sensor."""
    return _per_sample("j", runs, lambda run: run.metrics.energy_j or {})


def link_bytes_table(runs: Sequence[ReportRun]) -> DataTable:
    """Kilobytes per sample on each link between two sites, by direction."""

    def by_direction(run: ReportRun) -> dict[str, float]:
        traffic: dict[str, float] = {}
        for link, counts in run.metrics.links.items():
            site, _, peer = link.partition(" - ")
            traffic[f"{site} to {peer}"] = counts.bytes_out / _KILO
            traffic[f"{peer} to {site}"] = counts.bytes_in / _KILO
        return traffic

    return _per_sample("kb", runs, by_direction)


def missing_sensor_reasons(runs: Iterable[ReportRun], *prefixes: str) -> str:
    """Why sensors with these name prefixes could not be read, by node; empty where nothing was reported."""
    reasons = {
        f"{point.tags.get('node', '')}: {point.fields.get('reason')}"
        for run in runs
        for point in run.points.get("missing", ())
        if point.tags.get("sensor", "").lower().startswith(prefixes)
    }
    return "; ".join(sorted(reasons))


def _cpu_counters(run: ReportRun) -> dict[str, CounterSeries]:
    """CPU time by process: each worker in the order of a request's path, then the sum of each other role."""
    hops = sorted(run.points.get("hop", ()), key=lambda hop: (number_or_zero(hop, "place"), hop.tags.get("worker", "")))
    workers = list(dict.fromkeys(hop.tags.get("worker", "") for hop in hops))
    points = [point for point in run.points.get("process", ()) if point.tags.get("role") not in OBSERVER_ROLES]

    def order(point: TelemetryPoint) -> tuple[int, str, int, str, int]:
        role, name = point.tags["role"], point.tags["name"]
        return _index(role, _ROLES), role, _index(name, workers), name, point.time_ns

    def process(point: TelemetryPoint) -> str:
        return point.tags["name"] if point.tags["role"] == "stage" else point.tags["role"]

    return counter_series(run, sorted(points, key=order), ("cpu_s",), process, is_delta=False)


def _index(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _combine_smallest(
    curves: Mapping[str, list[tuple[float, MedianRange]]],
) -> dict[str, list[tuple[float, MedianRange]]]:
    """The largest curves by sum, in their order, and the sum of all others."""
    sums = {name: sum(spread.median for _, spread in curve) for name, curve in curves.items()}
    largest = set(sorted(sums, key=lambda name: -sums[name])[:_MAX_PROCESSES])
    combined = {name: curve for name, curve in curves.items() if name in largest}
    others: dict[float, float] = {}
    for name, curve in curves.items():
        if name not in largest:
            for time_s, spread in curve:
                others[time_s] = others.get(time_s, 0.0) + spread.median
    if others:
        combined[_OTHERS] = [(time_s, MedianRange.from_values([value])) for time_s, value in sorted(others.items())]
    return combined


def _per_sample(
    unit: str,
    runs: Sequence[ReportRun],
    parts_of: Callable[[ReportRun], Mapping[str, float]],
    first_parts: Sequence[str] = (),
) -> DataTable:
    """One bar per group of runs, with the parts in the same order in every bar."""
    groups = {label: [parts_of(run) for run in repeats] for label, repeats in group_runs(runs).items()}
    names = _keys(parts for group in groups.values() for parts in group)
    order = [(name,) for name in sorted(names, key=lambda name: _index(name, first_parts))]
    rows: list[Row] = []
    for label, group in groups.items():
        rows += bar_rows((label,), [{(name,): parts[name] for name in parts} for parts in group], (TOTAL,), order)
    return DataTable(("run", "part", f"{unit}_per_sample", "low", "high"), tuple(rows))


def _over_time(column: str, runs: Sequence[ReportRun], series_of: Callable[[ReportRun], TimeSeries]) -> DataTable:
    rows = [
        (label, time_s, spread.median, *spread.bounds)
        for label, repeats in group_runs(runs).items()
        for time_s, spread in aggregate_repeats(series_of(run) for run in repeats)
    ]
    return DataTable(("run", "time_s", column, "low", "high"), tuple(rows))


def _keys(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
