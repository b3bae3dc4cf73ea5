"""The end of a run, for a person: what came out, how fast, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_TIMES = ("queue_ms", "decode_ms", "compute_ms", "encode_ms")
_TRAINING_TIMES = ("queue_ms", "decode_ms", "forward_ms", "backward_ms", "update_ms", "encode_ms")


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the summary to standard output."""
    console = console or Console(soft_wrap=True, highlight=False)
    console.print()
    if "steps" in summary:
        _print_training(console, summary)
    else:
        _print_results(console, summary)
    for error, count in summary["failures"].items():
        console.print(f"  [red]{count} x {error}[/]", markup=True)
    if summary["stages"]:
        console.print(_stages(summary))
    for link in summary.get("links", ()):
        console.print(_link(link))
    folder = summary["outputs"]
    for what, name in summary["files"].items():
        if name:
            console.print(f"  {what:<9} {folder}/{_shown(name)}")


def _print_results(console: Console, summary: Mapping[str, Any]) -> None:
    latency = summary["latency_ms"]
    latencies = ", ".join(f"{name} {value:.0f}" for name, value in latency.items()) or "none"
    console.print(
        f"[bold]{summary['results']}[/] results of {summary['requests']} requests in {summary['elapsed_s']:.1f} s: "
        f"[bold green]{summary['throughput_per_s']:.1f}/s[/], latency {latencies} ms"
    )
    reasons = {"dropped": summary["dropped_by_reason"], "retries": summary["retries_by_reason"]}
    counts = (f"{name} {summary[name]}{_why(reasons.get(name))}" for name in ("lost", "dropped", "failed", "retries"))
    console.print(", ".join(counts))
    if count := summary["unreadable"]:
        console.print(f"[yellow]{count} samples could not be read: logs/source.log names them[/]")


def _print_training(console: Console, summary: Mapping[str, Any]) -> None:
    took = ", ".join(f"{name} {value:.0f}" for name, value in summary["step_ms"].items()) or "none"
    console.print(
        f"[bold]{summary['steps']}[/] steps, {_counted(summary['epochs'], 'epoch')}, in {summary['elapsed_s']:.1f} s: "
        f"[bold green]{summary['throughput_per_s']:.0f} rows/s[/], a step {took} ms"
    )
    for what, loss, accuracy in (("training", "loss", "accuracy"), ("test", "test_loss", "test_accuracy")):
        if summary[loss] is not None:
            console.print(f"{what:<8} loss [bold]{summary[loss]:.4g}[/]{_accuracy(summary, accuracy)}")
    if count := summary["rollbacks"]:
        times = "once" if count == 1 else f"{count} times"
        again = _counted(summary["repeated_steps"], "step")
        console.print(f"[yellow]went back to a checkpoint {times}, did {again} again[/]")


def _accuracy(summary: Mapping[str, Any], key: str) -> str:
    """`, accuracy 97.8% (best 98.1%)`, or nothing for a loss that has none."""
    if summary[key] is None:
        return ""
    best = summary.get(f"best_{key}")
    better = f" (best {best:.1%})" if best is not None and best > summary[key] else ""
    return f", accuracy [bold]{summary[key]:.1%}[/]{better}"


def _link(link: Mapping[str, Any]) -> str:
    """One link between two sites: how slow it was, and what crossed it."""
    rate = f", {link['rate_mbit']:g} Mbit/s" if link["rate_mbit"] else ""
    there, back = (f"{link[key] / 1e6:.1f} MB" for key in ("bytes_out", "bytes_in"))
    return f"  link {link['site']} - {link['to']} ({link['delay_ms']:g} ms{rate}): {there} there, {back} back"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _shown(name: str | list[str]) -> str:
    """One file by its name, many by their folder, or by their names where they have none of their own."""
    if isinstance(name, str):
        return name
    folders = {each.rpartition("/")[0] for each in name}
    return f"{folders.pop()}/" if len(folders) == 1 and "" not in folders else ", ".join(name)


def _why(reasons: Mapping[str, int] | None) -> str:
    """` (WorkerLost 3, Busy 1)`, or nothing where there are none."""
    told = ", ".join(f"{reason} {count}" for reason, count in (reasons or {}).items() if count)
    return f" ({told})" if told else ""


def _stages(summary: Mapping[str, Any]) -> Table:
    trains = "steps" in summary
    table = Table(box=None, padding=(0, 1 if trains else 2, 0, 0), header_style="dim", title_justify="left")
    table.title = f"mean time of a {'micro-batch' if trains else 'task'}, in ms"
    table.add_column("stage")
    keys = _TRAINING_TIMES if trains else _TIMES
    # All stages of one that trains have the same tasks.
    counts = ("workers",) if trains else ("workers", "tasks")
    for column in (*counts, *(name.removesuffix("_ms") for name in keys), "MB in", "MB out"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, stage in summary["stages"].items():
        times = (f"{_time(stage, key):.1f}" for key in keys)
        megabytes = (f"{stage[key] / 1e6:.1f}" for key in ("bytes_in", "bytes_out"))
        table.add_row(name, *(str(stage[count]) for count in counts), *times, *megabytes)
    return table


def _time(stage: Mapping[str, Any], key: str) -> float:
    """A time of a stage; that of the optimizer is what compute had beside forward and backward."""
    if key != "update_ms":
        return float(stage[key])
    return max(0.0, float(stage["compute_ms"] - stage["forward_ms"] - stage["backward_ms"]))
