"""The figures of what it cost, as tables: network, GPUs, power, processors, energy, bytes between sites. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from monitor.analysis.measurement_window import number_or_zero
from monitor.analysis.run_metrics import OBSERVER_ROLES
from monitor.points.points import TelemetryPoint
from monitor.report.run import ReportRun, group_runs
from monitor.report.table import TOTAL, Cell, DataTable, downsample
from monitor.report.timeseries import (
    CounterCurve,
    MedianRange,
    aggregate_repeats,
    bin_width_s,
    binned_means,
    binned_rates,
    counter_series,
    median_range,
)
from monitor.report.workload_tables import MAX_CURVE_POINTS
from monitor.sensors.counters import is_additive

_KILO, _MEGA = 1e3, 1e6
_LOOPBACK = "lo"
# What processes are, in the order in which each bar has its parts; those that are not here come after.
_ROLES = ("stage", "source", "run", "broker")
# Lines in one panel before the smallest are put together.
_PROCESSES = 7

TimeSeries = Sequence[tuple[float, float]]


def network_measurement(runs: Sequence[ReportRun]) -> str:
    """What the network figures are of: `links` if any run has links between sites, else `interfaces`."""
    return "links" if any(run.points.get("link") for run in runs) else "interfaces"


def network_rate_table(runs: Sequence[ReportRun]) -> DataTable:
    """Megabytes a second, both ways, over time."""
    width_s = bin_width_s(runs)
    return _over_time("rate_mb_per_s", runs, lambda run: _network_rates(run, network_measurement(runs), width_s))


def network_distribution_table(runs: Sequence[ReportRun]) -> DataTable:
    """The share of the time in which the network was at most so busy; all repeats together."""
    width_s, over = bin_width_s(runs), network_measurement(runs)
    rows: list[tuple[Cell, ...]] = []
    for name, repeats in group_runs(runs).items():
        values = sorted(rate for run in repeats for _, rate in _network_rates(run, over, width_s))
        found = [(name, rate, (place + 1) / len(values)) for place, rate in enumerate(values)]
        rows += downsample(found, MAX_CURVE_POINTS)
    return DataTable(("run", "rate_mb_per_s", "share"), tuple(rows))


def _network_rates(run: ReportRun, over: str, width_s: float) -> list[tuple[float, float]]:
    if over == "links":
        found = list(_links(run).values())
    else:
        points = run.points.get("interface", ())
        # A byte over the loopback is sent and received here: counted once.
        away = [point for point in points if point.tags.get("interface") != _LOOPBACK]
        here = [point for point in points if point.tags.get("interface") == _LOOPBACK]
        both = counter_series(run, away, ("received_bytes", "sent_bytes"), lambda _: "away", is_delta=True)
        found = [*both.values(), *counter_series(run, here, ("sent_bytes",), lambda _: "here", is_delta=True).values()]
    return _summed([[(time_s, rate / _MEGA) for time_s, rate in binned_rates(run, each, width_s)] for each in found])


def _links(run: ReportRun) -> dict[str, CounterCurve]:
    """What crossed each link between two sites, by its direction."""
    points = run.points.get("link", ())
    there = counter_series(
        run, points, ("bytes_out",), lambda link: f"{link.tags['from']} to {link.tags['to']}", is_delta=False
    )
    back = counter_series(
        run, points, ("bytes_in",), lambda link: f"{link.tags['to']} to {link.tags['from']}", is_delta=False
    )
    return {**there, **back}


def gpu_table(runs: Sequence[ReportRun]) -> DataTable:
    """GPU use, the power of the GPUs, and that of other rails, over time."""
    width_s = bin_width_s(runs)
    kinds: Mapping[str, Callable[[ReportRun], TimeSeries]] = {
        "GPU use (share)": lambda run: _averaged(binned_means(run, run.points.get("gpu", ()), "use", "gpu", width_s)),
        "GPU power (W)": lambda run: _summed(
            list(binned_means(run, run.points.get("gpu", ()), "power_w", "gpu", width_s).values())
        ),
        "other power (W)": lambda run: _summed(
            list(binned_means(run, _rails(run), "power_w", "rail", width_s).values())
        ),
    }
    rows = [(kind, *row) for kind, curve_of in kinds.items() for row in _over_time("value", runs, curve_of).rows]
    return DataTable(("of", "run", "time_s", "value", "low", "high"), tuple(rows))


def _rails(run: ReportRun) -> list[TelemetryPoint]:
    """The samples of the power rails that are no part of another one."""
    return [point for point in run.points.get("power", ()) if is_additive(point.tags["rail"])]


def cpu_table(runs: Sequence[ReportRun]) -> DataTable:
    """How many cores each process kept busy, over time; the smallest of many together as `others`."""
    width_s = bin_width_s(runs)
    rows: list[tuple[Cell, ...]] = []
    for name, repeats in group_runs(runs).items():
        curves = [
            {key: binned_rates(run, counter, width_s) for key, counter in _processor_s(run).items()} for run in repeats
        ]
        found = {key: aggregate_repeats(each.get(key, []) for each in curves) for key in _keys(curves)}
        for key, curve in _largest(found).items():
            rows += [(name, key, time_s, each.median, each.low, each.high) for time_s, each in curve]
    return DataTable(("run", "process", "time_s", "cores", "low", "high"), tuple(rows))


def cpu_seconds_table(runs: Sequence[ReportRun]) -> DataTable:
    """Seconds of processor time for a sample, by what the processes are."""
    return _for_a_sample("s", runs, lambda run: run.metrics.cpu_s, _ROLES)


def energy_table(runs: Sequence[ReportRun]) -> DataTable:
    """Joules for a sample, by sensor: all that the node took while it was measured."""
    return _for_a_sample("j", runs, lambda run: run.metrics.energy_j or {})


def link_bytes_table(runs: Sequence[ReportRun]) -> DataTable:
    """Kilobytes that crossed each link between two sites for a sample, by direction."""

    def by_direction(run: ReportRun) -> dict[str, float]:
        found: dict[str, float] = {}
        for link, crossed in run.metrics.links.items():
            here, _, there = link.partition(" - ")
            found |= {f"{here} to {there}": crossed.bytes_out / _KILO, f"{there} to {here}": crossed.bytes_in / _KILO}
        return found

    return _for_a_sample("kb", runs, by_direction)


def missing_sensor_reasons(runs: Iterable[ReportRun], *sensors: str) -> str:
    """What the nodes said about sensors whose names begin so; empty where they said nothing."""
    said = {
        f"{point.tags.get('node', '')}: {point.fields.get('reason')}"
        for run in runs
        for point in run.points.get("missing", ())
        if point.tags.get("sensor", "").lower().startswith(sensors)
    }
    return "; ".join(sorted(said))


def _process(point: TelemetryPoint) -> str:
    """A worker by its name; of other kinds there is one, or all of them together."""
    return point.tags["name"] if point.tags["role"] == "stage" else point.tags["role"]


def _processor_s(run: ReportRun) -> dict[str, CounterCurve]:
    """By process: the workers in the order of a request's way, the source, the others. Stores may mix them up."""
    hops = sorted(run.points.get("hop", ()), key=lambda hop: (number_or_zero(hop, "place"), hop.tags.get("worker", "")))
    place = {name: count for count, name in enumerate(dict.fromkeys(hop.tags.get("worker", "") for hop in hops))}
    working = [point for point in run.points.get("process", ()) if point.tags.get("role") not in OBSERVER_ROLES]
    working.sort(
        key=lambda point: (
            _place(point.tags["role"], _ROLES),
            point.tags["role"],
            place.get(point.tags["name"], len(place)),
            point.tags["name"],
            point.time_ns,
        )
    )
    return counter_series(run, working, ("cpu_s",), _process, is_delta=False)


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _for_a_sample(
    unit: str,
    runs: Sequence[ReportRun],
    parts_of: Callable[[ReportRun], Mapping[str, float]],
    first: Sequence[str] = (),
) -> DataTable:
    """A bar for each group: its parts, those named in `first` before the others, and all of it together."""
    shares = {name: [found for run in own if (found := parts_of(run))] for name, own in group_runs(runs).items()}
    # The same order in every bar, whatever a run happens to lack.
    order = sorted(_keys(each for own in shares.values() for each in own), key=lambda part: _place(part, first))
    rows: list[tuple[Cell, ...]] = []
    for name, own in shares.items():
        for part in order:
            if any(part in each for each in own):
                middle = median([each.get(part, 0.0) for each in own])
                rows.append((name, part, middle, None, None))
        if own:
            whole = median_range([sum(each.values()) for each in own])
            rows.append((name, TOTAL, whole.median, whole.low, whole.high))
    return DataTable(("run", "part", f"{unit}_per_sample", "low", "high"), tuple(rows))


