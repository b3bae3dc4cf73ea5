"""The results of a benchmark as text for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from rich.table import Table

from monitor.analysis.median_range import MedianRange
from monitor.bench.results import RunResult, spreads_by_case

LEGEND = (
    "p50, p95: request latency (training: step duration). network: mean latency outside the stages. kB link, cpu ms: "
    "bytes on links between sites, and CPU time of all processes of the run (brokers too, the monitor not), per sample."
)


def comparison_table(results: Sequence[RunResult], label: str, is_training: bool) -> Table:
    """A row per case with the medians of its runs and the range of its throughput; all cases of one kind."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", title_justify="left")
    table.title = "medians of the runs, with the lowest and highest throughput"
    table.add_column(label, no_wrap=True)
    columns = ["rows/s", "", "step ms", "p95"] if is_training else ["/s", "", "p50 ms", "p95", "network"]
    for column in (*columns, "kB link", "cpu ms"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for case, spreads in spreads_by_case(results).items():
        if not spreads:
            table.add_row(case, "", "failed")
            continue
        throughput = spreads["throughput_per_s"]
        # The median of the runs' sums, as in the report, and not the sum of the roles' medians.
        cpu_s = [each.metrics.total_cpu_s for each in results if each.case == case and each.metrics]
        measured_s = [seconds for seconds in cpu_s if seconds is not None]
        table.add_row(
            case,
            _rate(throughput.median),
            f"({_rate(throughput.minimum)}-{_rate(throughput.maximum)})",
            *(f"{spreads[f'latency_ms.{name}'].median:.0f}" for name in ("p50", "p95")),
            *([] if is_training else [f"{spreads['network_ms'].median:.0f}"]),
            _link_kb(spreads),
            f"{1000 * median(measured_s):.0f}" if measured_s else "-",
        )
    return table


def format_run(result: RunResult) -> str:
    """One run as one line."""
    metrics = result.metrics
    if metrics is None:
        return f"{result.name}: failed: {result.error}"
    unit, duration = (" rows/s", "a step") if metrics.kind == "training" else ("/s", "latency")
    latency = ", ".join(f"{name} {value:.0f}" for name, value in metrics.latency_ms.items() if name != "mean")
    return f"{result.name}: {metrics.throughput_per_s:.1f}{unit}, {duration} {latency} ms"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _link_kb(spreads: Mapping[str, MedianRange]) -> str:
    medians = [spread.median for name, spread in spreads.items() if name.startswith("links.")]
    return f"{sum(medians) / 1000:.0f}" if medians else "-"
