"""The end of a run, for a person: what came out, how fast, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_TIMES = ("queue_ms", "decode_ms", "compute_ms", "encode_ms")


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the summary to standard output."""
    console = Console(soft_wrap=True, highlight=False)
    latency = summary["latency_ms"]
    latencies = ", ".join(f"{name} {value:.0f}" for name, value in latency.items()) or "none"
    console.print()
    console.print(
        f"[bold]{summary['results']}[/] results of {summary['requests']} requests in {summary['elapsed_s']:.1f} s: "
        f"[bold green]{summary['throughput_per_s']:.1f}/s[/], latency {latencies} ms"
    )
    reasons = {"dropped": summary["drops"], "retries": summary["retried"]}
    counts = (f"{name} {summary[name]}{_why(reasons.get(name))}" for name in ("lost", "dropped", "failed", "retries"))
    console.print(", ".join(counts))
    if count := summary["unreadable"]:
        console.print(f"[yellow]{count} samples could not be read: logs/source.log names them[/]")
    for error, count in summary["failures"].items():
        console.print(f"  [red]{count} x {error}[/]", markup=True)
    if summary["stages"]:
        console.print(_stages(summary["stages"]))
    folder = summary["outputs"]
    for what, name in summary["files"].items():
        if name:
            console.print(f"  {what:<8} {folder}/{'frames/' if isinstance(name, list) else name}")


def _why(reasons: Mapping[str, int] | None) -> str:
    """` (WorkerLost 3, Busy 1)`, or nothing where there are none."""
    told = ", ".join(f"{reason} {count}" for reason, count in (reasons or {}).items() if count)
    return f" ({told})" if told else ""


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    title = "mean time of a task, in ms"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title=title, title_justify="left")
    table.add_column("stage")
    for column in ("workers", "tasks", *(name.removesuffix("_ms") for name in _TIMES), "MB in", "MB out"):
        table.add_column(column, justify="right")
    for name, stage in stages.items():
        times = (f"{stage[key]:.1f}" for key in _TIMES)
        megabytes = (f"{stage[key] / 1e6:.1f}" for key in ("bytes_in", "bytes_out"))
        table.add_row(name, str(stage["workers"]), str(stage["tasks"]), *times, *megabytes)
    return table
