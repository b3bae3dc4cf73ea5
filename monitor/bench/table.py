"""The table at the end of a benchmark, for a person: a line for each case. Pure; it fits a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from rich.table import Table

from monitor.analysis.run_metrics import RunMetrics
from monitor.bench.results import MetricSpread, RunResult, spreads_by_case


def comparison_table(results: Sequence[RunResult], what: str, trains: bool) -> Table:
    """Medians of each case over its runs, with the least and the most of its throughput; all of them train, or none."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", title_justify="left")
    table.title = "medians of the runs; in brackets the least and the most"
    table.add_column(what, no_wrap=True)
    network = () if trains else ("network",)
    unit, of = ("rows/s", "step ms") if trains else ("/s", "p50 ms")
    for column in (unit, "", of, "p95", *network, "kB link", "cpu ms"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for case, figures in spreads_by_case(results).items():
        if not figures:
            table.add_row(case, "", "failed")
            continue
        rate = figures["throughput_per_s"]
        latencies = [f"{figures[f'latency_ms.{name}'].median:.0f}" for name in ("p50", "p95")]
        shares = [f"{figures['network_ms'].median:.0f}"] if network else []
        table.add_row(
            case,
            _rate(rate.median),
            f"({_rate(rate.minimum)}-{_rate(rate.maximum)})",
            *latencies,
            *shares,
            _total(figures, "links.", 1e-3),
            _processor_ms([each.metrics for each in results if each.case == case and each.metrics]),
        )
    return table


LEGEND = (
    "p50, p95: of a request's latency (training: of a step). network: its mean part that no stage accounts for. "
    "kB link, cpu ms: what crossed links between sites, and processor time of all processes of the "
    "run, brokers too, the monitor not, for a sample."
)


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _processor_ms(runs: Sequence[RunMetrics]) -> str:
    """The median of what each run took: a report says the same."""
    found = [seconds for run in runs if (seconds := run.total_cpu_s) is not None]
    return f"{1000 * median(found):.0f}" if found else "-"


def _total(figures: Mapping[str, MetricSpread], prefix: str, factor: float) -> str:
    found = [spread.median for name, spread in figures.items() if name.startswith(prefix)]
    return f"{factor * sum(found):.0f}" if found else "-"