def _over_time(name: str, runs: Sequence[ReportRun], curve_of: Callable[[ReportRun], TimeSeries]) -> DataTable:
    rows: list[tuple[Cell, ...]] = []
    for group, repeats in group_runs(runs).items():
        rows += [
            (group, time_s, each.median, each.low, each.high)
            for time_s, each in aggregate_repeats(curve_of(run) for run in repeats)
        ]
    return DataTable(("run", "time_s", name, "low", "high"), tuple(rows))


def _summed(curves: Sequence[TimeSeries]) -> list[tuple[float, float]]:
    """What several curves have together, at the times at which all of them have something."""
    if not curves:
        return []
    common = set.intersection(*({time_s for time_s, _ in curve} for curve in curves))
    values = [dict(curve) for curve in curves]
    return [(time_s, sum(each[time_s] for each in values)) for time_s in sorted(common)]


def _averaged(curves: Mapping[str, TimeSeries]) -> list[tuple[float, float]]:
    return [(time_s, total / len(curves)) for time_s, total in _summed(list(curves.values()))]


def _keys(several: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for each in several for key in each))


def _largest(curves: Mapping[str, list[tuple[float, MedianRange]]]) -> dict[str, list[tuple[float, MedianRange]]]:
    """The curves with the greatest sums, in the order they came, and what the others have together."""
    sums = {name: sum(each.median for _, each in curve) for name, curve in curves.items()}
    kept = sorted(sums, key=lambda name: -sums[name])[:_PROCESSES]
    if len(kept) == len(curves):
        return dict(curves)
    found = {name: curve for name, curve in curves.items() if name in kept}
    rest: dict[float, float] = {}
    for name, curve in curves.items():
        if name not in kept:
            for time_s, each in curve:
                rest[time_s] = rest.get(time_s, 0.0) + each.median
    return {**found, "others": [(time_s, MedianRange(value)) for time_s, value in sorted(rest.items())]}
